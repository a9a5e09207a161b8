"""BERT: parity with transformers' BertForMaskedLM and BertForSequenceClassification, and their layout."""

import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from shared.data import masking
from shared.models import bert
from shared.models.attention import record_attention
from shared.models.bert import PRESETS, Bert, BertClassifier, BertConfig, BertMaskedLM
from shared.models.losses import IGNORE
from shared.models.model_utils import count_parameters, from_hf, load_model, save_model, to_hf
from shared.runtime.errors import CourseError

V, B, T = 37, 3, 12
SMALL = {
    "vocab_size": V, "context_length": 16, "num_layers": 2, "num_heads": 4, "d_model": 32, "pad_id": 5,
    "num_token_types": 3,
}  # fmt: skip
CLOSE = {"rtol": 0.0, "atol": 1e-5}
CHOICES = {
    "plain": {"attention": "plain"},
    "sdpa": {"attention": "sdpa"},
    "tiled": {"attention": "tiled", "dropout": 0.0},
    "relu, narrow": {"activation": "relu", "d_ff": 20},
    "tanh, one type, no padding token": {
        "activation": "gelu_tanh", "num_token_types": 1, "pad_id": None, "norm_eps": 1e-5,
    },
}  # fmt: skip
every_choice = pytest.mark.parametrize("choice", CHOICES)
every_kind = pytest.mark.parametrize("labels", [None, 4], ids=["masked language model", "classifier"])


def tiny(labels=None, **options) -> BertMaskedLM | BertClassifier:
    """A model whose every weight is far from its start, so that nothing hides behind a zero or a one."""
    torch.manual_seed(0)
    model = bert.build(BertConfig(**SMALL | options, num_labels=labels)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def batch(labels=None, types=3) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Ids, what else the model takes, and targets: rows of 12, 7 and 4 tokens; token 5 is padding and stands
    among the others too."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (B, T), generator=random)
    padding = torch.arange(T) >= torch.tensor([12, 7, 4])[:, None]
    ids[padding], ids[0, 3] = 5, 5
    token_types = torch.randint(types, (B, T), generator=random)
    if labels:
        targets = torch.randint(labels, (B,), generator=random)
    else:
        targets = torch.randint(V, (B, T), generator=random)
        targets[padding | (torch.rand(B, T, generator=random) < 0.4)] = IGNORE
    return ids, {"padding": padding, "token_types": token_types}, targets


def in_transformers(theirs, ids, options, targets):
    return theirs(
        ids,
        attention_mask=(~options["padding"]).long(),
        token_type_ids=options["token_types"],
        labels=targets,
    )


def gradients(model) -> dict[str, torch.Tensor]:
    """The gradients under transformers' names."""
    copy = bert.build(model.config)
    copy.load_state_dict({name: parameter.grad for name, parameter in model.named_parameters()})
    return bert.to_state(copy)


@every_kind
@every_choice
def test_logits_loss_and_all_gradients_equal_transformers(choice, labels):
    model = tiny(labels, **CHOICES[choice])
    theirs, (ids, options, targets) = to_hf(model), batch(labels, model.config.num_token_types)
    assert type(theirs).__name__ == ("BertForSequenceClassification" if labels else "BertForMaskedLM")
    logits, loss = model(ids, targets, **options)
    expected = in_transformers(theirs, ids, options, targets)
    seen = slice(None) if labels else ~options["padding"]
    torch.testing.assert_close(logits[seen], expected.logits[seen], **CLOSE)
    torch.testing.assert_close(loss, expected.loss, **CLOSE)
    loss.backward()
    expected.loss.backward()
    ours, wanted = gradients(model), dict(theirs.named_parameters())
    assert ours.keys() == wanted.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, wanted[name].grad, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
        if not name.endswith("key.bias"):  # softmax does not see what is added to all keys
            assert gradient.abs().max() > 1e-3, name


def test_without_padding_and_token_types_it_is_transformers_too():
    model = tiny()
    ids, _, targets = batch()
    expected = to_hf(model)(ids, labels=targets)
    logits, loss = model(ids, targets)
    torch.testing.assert_close(logits, expected.logits, **CLOSE)
    torch.testing.assert_close(loss, expected.loss, **CLOSE)


@every_kind
def test_a_random_transformers_bert_comes_over(labels):
    import transformers

    torch.manual_seed(0)
    name = "BertForSequenceClassification" if labels else "BertForMaskedLM"
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=16, type_vocab_size=3, pad_token_id=5, num_labels=labels or 2,
        initializer_range=0.2,
    )  # fmt: skip
    theirs = getattr(transformers, name)(config).eval()
    ids, options, targets = batch(labels)
    expected = in_transformers(theirs, ids, options, targets)
    model = from_hf(theirs)
    assert model.config.num_labels == labels
    logits, loss = model(ids, targets, **options)
    torch.testing.assert_close(loss, expected.loss, **CLOSE)
    seen = slice(None) if labels else ~options["padding"]
    torch.testing.assert_close(logits[seen], expected.logits[seen], **CLOSE)
    with torch.no_grad():
        theirs.bert.embeddings.word_embeddings.weight.zero_()
    assert model.bert.token_embedding.weight.abs().max() > 0  # a copy, not the same memory


