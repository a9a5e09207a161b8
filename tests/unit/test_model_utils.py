"""Models on disk and in transformers: what goes out comes back, and damage is told in one sentence."""

import json
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.tokenizers import END_OF_TEXT, BPETokenizer, CharTokenizer
from shared.data.wordpiece import WordPieceTokenizer
from shared.models import bert, gpt2
from shared.models.gpt import GPT, GPTConfig
from shared.models.model_utils import (
    LAYOUTS,
    count_parameters,
    from_hf,
    gpt_from_hf,
    gpt_to_hf,
    load_model,
    save_model,
    to_hf,
)
from shared.models.transformer import Transformer, TransformerConfig
from shared.runtime.errors import CourseError

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SMALL = {"vocab_size": 23, "context_length": 16, "num_layers": 2, "num_heads": 4, "d_model": 16}
MODELS = {
    "gpt2": {},
    "gpt2 with its own head": {"tie_embeddings": False},
    "gpt2 with a narrow relu mlp": {"activation": "relu", "d_ff": 20},
    "modern": {
        "norm": "rmsnorm",
        "position": "rope",
        "bias": False,
        "qk_norm": True,
        "bigram_embedding": True,
    },
}


def gpt(**options) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


IDS = torch.randint(23, (2, 9), generator=torch.Generator().manual_seed(1))


class FakeTokenizer:
    special_tokens = {"<|endoftext|>": 22}  # noqa: RUF012

    def save(self, path):
        path.write_text("{}")


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("gpt2")])
def test_a_gpt2_goes_to_transformers_and_back(name):
    model = gpt(**MODELS[name])
    theirs = gpt_to_hf(model)
    torch.testing.assert_close(theirs(IDS).logits, model(IDS)[0], **CLOSE)
    assert theirs.num_parameters() == count_parameters(model)
    back = gpt_from_hf(theirs)
    assert back.config == model.config
    assert torch.equal(back(IDS)[0], model(IDS)[0])
    with torch.no_grad():
        theirs.transformer.wte.weight.zero_()
    assert model.token_embedding.weight.abs().max() > 0  # a copy, not the same memory


def test_a_random_transformers_gpt2_comes_over_with_its_gradients():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=23, n_positions=16, n_embd=16, n_layer=2, n_head=4)).eval()
    ours = gpt_from_hf(theirs)
    torch.testing.assert_close(ours(IDS)[0], theirs(IDS).logits, **CLOSE)
    ours(IDS[:, :-1], IDS[:, 1:])[1].backward()
    theirs(IDS, labels=IDS).loss.backward()
    for mine, his in zip(ours.blocks, theirs.transformer.h, strict=True):
        torch.testing.assert_close(mine.attention.qkv.weight.grad, his.attn.c_attn.weight.grad.T, **CLOSE)
    torch.testing.assert_close(ours.token_embedding.weight.grad, theirs.transformer.wte.weight.grad, **CLOSE)


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("gpt2")])
def test_transformers_reads_what_is_saved(name, tmp_path):
    from transformers import AutoModelForCausalLM

    model = gpt(**MODELS[name])
    save_model(model, tmp_path / "model", FakeTokenizer())
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.eos_token_id == 22
    torch.testing.assert_close(theirs(IDS).logits, model(IDS)[0], **CLOSE)


