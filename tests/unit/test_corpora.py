"""Corpora: what is in them, that it is the same every time, and what bad input is answered with."""

import json
import sys
import types
from pathlib import Path, PurePosixPath

import pytest

from shared.data import corpora
from shared.data.sources import dates, python_docs, text
from shared.runtime import files
from shared.runtime.errors import CourseError


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty place for artefacts and downloads."""
    monkeypatch.setenv("COURSE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("COURSE_DATA", raising=False)
    return tmp_path / "home"


def test_an_unknown_corpus_is_refused_with_the_names_of_the_known():
    with pytest.raises(CourseError, match=r"no corpus 'wikitext'.*python-docs"):
        corpora.load("wikitext")


# ------------------------------------------------------------------------------------------------------ dates


def test_held_out_days_are_in_no_training_pair_and_formats_neither():
    train = corpora.date_pairs("train", 5000)
    new_days = corpora.date_pairs("held-out dates", 2000)
    new_formats = corpora.date_pairs("held-out formats", 2000)
    assert not {pair.target for pair in train} & {pair.target for pair in new_days}
    assert not {pair.format for pair in train} & {pair.format for pair in new_formats}
    assert {pair.held_out for pair in train} == {""}
    assert {pair.held_out for pair in new_days} == {"date"}
    assert {pair.held_out for pair in new_formats} == {"format"}
    assert len({pair.target for pair in new_days}) > 1000


def test_about_a_tenth_of_the_days_is_held_out():
    kept, held_out = dates._days(held_out=False), dates._days(held_out=True)
    assert len(kept) + len(held_out) == 29_220  # 80 years
    assert 0.09 < len(held_out) / 29_220 < 0.11


def test_the_same_seed_draws_the_same_pairs():
    assert corpora.date_pairs("train", 50, seed=3) == corpora.date_pairs("train", 50, seed=3)
    assert corpora.date_pairs("train", 50, seed=3) != corpora.date_pairs("train", 50, seed=4)


def test_every_locale_comes_with_every_length():
    pairs = corpora.date_pairs("train", 20_000)
    chosen = dates.settings()
    seen = {(pair.locale, pair.format) for pair in pairs}
    assert len(chosen["locales"]) == 43
    for locale in chosen["locales"]:
        assert {"short", "medium", "long", "full"} <= {name for where, name in seen if where == locale}


def test_a_source_in_its_locale_means_one_date():
    meaning = {}
    for pair in corpora.date_pairs("train", 40_000) + corpora.date_pairs("held-out formats", 10_000):
        assert meaning.setdefault((pair.locale, pair.source), pair.target) == pair.target


def test_a_format_without_year_month_or_day_is_not_used():
    assert dates._says_everything("d. MMMM y")
    assert not dates._says_everything("MMMM y")
    assert not dates._says_everything("d. MMMM")
    assert not dates._says_everything("d 'May' y")  # letters between apostrophes are text


def test_dates_read_as_people_write_them():
    seen = {
        (pair.locale, pair.format, pair.target): pair.source for pair in corpora.date_pairs("train", 60_000)
    }
    checked = 0
    for (locale, name, target), source in seen.items():
        year, month, day = target.split("-")
        if (locale, name) == ("de", "short"):
            assert source == f"{day}.{month}.{year[2:]}"
        elif (locale, name) == ("en_US", "yMd"):
            assert source == f"{int(month)}/{int(day)}/{year}"
        elif (locale, name) == ("ja", "long"):
            assert source == f"{year}年{int(month)}月{int(day)}日"
        else:
            continue
        checked += 1
    assert checked > 100


def test_dates_are_encoded_without_unknown_characters_and_with_the_locale_first():
    tokenizer = corpora.date_tokenizer()
    pairs = [pair for split in dates.SPLITS for pair in corpora.date_pairs(split, 3000)]
    encoded = corpora.encode_dates(pairs, tokenizer)
    assert tokenizer.special_tokens["<pad>"] == 0
    for pair, (source, target) in zip(pairs, encoded, strict=True):
        assert tokenizer.decode(source) == f"<{pair.locale}>{pair.source}<eos>"
        assert tokenizer.decode(target) == f"<bos>{pair.target}<eos>"


def test_the_corpus_of_dates_holds_the_pairs():
    corpus = corpora.load("dates", count=100, seed=1)
    pairs = corpora.date_pairs("train", 100, seed=1)
    assert [document.text for document in corpus.documents] == [
        f"{pair.source}\t{pair.target}" for pair in pairs
    ]
    assert corpus.manifest["documents"] == 100


# ------------------------------------------------------------------------------------------- stories and text


def test_a_dozen_stories_come_with_the_course():
    corpus = corpora.load("stories")
    documents = list(corpus.documents)
    assert len(documents) == 12
    assert corpus.manifest["licences"] == {"CC0-1.0": 12}
    assert all(250 <= len(document.text.split()) <= 400 for document in documents)
    assert len({document.id for document in documents}) == 12


def test_a_split_by_position_cuts_the_text_where_nanogpt_does():
    corpus = corpora.load("stories")
    train, validation = corpus.split()
    whole = "".join(document.text for document in corpus.documents)
    joined = ["".join(document.text for document in part) for part in (train, validation)]
    assert joined == [whole[: int(0.9 * len(whole))], whole[int(0.9 * len(whole)) :]]


def test_splits_by_document_and_package_keep_all_documents_once():
    corpus = corpora.load("dates", count=500)
    train, validation = corpus.split(0.2, by="document")
    assert len(train) + len(validation) == 500
    assert not {document.id for document in train} & {document.id for document in validation}
    size = sum(len(document.text.encode()) for document in validation)
    assert 0.19 < size / corpus.manifest["bytes"] <= 0.2
    assert corpus.split(0.2, by="document") == (train, validation)
    with pytest.raises(ValueError, match="'colour'"):
        corpus.split(by="colour")
    with pytest.raises(ValueError, match="between 0 and 1"):
        corpus.split(validation=1.0)


def test_a_folder_of_texts_is_read_in_order_with_the_folders_in_it(tmp_path):
    (tmp_path / "b.txt").write_bytes("\ufeffzwei\r\nZeilen".encode())
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "deep.TXT").write_text("deep")
    (tmp_path / "notes.md").write_text("not read")
    (tmp_path / "blank.txt").write_text(" \n")
    corpus = corpora.load("text", path=tmp_path)
    assert [(document.id, document.text) for document in corpus.documents] == [
        ("a/deep.TXT", "deep"),
        ("b.txt", "zwei\nZeilen"),
    ]
    assert corpus.text() == "deep\n\nzwei\nZeilen"
    assert corpora.load("text", path=str(tmp_path / "b.txt")).documents[0].text == "zwei\nZeilen"


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    (outside / "secret.txt").write_text("secret")
    (inside / "story.txt").write_text("a story")
    (inside / "again.txt").symlink_to(inside / "story.txt")
    (inside / "file.txt").symlink_to(outside / "secret.txt")
    (inside / "folder").symlink_to(outside)
    (inside / "loop").symlink_to(inside)
    (inside / "gone.txt").symlink_to(inside / "nowhere")
    corpus = corpora.load("text", path=inside)
    assert [document.id for document in corpus.documents] == ["again.txt", "story.txt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"good\nb\xe4d", r"story\.txt is not UTF-8 at byte 6 \(0xe4\)"),
        (b"", "holds no text"),
        (b" \n\t", "holds no text"),
        ("\ufeff".encode(), "holds no text"),
        (b"a", "single character"),
        (b" a\n", "single character"),
    ],
)
@pytest.mark.parametrize("folder", [False, True])
def test_text_that_cannot_be_used_is_named(tmp_path, content, message, folder):
    (tmp_path / "story.txt").write_bytes(content)
    with pytest.raises(CourseError, match=message):
        corpora.load("text", path=tmp_path if folder else tmp_path / "story.txt")


def test_a_path_without_texts_is_refused(tmp_path):
    with pytest.raises(CourseError, match="does not exist"):
        corpora.load("text", path=tmp_path / "missing")
    with pytest.raises(CourseError, match=r"no \.txt file"):
        corpora.load("text", path=tmp_path)


# ------------------------------------------------------------------------------------------------ Shakespeare


@pytest.fixture
def small_shakespeare(monkeypatch):
    content = "First Citizen:\nBefore we proceed any further, hear me speak.\n"
    monkeypatch.setattr(text, "SHAKESPEARE_SHA256", files.sha256_bytes(content.encode()))
    return content


@pytest.mark.parametrize("name", ["tinyshakespeare.txt", "input.txt"])
def test_shakespeare_is_taken_from_course_data(tmp_path, home, monkeypatch, small_shakespeare, name):
    (tmp_path / name).write_text(small_shakespeare)
    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    corpus = corpora.load("shakespeare")
    assert corpus.text() == small_shakespeare
    train, validation = corpus.split()
    assert len(train[0].text) == int(0.9 * len(small_shakespeare))
    assert train[0].text + validation[0].text == small_shakespeare


def test_what_was_downloaded_before_is_used_without_network(home, small_shakespeare):
    files.atomic_write(home / "downloads" / "tinyshakespeare.txt", small_shakespeare)
    assert corpora.load("shakespeare").text() == small_shakespeare


def test_another_text_under_that_name_is_refused(tmp_path, home, monkeypatch):
    (tmp_path / "tinyshakespeare.txt").write_text("something else")
    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    with pytest.raises(CourseError, match=r"tinyshakespeare\.txt is not tiny Shakespeare"):
        corpora.load("shakespeare")


def test_offline_shakespeare_fails_at_once_and_says_what_to_do(home, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CourseError, match=r"HF_HUB_OFFLINE is set: put https.*COURSE_DATA"):
        corpora.load("shakespeare")


def test_without_network_the_download_fails_in_one_sentence(home, monkeypatch):
    import pooch

    def no_network(*arguments, **options):
        raise ConnectionError("no route to host")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(pooch, "retrieve", no_network)
    with pytest.raises(
        CourseError, match=r"could not be downloaded \(ConnectionError\): put https.*COURSE_DATA"
    ):
        corpora.load("shakespeare")


def test_the_download_asks_for_the_right_file_with_its_checksum(home, monkeypatch, small_shakespeare):
    import pooch

    asked = {}

    def retrieve(url, known_hash, fname, path, downloader):
        asked.update(url=url, known_hash=known_hash)
        (Path(path) / fname).write_text(small_shakespeare)

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(pooch, "retrieve", retrieve)
    assert corpora.load("shakespeare").text() == small_shakespeare
    assert asked == {"url": text.SHAKESPEARE_URL, "known_hash": f"sha256:{text.SHAKESPEARE_SHA256}"}


# ------------------------------------------------------------------------------------ Python's documentation

SOURCE = '''
"""The module."""

class Outer(Base, metaclass=Meta):
    """The outer class."""

    def method(self, x: int = 1, *, flag=False) -> str:
        """Does something.

        Example:
            indented
        """
        def inner():
            """Cannot be imported."""

    class Inner:
        """The inner class."""

    @property
    def value(self):
        """Get."""

    @value.setter
    def value(self, new):
        """Set."""

if True:
    async def late():
        """Under an if."""
else:
    def other():
        """Under an else."""

try:
    pass
except ImportError:
    def fallback():
        """Under an except."""

def bare():
    return 1

def twin():
    """The module."""
'''


def test_docstrings_are_read_with_their_names_kinds_and_signatures():
    records = list(python_docs.parse_docstrings(SOURCE, "pkg.mod"))
    assert [(record["id"], record["kind"], record["signature"]) for record in records] == [
        ("pkg.mod", "module", ""),
        ("pkg.mod.Outer", "class", "Outer(Base, metaclass=Meta)"),
        ("pkg.mod.Outer.method", "function", "method(self, x: int=1, *, flag=False) -> str"),
        ("pkg.mod.Outer.Inner", "class", "Inner"),
        ("pkg.mod.Outer.value", "function", "value(self)"),
        ("pkg.mod.Outer.value", "function", "value(self, new)"),
        ("pkg.mod.late", "function", "async late()"),
        ("pkg.mod.other", "function", "other()"),
        ("pkg.mod.fallback", "function", "fallback()"),
        ("pkg.mod.twin", "function", "twin()"),
    ]
    assert records[2]["text"] == "Does something.\n\nExample:\n    indented"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("torch/nn/__init__.py", "torch.nn"),
        ("six.py", "six"),
        ("posixpath.py", "os.path"),
        ("pkg/data-files/x.py", ""),
        ("../../bin/tool.py", ""),
    ],
)
def test_a_file_is_called_what_it_is_imported_as(path, name):
    assert python_docs.module_name(PurePosixPath(path)) == name


def test_modules_written_in_c_are_asked_for_their_docstrings():
    import zlib

    records = {record["id"]: record for record in python_docs.inspect_docstrings(zlib)}
    assert records["zlib"]["kind"] == "module"
    assert records["zlib.crc32"]["kind"] == "function"
    assert records["zlib.crc32"]["signature"] == "crc32(data, value=0, /)"
    assert "checksum" in records["zlib.crc32"]["text"]
    built_in = {record["id"] for record in python_docs.inspect_docstrings(sys.modules["builtins"])}
    assert {"str.join", "len", "ZeroDivisionError"} <= built_in
    assert "str.__eq__" not in built_in


def test_what_a_module_imports_is_not_its_own():
    module = types.ModuleType("sample", "A sample.")
    module.path = Path
    assert [record["id"] for record in python_docs.inspect_docstrings(module)] == ["sample"]


def test_compiled_modules_are_found_and_none_of_those_that_do_something_when_imported():
    names = python_docs.compiled_modules()
    assert {"builtins", "sys", "math", "zlib"} <= set(names)
    assert not {"antigravity", "this", "json", "_testcapi"} & set(names)


def test_the_language_reference_is_there():
    topics = {record["id"]: record for record in python_docs.language_reference()}
    assert topics["help.lambda"]["kind"] == "topic"
    assert "anonymous function" in topics["help.lambda"]["text"]


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder like site-packages, with two small distributions in it."""
    site = tmp_path / "site"
    sources = {
        "alpha": {
            "alpha/__init__.py": SOURCE,
            "alpha/tests/test_it.py": '"""A test."""',
            "alpha/old.py": "print 1",
        },
        "beta": {
            "beta.py": '"""The module."""\ndef f():\n    "Beta\'s f: \\ud800."\n',
            "beta/internal/x.py": '"""X."""',
        },
    }
    metadata = {
        "alpha": "License-Expression: MIT",
        "beta": "License: BSD\nClassifier: License :: OSI Approved :: BSD License",
    }
    for name, contents in sources.items():
        info = f"{name}-1.2+local.dist-info"
        contents[f"{info}/METADATA"] = (
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2+local\n{metadata[name]}\n"
        )
        contents[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in sorted(contents, reverse=True))
        for path, content in contents.items():
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            (site / path).write_text(content)
    monkeypatch.syspath_prepend(str(site))
    return site


