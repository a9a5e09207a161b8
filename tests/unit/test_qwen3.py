"""The course's GPT as Qwen3 and Llama: the same function in transformers, in files and back."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.data.tokenizers import END_OF_TEXT, BPETokenizer
from shared.inference.generation import generate
from shared.inference.kv_cache import KVCache
from shared.models import llama, qwen3
from shared.models.gpt import GPT, GPTConfig
from shared.models.model_utils import count_parameters, from_hf, load_model, save_model, to_hf
from shared.runtime.errors import CourseError

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
MODERN = {
    "vocab_size": 23, "context_length": 32, "num_layers": 2, "num_heads": 4, "d_model": 16, "num_kv_heads": 2,
    "d_ff": 24, "norm": "rmsnorm", "norm_eps": 1e-3, "position": "rope", "rope_theta": 500.0,
    "activation": "swiglu", "bias": False,
}  # fmt: skip
QWEN3 = MODERN | {"qk_norm": True}
MODELS = {
    "qwen3": QWEN3,
    "qwen3 with its own head": QWEN3 | {"tie_embeddings": False, "num_kv_heads": 4},
    "qwen3 with a window": QWEN3 | {"window": 5},
    "llama": MODERN,
    "llama with its own head": MODERN | {"tie_embeddings": False, "num_kv_heads": 1},
}
every_model = pytest.mark.parametrize("name", MODELS)
IDS = torch.randint(23, (2, 19), generator=torch.Generator().manual_seed(1))


def gpt(name="qwen3", **options) -> GPT:
    """Every weight far from where it starts, so that nothing hides behind a one."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**MODELS[name] | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def layout(name):
    return qwen3 if name.startswith("qwen3") else llama


@every_model
def test_logits_loss_and_every_gradient_equal_those_of_transformers(name):
    model = gpt(name)
    theirs = to_hf(model)
    assert type(theirs).__name__ == layout(name).ARCHITECTURE
    assert theirs.num_parameters() == count_parameters(model)
    logits, loss = model(IDS[:, :-1], IDS[:, 1:])
    expected = theirs(IDS, labels=IDS)
    torch.testing.assert_close(logits, expected.logits[:, :-1], **CLOSE)
    torch.testing.assert_close(loss, expected.loss, **CLOSE)
    loss.backward()
    expected.loss.backward()
    gradients = copy.deepcopy(model)
    for parameter, original in zip(gradients.parameters(), model.parameters(), strict=True):
        parameter.data = original.grad
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    ours = layout(name).to_state(gradients)
    assert ours.keys() == wanted.keys()
    for name_, gradient in wanted.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(ours[name_], gradient, **CLOSE, msg=lambda text, n=name_: f"{n}: {text}")