TEXT = "Don't panic , said 42 people.\n\n  Twice! " * 20
TOKENIZERS = {
    "bpe": lambda: BPETokenizer.train([TEXT], 290),
    "characters": lambda: CharTokenizer.from_text(TEXT),
    "characters with names": lambda: CharTokenizer.from_text(TEXT, ("<pad>", "<bos>", "<eos>", "<unk>")),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_transformers_reads_the_tokenizer_that_is_saved_with_a_model(name, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = TOKENIZERS[name]()
    save_model(gpt(vocab_size=tokenizer.vocab_size), tmp_path / "model", tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.model_max_length == 16
    ids = tokenizer.encode(TEXT)
    assert theirs(TEXT)["input_ids"] == ids
    assert theirs.decode(ids) == TEXT
    roles = {"bpe": (END_OF_TEXT, END_OF_TEXT, None), "characters with names": ("<bos>", "<eos>", "<pad>")}
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == roles.get(name, (None, None, None))


def test_transformers_knows_the_special_tokens_of_a_berts_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = WordPieceTokenizer.train([TEXT], 80)
    model = bert.build(bert.BertConfig(tokenizer.vocab_size, 16, 1, 2, 8, pad_id=None))
    save_model(model, tmp_path / "model", tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    named = {role: getattr(theirs, f"{role}_token_id") for role in ("pad", "unk", "cls", "sep", "mask")}
    assert named == {role: tokenizer.special_tokens[f"[{role.upper()}]"] for role in named}
    assert theirs("42 people", add_special_tokens=False)["input_ids"] == tokenizer.encode("42 people")
    assert load_model(tmp_path / "model").config == model.config


def test_whoever_may_read_the_settings_may_read_the_weights(tmp_path):
    save_model(gpt(), tmp_path / "model")
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert len(modes) == 1


def test_what_transformers_saves_is_read(tmp_path):
    theirs = gpt_to_hf(gpt())
    theirs.save_pretrained(tmp_path / "model")
    torch.testing.assert_close(load_model(tmp_path / "model")(IDS)[0], theirs(IDS).logits, **CLOSE)


def test_the_names_of_openais_own_file_are_read(tmp_path):
    """It has no "transformer." before its names, and keeps the causal masks as if they were weights."""
    from safetensors.torch import load_file, save_file

    model = gpt()
    save_model(model, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    state = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    save_file(state | {"h.0.attn.bias": torch.ones(1, 1, 16, 16)}, path)
    assert torch.equal(load_model(tmp_path / "model")(IDS)[0], model(IDS)[0])


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_gpt_comes_back_the_same(name, tmp_path):
    model = gpt(**MODELS[name])
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert not loaded.training
    assert loaded.config == model.config
    assert torch.equal(loaded(IDS)[0], model(IDS)[0])
    model_type = json.loads((tmp_path / "model" / "config.json").read_text())["model_type"]
    assert model_type == ("gpt2" if name.startswith("gpt2") else "course-gpt")


@pytest.mark.parametrize("labels", [None, 3])
def test_a_bert_goes_to_transformers_and_into_a_folder_and_back(labels, tmp_path):
    import transformers

    torch.manual_seed(0)
    config = bert.BertConfig(23, 16, 2, 4, 16, num_labels=labels, dropout=0.0)
    model = bert.build(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    expected = model(IDS)[0]
    theirs = to_hf(model)
    torch.testing.assert_close(theirs(IDS).logits, expected, **CLOSE)
    assert torch.equal(from_hf(theirs)(IDS)[0], expected)
    save_model(model, tmp_path / "model", dtype=torch.float32)
    read = getattr(transformers, type(theirs).__name__).from_pretrained(tmp_path / "model")
    torch.testing.assert_close(read(IDS).logits, expected, **CLOSE)
    loaded = load_model(tmp_path / "model")
    assert loaded.config == config
    assert torch.equal(loaded(IDS)[0], expected)


@pytest.mark.parametrize("architecture", LAYOUTS)
def test_a_layout_writes_the_model_type_under_which_it_is_registered(architecture):
    """And is found by it, by name, in transformers."""
    import transformers

    module = import_module(f"shared.models.{LAYOUTS[architecture]}")
    assert LAYOUTS[module.ARCHITECTURE] == LAYOUTS[architecture]
    assert getattr(transformers, architecture).config_class.model_type == LAYOUTS[architecture]


def test_a_model_that_is_not_the_courses_is_refused(tmp_path):
    class Other(torch.nn.Linear):
        config = None

    with pytest.raises(TypeError, match="Other is not a model of the course"):
        save_model(Other(2, 2), tmp_path / "model")


def test_a_saved_transformer_comes_back_the_same(tmp_path):
    model = Transformer(TransformerConfig(23, d_model=16, num_heads=4, num_layers=2, d_ff=20)).eval()
    save_model(model, tmp_path / "model")
    assert torch.equal(load_model(tmp_path / "model")(IDS, IDS), model(IDS, IDS))


def test_an_existing_model_is_replaced_only_when_asked(tmp_path):
    save_model(gpt(), tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    with pytest.raises(CourseError, match="already exists"):
        save_model(gpt(d_ff=20), tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    save_model(gpt(d_ff=20), tmp_path / "model", replace=True)
    assert load_model(tmp_path / "model").config.d_ff == 20


def test_a_tokenizer_that_fails_to_save_leaves_the_old_model(tmp_path):
    class Broken(FakeTokenizer):
        def save(self, path):
            raise RuntimeError("no")

    save_model(gpt(), tmp_path / "model")
    with pytest.raises(RuntimeError):
        save_model(gpt(d_ff=20), tmp_path / "model", Broken(), replace=True)
    assert load_model(tmp_path / "model").config.d_ff is None
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(gpt(), folder)
    return folder


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
@given(share=st.floats(0, 1, exclude_max=True))
@settings(max_examples=60, deadline=None)
def test_a_file_cut_at_any_byte_is_told_in_one_sentence(saved, file, share):
    whole = (saved / file).read_bytes()
    size = len(whole.rstrip())  # without the last line break a config is still whole
    try:
        (saved / file).write_bytes(whole[: int(share * size)])
        with pytest.raises(CourseError, match=f"{file} is (truncated|damaged)"):
            load_model(saved)
    finally:
        (saved / file).write_bytes(whole)


def edited(folder, changes, tmp_path):
    """A copy of a saved model with other settings."""
    save_model(load_model(folder), tmp_path / "edited")
    path = tmp_path / "edited" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return tmp_path / "edited"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 32}, r"has the shape \(23, 16\) and the configuration says \(23, 32\)"),
        ({"n_layer": 3}, r"lack transformer.h.2.attn.c_attn.bias \(12 missing\)"),
        ({"n_layer": 1}, "hold transformer.h.1.*no place for"),
        ({"n_head": 5}, "config.json cannot be used: d_model 16 must be a multiple of num_heads 5"),
        ({"n_head": "4"}, "config.json cannot be used: num_heads is '4'"),
        ({"resid_pdrop": "a tenth"}, "config.json cannot be used: a setting has the wrong type"),
        ({"layer_norm_epsilon": -1.0}, "config.json cannot be used: norm_eps is -1.0"),
        ({"model_type": "mamba"}, "model type 'mamba' is none of gpt2, qwen3, llama, bert, course-gpt"),
        ({"model_type": "bert"}, "architecture 'GPT2LMHeadModel' is none of BertForMaskedLM"),
        ({"architectures": ["GPT2ForSequenceClassification"]}, "is none of GPT2LMHeadModel"),
        ({"quantization_config": {"quant_method": "gptq"}}, "its weights are quantised"),
        ({"model_type": ["gpt2"]}, r"model type \['gpt2'\] is none of"),
        ({"activation_function": "swish"}, "activation 'swish'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ({"model_type": "course-gpt"}, "unknown setting 'activation_function'"),
    ],
)
def test_a_configuration_of_another_model_is_told_in_one_sentence(saved, tmp_path, changes, message):
    with pytest.raises(CourseError, match=message):
        load_model(edited(saved, changes, tmp_path))


def test_a_missing_setting_is_named(saved, tmp_path):
    folder = edited(saved, {}, tmp_path)
    settings_ = json.loads((folder / "config.json").read_text())
    del settings_["n_head"]
    (folder / "config.json").write_text(json.dumps(settings_))
    with pytest.raises(CourseError, match="lack 'n_head'"):
        load_model(folder)


def test_a_missing_weight_is_named(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    path = edited(saved, {}, tmp_path) / "model.safetensors"
    state = load_file(path)
    del state["transformer.h.1.mlp.c_fc.weight"]
    save_file(state, path)
    with pytest.raises(CourseError, match=r"lack transformer.h.1.mlp.c_fc.weight \(1 missing\)"):
        load_model(path.parent)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_missing_file_is_named(saved, tmp_path, file):
    folder = edited(saved, {}, tmp_path)
    (folder / file).unlink()
    with pytest.raises(CourseError, match=f"There is no .*{file}; give the folder of a saved model"):
        load_model(folder)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CourseError, match="There is no .*config.json"):
        load_model(tmp_path / "nothing")


def test_settings_that_are_not_an_object_are_refused(saved, tmp_path):
    folder = edited(saved, {}, tmp_path)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(CourseError, match="does not hold a model's settings"):
        load_model(folder)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"position": "rope"}, "position"),
        ({"norm": "rmsnorm", "bias": False}, "norm, bias"),
        ({"activation": "relu2"}, "activation"),
        ({"num_kv_heads": 2}, "num_kv_heads"),
    ],
)
def test_what_gpt2_cannot_express_is_named(options, reason):
    config = GPTConfig(**SMALL | options)
    assert not gpt2.fits(config)
    with pytest.raises(CourseError, match=f"no such {reason};"):
        gpt2.settings(config)


def test_parameters_are_counted_once_and_frozen_ones_on_request():
    model = gpt()
    assert count_parameters(model) == model.num_parameters()
    model.token_embedding.weight.requires_grad_(False)
    assert count_parameters(model) - count_parameters(model, trainable=True) == 23 * 16