def test_the_attention_weights_equal_transformers():
    model, (ids, options, _) = tiny(), batch()
    theirs = to_hf(model)
    theirs.set_attn_implementation("eager")
    with torch.no_grad(), record_attention(model) as recorded:
        model(ids, **options)
        expected = theirs(
            ids,
            attention_mask=(~options["padding"]).long(),
            token_type_ids=options["token_types"],
            output_attentions=True,
        ).attentions
    assert len(recorded) == 2
    for ours, wanted in zip(recorded.values(), expected, strict=True):
        torch.testing.assert_close(ours, wanted, **CLOSE)
        assert ours[:, :, 0, 1:].max() > 0.01  # the first token looks ahead


@every_kind
@every_choice
def test_a_padded_row_gives_what_it_gives_alone(choice, labels):
    model = tiny(labels, **CHOICES[choice])
    ids, options, _ = batch(labels, model.config.num_token_types)
    with torch.no_grad():
        together = model(ids, **options)[0]
        for row, length in enumerate((12, 7, 4)):
            part = {"token_types": options["token_types"][row : row + 1, :length]}
            alone = model(ids[row : row + 1, :length], **part)[0][0]
            torch.testing.assert_close(together[row] if labels else together[row, :length], alone, **CLOSE)
    assert together.isfinite().all()


def test_every_token_sees_every_other():
    model, (ids, _, _) = tiny(), batch()
    with torch.no_grad():
        before = model(ids)[0]
        for place in (0, T - 1):
            changed = ids.clone()
            changed[:, place] = (changed[:, place] + 1) % V
            assert ((model(changed)[0] - before).abs().amax(-1) > 1e-3).all()


def test_places_and_token_types_matter():
    model, ids = tiny(), torch.full((1, T), 9)
    with torch.no_grad():
        logits = model(ids)[0][0]
        assert (logits[1:] - logits[:-1]).abs().amax(-1).min() > 0.01
        assert torch.equal(model(ids, token_types=torch.zeros_like(ids))[0][0], logits)
        assert (model(ids, token_types=torch.ones_like(ids))[0][0] - logits).abs().max() > 0.01


def test_the_loss_alone_is_the_same_and_so_are_its_gradients():
    model, (ids, options, targets) = tiny(), batch()
    loss = model(ids, targets, **options)[1]
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits, alone = model(ids, targets, **options, loss_only=True)
    alone.backward()
    assert logits is None
    torch.testing.assert_close(alone, loss, **CLOSE)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], **CLOSE)


def test_the_loss_alone_computes_logits_only_where_there_is_a_target():
    model, (ids, options, targets) = tiny(), batch()
    seen = []
    model.head.register_forward_hook(lambda module, inputs, logits: seen.append(tuple(logits.shape)))
    model(ids, targets, **options, loss_only=True)
    assert seen == [(int((targets != IGNORE).sum()), V)]


