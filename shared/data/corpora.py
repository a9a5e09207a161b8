"""The course's corpora by name: real text, most of it already on the reader's machine.

| name | what | where from |
|---|---|---|
| `python-docs` | docstrings and the language reference | the installed Python environment |
| `python-code` | the sources of the same packages, streamed | the installed Python environment |
| `dates` | dates in 43 locales and in ISO 8601 | Babel's CLDR |
| `shakespeare` | tiny Shakespeare | `COURSE_DATA`, else a download |
| `stories` | a dozen short stories written for the course | `shared/data/samples` |
| `text` | a file or folder of the reader's own | `path=` |
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shared.data.preprocessing import split_groups
from shared.data.sources.dates import DatePair, date_pairs, date_tokenizer, encode_dates
from shared.runtime import artifacts, files
from shared.runtime.errors import CourseError

__all__ = ["Corpus", "DatePair", "Document", "date_pairs", "date_tokenizer", "encode_dates", "load"]

NAMES = ("python-docs", "python-code", "dates", "shakespeare", "stories", "text")
SEPARATOR = "\n\n"
_FORMAT = 1  # of the records; part of the artefact's key


@dataclass(frozen=True, slots=True)
class Document:
    """One text and where it comes from.

    Attributes:
        id: unique in its corpus, "os.path.join" or a file's name.
        kind: module, class, function or topic; date; text.
        signature: of a function or class; of a date, its locale and format.
        text: never empty.
        package, version, license: what it belongs to.
    """

    id: str
    kind: str
    signature: str
    text: str
    package: str
    version: str
    license: str


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, and what is known of them.

    Attributes:
        name: one of `NAMES`.
        manifest: documents, bytes (UTF-8), licences, sha256, and more for some corpora.
        documents: a list, or for `python-code` something that can be iterated over again and again.
        split_by: how `split` divides them unless told otherwise.
    """

    name: str
    manifest: dict[str, Any]
    documents: Iterable[Document]
    split_by: str

    def text(self) -> str:
        """All texts in one, with an empty line between two documents."""
        return SEPARATOR.join(document.text for document in self.documents)

    def split(self, validation: float = 0.1, by: str | None = None) -> tuple[list[Document], list[Document]]:
        """Divide into training and validation documents, in the corpus's order, always the same.

        Args:
            validation: share of the text that is held out.
            by: "package" holds out whole packages, chosen by hash, so that nothing of them is seen in
                training; "document" chooses single documents by hash; "position" takes the end of the text,
                cutting one document in two, as nanoGPT does.

        Raises:
            CourseError: no package or document is small enough to be held out.
        """
        if not 0 < validation < 1:
            raise ValueError(f"validation must be a share between 0 and 1, not {validation}")
        by = by or self.split_by
        if by == "position":
            return _split_by_position(list(self.documents), validation)
        if by not in ("package", "document"):
            raise ValueError(f"by {by!r} is not 'package', 'document' or 'position'")
        documents = list(self.documents)
        sizes: dict[str, int] = {}
        for document in documents:
            key = document.package if by == "package" else document.id
            sizes[key] = sizes.get(key, 0) + len(document.text.encode())
        held_out = split_groups(sizes, validation)
        parts: tuple[list[Document], list[Document]] = ([], [])
        for document in documents:
            parts[(document.package if by == "package" else document.id) in held_out].append(document)
        return parts


def load(name: str, **options: Any) -> Corpus:
    """A corpus by name.

    `python-docs` is read from the environment the first time, in about half a minute, and kept under
    `artifacts/corpora`; it is the same wherever the same versions of Python and the packages are installed.

    Args:
        name: one of `NAMES`.
        options: for "text", `path`, a `.txt` file or a folder; for "dates", `split`, `count` and `seed` as in
            `date_pairs`.

    Raises:
        CourseError: no such corpus, or its text is not there, not UTF-8 or empty.
    """
    if name not in _LOADERS:
        raise CourseError(f"There is no corpus {name!r}; the course has {', '.join(NAMES)}.")
    return _LOADERS[name](**options)


def python_docs_settings() -> dict[str, Any]:
    """What `configs/data/python-docs.yaml` says: packages and patterns to leave out."""
    import yaml

    path = files.repository_root() / "configs" / "data" / "python-docs.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _python_docs() -> Corpus:
    from shared.data.sources import python_docs

    path = artifacts.build(
        "corpora/python-docs",
        _python_key(),
        lambda folder: _counts(python_docs.write_documents(folder, _python_packages())),
    )
    with open(path / "documents.jsonl", encoding="utf-8") as file:
        documents = [Document(**json.loads(line)) for line in file]
    return Corpus("python-docs", _manifest(path), documents, split_by="package")


