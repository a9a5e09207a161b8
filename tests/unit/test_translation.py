"""The translation recipe's parts: pairs from disk, settings, loss, scores, and decoding in order."""

import json

import pytest
import torch
import torch.nn.functional as F

from shared.data.datasets import pad
from shared.data.sources.translation import sentence_pairs
from shared.models.transformer import Transformer, TransformerConfig
from shared.recipes.translation import (
    load_translation_run,
    nats_per_token,
    sequence_loss,
    translate,
    translation_data,
)
from shared.runtime.errors import CourseError
from shared.runtime.files import repository_root

CONFIGS = sorted((repository_root() / "configs" / "training").glob("translation-*.yaml"))
ROWS = [{"en": "a red dog", "de": "ein roter Hund"}, {"en": " ", "de": "leer"}, {"en": "two", "de": "zwei"}]
PAIRS = [([5, 6, 2], [1, 7, 2]), ([8, 2], [1, 9, 4, 5, 2]), ([3, 4, 5, 6, 2], [1, 2]), ([9, 2], [1, 3, 3, 2])]


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("COURSE_HOME", str(tmp_path / "home"))
    folder = tmp_path / "data" / "multi30k"
    folder.mkdir(parents=True)
    lines = [json.dumps(row) + "\n" for row in ROWS]
    for name in ("train", "val", "test"):
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    settings = {"num_layers": 1, "num_heads": 2, "d_model": 16, "d_ff": 32, "dropout": 0.0, "max_length": 12}
    model = Transformer(TransformerConfig(vocab_size=10, **settings)).eval()
    with (
        torch.no_grad()
    ):  # an untrained model repeats its last token whatever the source; a louder one does not
        for block in model.decoder:
            block.cross_attention.out.weight.mul_(10)
    return model


def test_pairs_are_read_from_course_data_and_empty_sides_are_left_out(corpus):
    assert sentence_pairs("multi30k", "validation") == [("a red dog", "ein roter Hund"), ("two", "zwei")]
    assert sentence_pairs("multi30k", "test", "de", "en", limit=1) == [("ein roter Hund", "a red dog")]


def test_wmt14s_rows_and_parquet_files_are_read(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    monkeypatch.setenv("COURSE_HOME", str(tmp_path / "home"))
    (tmp_path / "wmt14" / "de-en").mkdir(parents=True)
    for number in (0, 1):
        rows = datasets.Dataset.from_list(
            [{"translation": {"de": f"Satz {number}", "en": f"sentence {number}"}}]
        )
        rows.to_parquet(tmp_path / "wmt14" / "de-en" / f"train-0000{number}-of-00002.parquet")
    assert sentence_pairs("wmt14", "train") == [("sentence 0", "Satz 0"), ("sentence 1", "Satz 1")]


def test_a_corpus_that_is_nowhere_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    monkeypatch.setenv("COURSE_HOME", str(tmp_path / "home"))
    with pytest.raises(
        CourseError, match=r"huggingface\.co/datasets/bentrevett/multi30k into a folder multi30k"
    ):
        sentence_pairs("multi30k", "train")


def test_a_folder_without_the_split_names_the_file_that_is_missing(corpus):
    (corpus / "val.jsonl").unlink()
    with pytest.raises(CourseError, match=r"no file for the validation part; it needs val\*\.jsonl"):
        sentence_pairs("multi30k", "validation")


def test_a_damaged_file_is_named(corpus):
    (corpus / "train.jsonl").write_text('{"en": "a", "de"\n')
    with pytest.raises(CourseError, match=r"train\.jsonl could not be read"):
        sentence_pairs("multi30k", "train")


def test_a_language_that_is_not_there_is_refused_with_those_that_are(corpus):
    with pytest.raises(CourseError, match="its rows hold en, de"):
        sentence_pairs("multi30k", "train", "en", "fr")


def test_the_loss_is_the_librarys_and_does_not_count_padding(model):
    batch = pad([source for source, _ in PAIRS]), pad([target for _, target in PAIRS])
    loss, count = sequence_loss(0, 0.1)(model, batch)
    logits, expected = model(batch[0], batch[1][:, :-1]), batch[1][:, 1:]
    library = F.cross_entropy(logits.flatten(0, 1), expected.flatten(), ignore_index=0, label_smoothing=0.1)
    torch.testing.assert_close(loss, library)
    assert count == sum(len(target) - 1 for _, target in PAIRS)


def test_the_score_does_not_depend_on_the_batch_size(model):
    scores = [nats_per_token(model, PAIRS, batch_size=size) for size in (1, 3, 4)]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-5)
    one_by_one = [sequence_loss(0)(model, tuple(pad([side]) for side in pair)) for pair in PAIRS]
    assert scores[0] == pytest.approx(
        sum(loss.item() * count.item() for loss, count in one_by_one) / 10, rel=1e-5
    )