def test_what_the_masking_leaves_out_does_not_count():
    assert masking.IGNORE == IGNORE
    model, ids = tiny(), batch()[0]
    inputs, targets = masking.mask_tokens(
        ids, torch.Generator().manual_seed(0), vocab_size=V, mask_id=1, special_ids=(5,)
    )
    logits, loss = model(inputs, targets)
    rows, places = (targets != -100).nonzero(as_tuple=True)
    expected = -logits.log_softmax(-1)[rows, places, ids[rows, places]].mean()
    torch.testing.assert_close(loss, expected, **CLOSE)


@pytest.mark.parametrize("masked", [0.25, 1.0])
def test_the_operations_are_those_that_pytorch_counts(masked):
    """Attention in its plain form: PyTorch's counter does not see into the CPU's fused kernel."""
    model, length = tiny(attention="plain", dropout=0.0).train(), 12
    ids = torch.randint(V, (2, length))
    targets = ids.masked_fill(torch.arange(length) >= masked * length, IGNORE)
    with FlopCounterMode(display=False) as counter:
        model(ids, targets, loss_only=True)[1].backward()
    assert model.flops_per_token(length, masked) == counter.get_total_flops() / ids.numel()


@pytest.mark.parametrize(("name", "count"), [("bert-base", 109_514_298), ("bert-large", 335_174_458)])
def test_the_published_sizes_have_the_number_of_parameters_of_transformers(name, count):
    """The paper counts 110M and 340M, with the pooler and the next-sentence head."""
    from transformers import BertConfig as TheirConfig
    from transformers import BertForMaskedLM

    with torch.device("meta"):
        model = BertMaskedLM(PRESETS[name])
        theirs = BertForMaskedLM(TheirConfig(**bert.settings(PRESETS[name])))
    assert count_parameters(model) == theirs.num_parameters() == count


def test_the_defaults_are_those_of_transformers():
    from transformers import BertConfig as TheirConfig

    assert bert.config_from(TheirConfig().to_dict()) == BertConfig(30_522) == PRESETS["bert-base"]


def test_weights_start_as_in_transformers():
    model = BertMaskedLM(BertConfig(vocab_size=500, num_layers=2, num_heads=2, d_model=64, init_std=0.05))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif len(parameter) > 2:
            assert float(parameter.detach().std()) == pytest.approx(0.05, rel=0.05), name
    assert not model.bert.token_embedding.weight[0].any()
    assert model.bert.token_embedding.weight[1:].any(dim=1).all()


def test_dropout_is_on_in_training_only():
    for labels in (None, 4):
        model, (ids, options, _) = tiny(labels, dropout=0.3), batch(labels)
        assert torch.equal(model(ids, **options)[0], model(ids, **options)[0])
        model.train()
        assert not torch.equal(model(ids, **options)[0], model(ids, **options)[0])


@pytest.mark.parametrize("labels", [None, 4])
def test_dropout_strikes_where_it_does_in_transformers(labels, monkeypatch):
    """How many numbers each dropout sees, one after the other, and with which probability."""
    model, (ids, options, _) = tiny(labels, dropout=0.25, attention="plain").train(), batch(labels)
    theirs = to_hf(model)
    theirs.set_attn_implementation("eager")
    seen, original = [], torch.nn.functional.dropout

    def dropout(x, p=0.5, training=True, inplace=False):
        if training:
            seen.append((tuple(x.shape), p))
        return original(x, p, training, inplace)

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    model(ids, **options)
    ours = seen.copy()
    seen.clear()
    in_transformers(theirs, ids, options, None)
    assert ours == seen
    assert len(seen) == 1 + 2 * 3 + bool(labels)