@every_model
def test_greedy_decoding_of_a_padded_batch_gives_the_tokens_of_transformers(name):
    model = gpt(name)
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.mul_(4)  # or a tied head says the last token again and again, whatever the blocks do
    prompts = [IDS[0, :9].tolist(), IDS[1, :4].tolist()]
    padded = torch.tensor([prompts[0], [0] * 5 + prompts[1]])
    mask = torch.tensor([[1] * 9, [0] * 5 + [1] * 4])
    expected = to_hf(model).generate(
        padded, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    for cached in (True, False):
        assert generate(model, prompts, 20, use_cache=cached) == expected[:, 9:].tolist()
    assert len(set(expected[:, 9:].flatten().tolist())) > 5


@every_model
def test_the_cache_holds_the_keys_and_values_that_transformers_holds(name):
    model = gpt(name)
    theirs, heads = to_hf(model), model.config.kv_heads
    cache = KVCache.for_model(model, 2, 19)
    with torch.no_grad():
        logits = torch.cat([model(part, cache=cache)[0] for part in IDS.split([7, 1, 8, 1, 2], dim=1)], dim=1)
        expected = theirs(IDS, use_cache=True)
    torch.testing.assert_close(logits, expected.logits, **CLOSE)
    assert (
        cache.num_bytes == 2 * 2 * 2 * heads * 19 * 4 * 4
    )  # k and v, layers, rows, heads, time, width, bytes
    kept = expected.past_key_values.layers[1].keys  # with a window, the end of it only
    torch.testing.assert_close(cache._keys[1][:, :, -kept.shape[2] :], kept, **CLOSE)


@every_model
def test_a_random_transformers_model_comes_over_and_goes_back(name):
    torch.manual_seed(1)
    hf = to_hf(gpt(name))
    theirs = type(hf)(hf.config).eval()  # drawn anew, by the library
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    ours = from_hf(theirs)
    assert ours.config == GPTConfig(**MODELS[name])
    torch.testing.assert_close(ours(IDS)[0], theirs(IDS).logits, **CLOSE)
    back = to_hf(ours).state_dict()
    assert all(torch.equal(back[key], tensor) for key, tensor in theirs.state_dict().items())
    with torch.no_grad():
        theirs.model.embed_tokens.weight.zero_()
    assert ours.token_embedding.weight.abs().max() > 0  # a copy, not the same memory


@every_model
def test_transformers_reads_what_is_saved_and_writes_what_is_read(name, tmp_path):
    from transformers import AutoModelForCausalLM

    model = gpt(name)
    save_model(model, tmp_path / "model")
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == torch.float32
    torch.testing.assert_close(theirs(IDS).logits, model(IDS)[0], **CLOSE)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("model", "theirs"):
        loaded = load_model(tmp_path / folder)
        assert loaded.config == model.config
        assert not loaded.training
        assert torch.equal(loaded(IDS)[0], model(IDS)[0])


def test_a_folder_with_a_tokenizer_is_all_that_transformers_needs(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = "Don't panic, said 42 people.\n\n  Twice! " * 20
    tokenizer = BPETokenizer.train([text], 290)
    model = gpt(vocab_size=290)
    save_model(model, tmp_path / "model", tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    inputs = their_tokenizer("Twice, said", return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == tokenizer.encode("Twice, said")
    torch.testing.assert_close(theirs(**inputs).logits, model(inputs["input_ids"])[0], **CLOSE)
    end = tokenizer.special_tokens[END_OF_TEXT]
    assert theirs.generation_config.eos_token_id == end
    assert (their_tokenizer.eos_token_id, their_tokenizer.model_max_length) == (end, 32)
    expected = theirs.generate(**inputs, max_new_tokens=10, do_sample=False)[0].tolist()
    prompt = tokenizer.encode("Twice, said")
    assert prompt + generate(model, [prompt], 10, stop_ids=(end,))[0] == expected


def test_bfloat16_weights_take_half_the_space_and_are_the_rounded_ones_everywhere(tmp_path):
    from transformers import AutoModelForCausalLM

    model = gpt(d_model=64, d_ff=96)
    save_model(model, tmp_path / "full")
    save_model(model, tmp_path / "half", dtype=torch.bfloat16)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "half")]
    assert count_parameters(model) * 4 < sizes[0]
    assert 2 * (sizes[0] - sizes[1]) == pytest.approx(count_parameters(model) * 4, rel=0.01)
    assert all(t.dtype == torch.bfloat16 for t in load_file(tmp_path / "half" / "model.safetensors").values())
    assert next(model.parameters()).dtype == torch.float32  # the model itself stays

    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():  # the weights alone; the angles of the positions stay exact
        parameter.data = parameter.data.bfloat16().float()
    loaded = load_model(tmp_path / "half")
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    assert torch.equal(loaded(IDS)[0], rounded(IDS)[0])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    torch.testing.assert_close(theirs(IDS).logits, rounded(IDS)[0], **CLOSE)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"

    for folder in ("full", "half"):
        low = load_model(tmp_path / folder, dtype=torch.bfloat16)
        assert all(p.dtype == torch.bfloat16 for p in low.parameters())
        assert torch.equal(low.head.weight.float(), rounded.head.weight)
    save_model(low, tmp_path / "again")  # a model's own dtype is what is written
    assert (tmp_path / "again" / "model.safetensors").stat().st_size == sizes[1]


def test_a_weight_too_large_for_the_dtype_is_refused(tmp_path):
    model = gpt()
    with torch.no_grad():
        model.blocks[1].mlp.down.weight[3, 4] = 1e5
    with pytest.raises(
        CourseError, match=r"layers.1.mlp.down_proj.weight holds numbers too large for float16"
    ):
        save_model(model, tmp_path / "model", dtype=torch.float16)
    assert not (tmp_path / "model").exists()
    save_model(model, tmp_path / "model", dtype=torch.bfloat16)


@pytest.fixture
def shards(tmp_path):
    """A model that transformers saved in several files."""
    to_hf(gpt()).save_pretrained(tmp_path / "model", max_shard_size="4KB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    return tmp_path / "model"


def test_a_model_in_shards_is_read(shards):
    assert torch.equal(load_model(shards)(IDS)[0], gpt()(IDS)[0])


def test_a_missing_damaged_or_strange_shard_is_named(shards):
    first = sorted(shards.glob("model-*.safetensors"))[0]
    whole = first.read_bytes()
    first.write_bytes(whole[:-1])
    with pytest.raises(CourseError, match=f"{first.name} is truncated or damaged"):
        load_model(shards)
    first.unlink()
    with pytest.raises(CourseError, match=f"There is no .*{first.name}"):
        load_model(shards)
    index = shards / "model.safetensors.index.json"
    for values in ([], {}, {"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}, {"weight_map": 3}):
        index.write_text(json.dumps(values))
        with pytest.raises(CourseError, match="index.json does not say in which file each weight is"):
            load_model(shards)
    index.write_text("{")
    with pytest.raises(CourseError, match="index.json is damaged or not JSON"):
        load_model(shards)


def test_a_pickle_is_never_loaded(tmp_path):
    save_model(gpt(), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(CourseError, match=r"pytorch_model.bin is a pickle, which could run any program"):
        load_model(tmp_path / "model")


def test_weights_that_are_missing_or_of_another_shape_are_named_as_in_the_file(tmp_path):
    save_model(gpt(), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    state = load_file(path)
    key, value = (f"model.layers.1.self_attn.{part}_proj.weight" for part in "kv")
    save_file({name: tensor for name, tensor in state.items() if name != key}, path)
    with pytest.raises(CourseError, match=rf"lack {key} \(1 missing\)"):
        load_model(tmp_path / "model")
    # As many rows in all, so that only the parts tell: the model would run, on keys that are values.
    moved = {key: torch.cat((state[key], state[value][:4])), value: state[value][4:]}
    save_file(state | moved, path)
    with pytest.raises(
        CourseError, match=rf"{key} has the shape \(12, 16\) and the configuration says \(8, 16\)"
    ):
        load_model(tmp_path / "model")
    save_file(state | {"model.layers.1.self_attn.q_proj.bias": torch.zeros(16)}, path)
    with pytest.raises(CourseError, match=r"hold model.layers.1.self_attn.q_proj.bias, which the config"):
        load_model(tmp_path / "model")


def edited(tmp_path, name, **changes):
    save_model(gpt(name), tmp_path / "model", replace=True)
    path = tmp_path / "model" / "config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in settings.items() if value != "gone"}))
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 8}, "has heads of width 8, and in the course's GPT they have .* = 4"),
        ({"head_dim": "gone"}, "has heads of width 128"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rotary positions of the type 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "the type 'linear'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "positions with 'full_attention'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "turns 0.5 of each head"),
        ({"rope_parameters": 7}, "the rope_parameters 7; they must be an object"),
        ({"use_sliding_window": True, "layer_types": "gone", "max_window_layers": 1, "sliding_window": 4},
         "a window in some layers only"),
        ({"hidden_size": "gone"}, "The Qwen3 settings lack 'hidden_size'"),
        ({"rms_norm_eps": "small"}, "a setting has the wrong type"),
        ({"num_attention_heads": 3}, "d_model 16 must be a multiple of num_heads 3"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "is none of Qwen3ForCausalLM"),
        ({"model_type": "llama"}, "'Qwen3ForCausalLM' is none of LlamaForCausalLM"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
    ],
)  # fmt: skip
def test_a_qwen3_that_the_gpt_cannot_be_is_refused_in_one_sentence(changes, message, tmp_path):
    with pytest.raises(CourseError, match=f"config.json cannot be used: .*{message}"):
        load_model(edited(tmp_path, "qwen3", **changes))


def test_a_llama_with_biases_in_its_mlp_is_refused(tmp_path):
    with pytest.raises(CourseError, match="This Llama has mlp_bias = True"):
        load_model(edited(tmp_path, "llama", mlp_bias=True))


def test_settings_as_older_versions_of_transformers_wrote_them_are_read(tmp_path):
    for name, gone in (("qwen3", {"layer_types": "gone"}), ("llama", {"head_dim": "gone"})):
        folder = edited(
            tmp_path, name, rope_parameters="gone", rope_scaling=None, architectures="gone", **gone
        )
        assert load_model(folder).config == gpt(name).config


def test_the_settings_say_theta_where_old_and_new_readers_look():
    settings = qwen3.settings(gpt().config)
    assert settings["rope_theta"] == settings["rope_parameters"]["rope_theta"] == 500.0


def test_dropout_comes_back_though_transformers_knows_half_of_it(tmp_path):
    from transformers import AutoModelForCausalLM

    save_model(gpt(dropout=0.1), tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "theirs")
    for folder in ("model", "theirs"):
        assert load_model(tmp_path / folder).config.dropout == 0.1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"norm": "layernorm", "bias": True}, "norm = 'layernorm', bias = True;"),
        ({"norm_affine": False}, "norm_affine = False;"),
        ({"position": "alibi"}, "position = 'alibi';"),
        ({"activation": "relu2"}, "activation = 'relu2';"),
        ({"bigram_embedding": True}, "bigram_embedding = True;"),
    ],
)
def test_what_neither_qwen3_nor_llama_can_express_is_named(options, reason, tmp_path):
    model = gpt(**options)
    for family in (qwen3, llama):
        assert not family.fits(model.config)
        with pytest.raises(CourseError, match=f"cannot express {reason}|{reason[:-1]}, qk_norm = True;"):
            family.settings(model.config)
    with pytest.raises(CourseError, match="This GPT has choices that no class of transformers has"):
        to_hf(model)
    save_model(model, tmp_path / "model")  # and is written as the course's own
    assert torch.equal(load_model(tmp_path / "model")(IDS)[0], model(IDS)[0])


def test_qk_norm_and_windows_tell_qwen3_from_llama():
    config = {name: gpt(name).config for name in MODELS}
    assert qwen3.fits(config["qwen3"])
    assert not llama.fits(config["qwen3"])
    assert llama.fits(config["llama"])
    assert not qwen3.fits(config["llama"])
    assert not llama.fits(gpt("llama", window=4).config)