@pytest.mark.parametrize("beam_size", [1, 3])
def test_translations_come_back_in_the_order_of_the_sources(model, beam_size):
    sources = [source for source, _ in PAIRS]
    settings = {"bos_id": 1, "eos_id": 2, "max_length": 6, "beam_size": beam_size}
    together = translate(model, sources, batch_size=2, **settings)
    alone = [translate(model, [source], **settings)[0] for source in sources]
    assert together == alone
    assert len({tuple(target) for target in together}) > 1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_of_the_course_is_valid(path):
    run = load_translation_run(path)
    tokenizer = type("Vocabulary", (), {"vocab_size": run.task.vocab_size, "special_tokens": {"<pad>": 0}})
    assert run.model_config(tokenizer).d_model == run.model["d_model"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("translation.label_smoothing=1.5", "label_smoothing is 1.5; it must be from 0.0 to 0.99"),
        ("data.corpus=wmt15", "corpus is 'wmt15'; choose one of multi30k, wmt14"),
        ("translation.beam=4", "unknown key beam; did you mean beam_size"),
        ("model.vocab_size=100", "model.vocab_size is decided by the vocabulary"),
        ("data.beam_size=2", "beam_size stands in data and in translation"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_is_allowed(setting, message):
    with pytest.raises(CourseError, match=message):
        load_translation_run(CONFIGS[0], [setting])


def test_other_sentences_get_a_vocabulary_of_their_own(corpus):
    task = load_translation_run(CONFIGS[0], ["data.vocab_size=300"]).task
    first = translation_data(task)
    lines = [json.dumps({"en": text, "de": "zwölf Boxkämpfer"}) + "\n" for text in ("one", "two")]
    (corpus / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    assert translation_data(task).tokenizer.fingerprint() != first.tokenizer.fingerprint()


@pytest.mark.parametrize("split", ["training", "validation"])
def test_a_part_without_a_pair_that_is_short_enough_is_named(corpus, split):
    long = json.dumps({"en": "word " * 30, "de": "Wort " * 30}) + "\n"
    (corpus / ("train.jsonl" if split == "training" else "val.jsonl")).write_text(long, encoding="utf-8")
    task = load_translation_run(CONFIGS[0], ["data.vocab_size=260", "data.longest=40"]).task
    with pytest.raises(CourseError, match=f"No {split} pair has 40 tokens or fewer"):
        translation_data(task)


def test_what_decides_the_training_is_told_from_how_it_decodes():
    run = load_translation_run(CONFIGS[0])
    assert load_translation_run(CONFIGS[0], ["translation.beam_size=9"]).data() == run.data()
    assert load_translation_run(CONFIGS[0], ["translation.label_smoothing=0.2"]).data() != run.data()


def test_too_few_positions_are_refused():
    run = load_translation_run(CONFIGS[0], ["model.max_length=100"])
    tokenizer = type("Vocabulary", (), {"vocab_size": 300, "special_tokens": {"<pad>": 0}})
    with pytest.raises(CourseError, match=r"model\.max_length is 100; it must be at least .* 178"):
        run.model_config(tokenizer)