def test_a_classifier_starts_from_a_pretrained_encoder():
    model, (ids, options, _) = tiny(), batch()
    classifier = BertClassifier.from_pretrained(model, 4)
    assert classifier.config == dataclasses.replace(model.config, num_labels=4)
    with torch.no_grad():
        assert torch.equal(classifier.eval().bert(ids, **options), model.bert(ids, **options))
        model.bert.token_embedding.weight.zero_()
    assert classifier.bert.token_embedding.weight.any()  # a copy


@every_kind
@every_choice
def test_a_saved_model_comes_back_the_same_and_transformers_reads_it(choice, labels, tmp_path):
    import transformers

    model = tiny(labels, **CHOICES[choice])
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    kept = {"attention": "auto"}  # how to compute is not part of the architecture
    assert loaded.config == dataclasses.replace(model.config, **kept)
    ids, options, targets = batch(labels, model.config.num_token_types)
    torch.testing.assert_close(loaded(ids, **options)[0], model(ids, **options)[0], **CLOSE)
    automatic = "AutoModelForSequenceClassification" if labels else "AutoModelForMaskedLM"
    theirs, report = getattr(transformers, automatic).from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = in_transformers(theirs, ids, options, targets)
    torch.testing.assert_close(model(ids, targets, **options)[1], expected.loss, **CLOSE)


@every_kind
def test_what_transformers_saves_is_read(labels, tmp_path):
    model, (ids, options, _) = tiny(labels), batch(labels)
    to_hf(model).save_pretrained(tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.config == model.config
    assert torch.equal(loaded(ids, **options)[0], model(ids, **options)[0])


@pytest.mark.parametrize("labels", [2, 3])
def test_the_classes_are_counted_by_their_names(labels):
    """transformers leaves them out of config.json where there are two, its default."""
    from transformers import BertConfig as TheirConfig

    values = TheirConfig(**bert.settings(BertConfig(**SMALL, num_labels=labels))).to_diff_dict()
    assert ("id2label" in values) == (labels != 2)
    assert bert.config_from(values).num_labels == labels


def test_the_files_of_2018_are_read():
    """bert-base-uncased has the heads of pretraining, gamma and beta, and its positions written out."""
    from transformers import BertForPreTraining

    model, (ids, options, _) = tiny(), batch()
    hf = BertForPreTraining(to_hf(model).config).eval()
    hf.load_state_dict(to_hf(model).state_dict(), strict=False)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    state = {"bert.embeddings.position_ids": torch.arange(16)[None]}
    for name, tensor in hf.state_dict().items():
        for new, before in old.items():
            name = name.replace(new, before)
        state[name] = tensor
    assert "cls.seq_relationship.weight" in state
    assert "bert.pooler.dense.bias" in state
    assert "cls.predictions.decoder.weight" in state
    fresh = tiny(init_std=0.5)
    fresh.load_state_dict(bert.from_state(fresh, state))
    assert torch.equal(fresh(ids, **options)[0], model(ids, **options)[0])
    values = hf.config.to_dict() | {"architectures": ["BertForPreTraining"]}
    assert bert.config_from(values) == model.config


def test_a_decoder_of_its_own_is_not_silently_dropped():
    model = tiny()
    state = {name: tensor.clone() for name, tensor in bert.to_state(model).items()}
    weight = state["bert.embeddings.word_embeddings.weight"]
    same = bert.from_state(model, state | {"cls.predictions.decoder.weight": weight.clone()})
    assert same.keys() == model.state_dict().keys()
    other = bert.from_state(model, state | {"cls.predictions.decoder.weight": weight + 1})
    assert other.keys() - model.state_dict().keys() == {"cls.predictions.decoder.weight"}


def test_missing_foreign_and_misshapen_weights_are_named():
    model = tiny(4)
    state = bert.to_state(model)
    assert "bert.heads.weight" in bert.from_state(model, state | {"bert.heads.weight": torch.ones(1)})
    query = "bert.encoder.layer.1.attention.self.query.weight"
    with pytest.raises(CourseError, match=f"lack {query}"):
        bert.from_state(model, {name: t for name, t in state.items() if name != query})
    key = query.replace("query", "key")
    moved = {query: torch.ones(31, 32), key: torch.ones(33, 32)}  # together the right size
    with pytest.raises(CourseError, match=rf"{query} has the shape \(31, 32\)"):
        bert.from_state(model, state | moved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_decoder": True}, "is_decoder = True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ({"position_embedding_type": "relative_key"}, "'relative_key'"),
        ({"attention_probs_dropout_prob": 0.2}, "attention_probs_dropout_prob = 0.2"),
        ({"classifier_dropout": 0.2}, "classifier_dropout = 0.2"),
        ({"problem_type": "regression"}, "'regression'"),
        ({"hidden_act": "mish"}, "'mish'; known are gelu"),
        ({"architectures": ["BertForTokenClassification"]}, "is a BertForTokenClassification"),
    ],
)
def test_a_bert_that_the_course_does_not_have_is_refused(change, message):
    values = bert.settings(BertConfig(**SMALL, num_labels=3))
    assert bert.config_from(values).num_labels == 3
    with pytest.raises(CourseError, match=message):
        bert.config_from(values | change)