def test_a_package_is_read_without_what_is_excluded(site):
    package = python_docs.installed_package("alpha", ["tests"])
    assert (package.version, package.license) == ("1.2", "MIT")
    assert [source.module for source in package.sources] == ["alpha", "alpha.old"]
    beta = python_docs.installed_package("beta", ["beta/internal"])
    assert [source.module for source in beta.sources] == ["beta"]
    assert beta.license == "BSD License"


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(CourseError, match=r"package no-such-package, .*make setup"):
        python_docs.installed_package("no-such-package", [])


def _read_all(folder: Path, order=("alpha", "beta")) -> tuple[dict, list[dict]]:
    folder.mkdir()
    packages = [python_docs.installed_package(name, ["tests"]) for name in order]
    manifest = python_docs.write_documents(folder, packages)
    lines = (folder / "documents.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads((folder / "manifest.json").read_text(encoding="utf-8")) == manifest
    return manifest, [json.loads(line) for line in lines]


def test_documents_come_in_a_fixed_order_once_each_with_a_manifest(site, tmp_path):
    manifest, documents = _read_all(tmp_path / "one")
    again, _ = _read_all(tmp_path / "two")
    assert again == manifest
    assert [document["id"] for document in documents] == [
        *("alpha", "alpha.Outer", "alpha.Outer.method", "alpha.Outer.Inner", "alpha.Outer.value"),
        *("alpha.Outer.value#2", "alpha.late", "alpha.other", "alpha.fallback", "beta.internal.x", "beta.f"),
    ]
    assert documents[-1]["text"] == "Beta's f: ?."  # half a surrogate pair cannot be written
    assert set(documents[0]) == {"id", "kind", "signature", "text", "package", "version", "license"}
    assert (documents[0]["package"], documents[-1]["license"]) == ("alpha", "BSD License")
    assert manifest["documents"] == 11
    assert manifest["bytes"] == sum(len(document["text"].encode()) for document in documents)
    assert manifest["duplicates_left_out"] == 2  # alpha.twin and beta say "The module." again
    assert manifest["unreadable_files"] == 1  # alpha/old.py is Python 2
    assert manifest["licences"] == {"MIT": 9, "BSD License": 2}
    assert [row["documents"] for row in manifest["packages"]] == [9, 2]
    assert manifest["sha256"] == files.sha256_file(tmp_path / "one" / "documents.jsonl")
    assert not any(str(tmp_path) in json.dumps(document) for document in documents)


def test_other_packages_make_another_corpus(site, tmp_path):
    assert (
        _read_all(tmp_path / "one")[0]["sha256"]
        != _read_all(tmp_path / "two", ("beta", "alpha"))[0]["sha256"]
    )


def test_the_corpus_is_built_once_and_again_when_a_version_changes(site, home, monkeypatch):
    settings = {"packages": ["alpha"], "exclude": ["tests"]}
    monkeypatch.setattr(corpora, "python_docs_settings", lambda: settings)
    monkeypatch.setattr(
        python_docs, "standard_library", lambda exclude: python_docs.Package("python", "3", "PSF", ())
    )
    monkeypatch.setattr(python_docs, "compiled_modules", list)
    first = corpora.load("python-docs")
    assert {document.package for document in first.documents} == {"alpha", "python"}
    assert first.manifest["kinds"]["topic"] > 50
    monkeypatch.setattr(python_docs, "write_documents", None)  # would fail if it were called
    assert corpora.load("python-docs") == first
    settings["exclude"] = []
    with pytest.raises(TypeError):
        corpora.load("python-docs")


def test_the_sources_are_streamed_again_and_again(site, home, monkeypatch):
    settings = {"packages": ["alpha", "beta"], "exclude": ["tests"]}
    monkeypatch.setattr(corpora, "python_docs_settings", lambda: settings)
    monkeypatch.setattr(
        python_docs, "standard_library", lambda exclude: python_docs.Package("python", "3", "PSF", ())
    )
    corpus = corpora.load("python-code")
    for _ in range(2):
        assert [document.id for document in corpus.documents] == [
            "alpha",
            "alpha.old",
            "beta.internal.x",
            "beta",
        ]
    assert next(iter(corpus.documents)).text == SOURCE
    assert corpus.manifest["documents"] == 4
    assert corpus.manifest["bytes"] == sum(len(document.text.encode()) for document in corpus.documents)


def test_every_package_that_is_named_is_in_the_lock():
    lock = (
        (files.repository_root() / "requirements.lock").read_text(encoding="utf-8").lower().replace("-", "_")
    )
    locked = {line.split("==")[0] for line in lock.splitlines() if "==" in line}
    named = [name.lower().replace("-", "_") for name in corpora.python_docs_settings()["packages"]]
    assert [name for name in named if name not in locked] == []
    assert len(named) == len(set(named))


@pytest.mark.slow
def test_python_docs_is_the_same_when_it_is_built_again(tmp_path):
    corpus = corpora.load("python-docs")
    packages = python_docs.selected_packages(corpora.python_docs_settings())
    assert python_docs.write_documents(tmp_path, packages) == corpus.manifest
    documents = list(corpus.documents)
    assert 70_000 < len(documents) < 130_000
    assert 30e6 < corpus.manifest["bytes"] < 55e6
    assert len({document.id for document in documents}) == len(documents)
    assert len({document.text for document in documents}) == len(documents)
    here = str(files.repository_root())
    assert not [d.id for d in documents if here in d.text + d.id + d.signature]
    by_id = {document.id: document for document in documents}
    assert by_id["os.path.join"].signature == "join(a, *p)"
    assert by_id["str.join"].package == "python"
    train, validation = corpus.split()
    packages_of = [{document.package for document in part} for part in (train, validation)]
    assert not packages_of[0] & packages_of[1]
    assert len(packages_of[1]) > 10
    share = sum(len(document.text.encode()) for document in validation) / corpus.manifest["bytes"]
    assert 0.09 < share <= 0.1


def test_a_text_of_ones_own_needs_a_path():
    with pytest.raises(CourseError, match="needs a path"):
        corpora.load("text")