def _python_code() -> Corpus:
    from shared.data.sources import python_docs

    packages = _python_packages()
    path = artifacts.build(
        "corpora/python-code",
        _python_key(),
        lambda folder: _counts(python_docs.write_code_manifest(folder, packages)),
    )
    return Corpus("python-code", _manifest(path), _Sources(packages), split_by="package")


class _Sources:
    """The sources of packages as documents, read from disk at every iteration, never all in memory."""

    def __init__(self, packages: Sequence[Any]):
        self._packages = packages

    def __iter__(self) -> Iterator[Document]:
        from shared.data.sources.python_docs import read_source

        for package in self._packages:
            for source in package.sources:
                text = read_source(source)
                if text is not None:
                    yield Document(
                        source.module, "module", "", text, package.name, package.version, package.license
                    )


def _python_key() -> dict[str, Any]:
    """Everything that decides what the packages' documentation is."""
    from shared.data.sources.python_docs import installed_versions

    settings = python_docs_settings()
    versions = installed_versions(settings["packages"])
    return {"format": _FORMAT, "versions": versions, "exclude": settings["exclude"]}


def _python_packages() -> list[Any]:
    from shared.data.sources.python_docs import selected_packages

    return selected_packages(python_docs_settings())


def _counts(manifest: dict[str, Any]) -> dict[str, Any]:
    return {key: manifest[key] for key in ("documents", "bytes", "sha256")}


def _manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / "manifest.json").read_text(encoding="utf-8"))


def _dates(split: str = "train", count: int = 10_000, seed: int = 0) -> Corpus:
    import babel

    licence = "BSD-3-Clause AND Unicode-3.0"
    documents = [
        Document(
            f"{split}/{number}",
            "date",
            f"{pair.locale} {pair.format}",
            f"{pair.source}\t{pair.target}",
            "babel",
            babel.__version__,
            licence,
        )
        for number, pair in enumerate(date_pairs(split, count, seed))
    ]
    return _in_memory("dates", documents, split_by="document")


def _shakespeare() -> Corpus:
    from shared.data.sources import text

    content = text.read_utf8(text.shakespeare_path())
    document = Document("tinyshakespeare", "text", "", content, "tinyshakespeare", "", "public domain")
    return _in_memory("shakespeare", [document], split_by="position")


def _stories() -> Corpus:
    from shared.data.sources.text import read_texts

    folder = Path(__file__).parent / "samples"
    documents = [
        Document(name, "text", "", text, "stories", "", "CC0-1.0") for name, text in read_texts(folder)
    ]
    return _in_memory("stories", documents, split_by="position")


def _own_text(path: Path | str = "") -> Corpus:
    from shared.data.sources.text import read_texts

    if not path:
        raise CourseError("Corpus 'text' needs a path: name a .txt file or a folder of them (data.path=…).")
    documents = [
        Document(name, "text", "", text, "text", "", "the reader's own") for name, text in read_texts(path)
    ]
    if sum(len(document.text.strip()) for document in documents) < 2:
        raise CourseError(f"{path} holds a single character, too little to learn from; use a longer text.")
    return _in_memory("text", documents, split_by="position")


def _in_memory(name: str, documents: list[Document], split_by: str) -> Corpus:
    digest = hashlib.sha256()
    licences: dict[str, int] = {}
    for document in documents:
        digest.update(document.text.encode() + b"\0")
        licences[document.license] = licences.get(document.license, 0) + 1
    manifest = {
        "name": name,
        "documents": len(documents),
        "bytes": sum(len(document.text.encode()) for document in documents),
        "licences": licences,
        "sha256": digest.hexdigest(),
    }
    return Corpus(name, manifest, documents, split_by)


def _split_by_position(documents: list[Document], validation: float) -> tuple[list[Document], list[Document]]:
    total = sum(len(document.text) for document in documents)
    room = int(total * (1 - validation))  # characters left for training
    parts: tuple[list[Document], list[Document]] = ([], [])
    for document in documents:
        head, tail = document.text[:room], document.text[room:]
        room = max(0, room - len(document.text))
        for part, piece in zip(parts, (head, tail), strict=True):
            if piece:
                part.append(replace(document, text=piece))
    return parts


_LOADERS = {
    "python-docs": _python_docs,
    "python-code": _python_code,
    "dates": _dates,
    "shakespeare": _shakespeare,
    "stories": _stories,
    "text": _own_text,
}