@pytest.mark.parametrize(
    "name", ["vocab_size", "hidden_size", "max_position_embeddings", "intermediate_size"]
)
def test_a_missing_setting_is_named(name):
    values = bert.settings(BertConfig(**SMALL))
    del values[name]
    with pytest.raises(CourseError, match=f"lack '{name}'"):
        bert.config_from(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is 0; it must be a whole number of at least 1"),
        ({"num_layers": 2.0}, "num_layers is 2.0"),
        ({"d_ff": -1}, "d_ff is -1"),
        ({"num_token_types": 0}, "num_token_types is 0"),
        ({"num_labels": 1}, "num_labels is 1; it must be a whole number of at least 2"),
        ({"num_heads": 5}, "d_model 32 must be a multiple of num_heads 5"),
        ({"pad_id": V}, "pad_id is 37; it must be a token id below 37"),
        ({"pad_id": True}, "pad_id is True"),
        ({"activation": "swiglu"}, "activation is 'swiglu'; choose one of gelu, gelu_tanh, relu"),
        ({"attention": "fast"}, "attention is 'fast'; choose one of plain"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be at least 0 and less than 1"),
        ({"dropout": "0.1"}, "dropout is '0.1'"),
        ({"norm_eps": float("nan")}, "norm_eps is nan; it must be a number above 0"),
        ({"init_std": 0.0}, "init_std is 0.0"),
        ({"attention": "tiled"}, "attention 'tiled' has no dropout"),
        ({"depth": 3}, "Unknown model setting 'depth'; choose from vocab_size, context_length"),
    ],
)
def test_a_bad_setting_is_named(change, message):
    with pytest.raises(CourseError, match=message):
        BertConfig.from_dict(SMALL | change)


def test_a_setting_that_has_no_default_is_asked_for():
    with pytest.raises(CourseError, match="lack vocab_size"):
        BertConfig.from_dict({})
    assert BertConfig.from_dict(SMALL) == BertConfig(**SMALL)


def test_what_does_not_fit_the_model_is_named():
    model, (ids, options, _) = tiny(), batch()
    with pytest.raises(CourseError, match="17 tokens do not fit in the model's context of 16"):
        model(torch.ones(1, 17, dtype=torch.int64))
    with pytest.raises(CourseError, match="padding is of type torch.int64; it must be bool"):
        model(ids, padding=(~options["padding"]).long())
    with pytest.raises(CourseError, match="num_labels is None"):
        BertClassifier(BertConfig(**SMALL))


def test_the_settings_are_json_and_fit_only_a_bert():
    config = BertConfig(**SMALL, num_labels=3)
    assert bert.config_from(json.loads(json.dumps(bert.settings(config)))) == config
    assert bert.fits(config)
    assert not bert.fits(object())
    assert isinstance(bert.build(config).bert, Bert)
