"""Sentence pairs for machine translation: Multi30k and WMT14, from $COURSE_DATA or through `datasets`.

| name | what | source |
|---|---|---|
| `multi30k` | 29,000 captions of photographs | Elliott et al. 2016 |
| `wmt14` | 4.5 million sentences of parliament, news and web pages | Bojar et al. 2014 |

A folder of that name in $COURSE_DATA is looked in first: files `train*`, `val*` and `test*` in the layout of
the public repository, `.jsonl`, `.json` or `.parquet`, also in folders inside it. A row is
{"en": …, "de": …} or, in WMT14, {"translation": {"en": …, "de": …}}.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shared.runtime import artifacts
from shared.runtime.errors import CourseError

REPOSITORIES = {"multi30k": ("bentrevett/multi30k", None), "wmt14": ("wmt/wmt14", "de-en")}
NAMES = tuple(REPOSITORIES)
SPLITS = {"train": "train", "validation": "val", "test": "test"}  # and how their files' names begin
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def sentence_pairs(
    name: str, split: str, source: str = "en", target: str = "de", limit: int | None = None
) -> list[tuple[str, str]]:
    """The pairs of a split, in the corpus's order; pairs with an empty side are left out.

    Args:
        name: "multi30k" or "wmt14".
        split: "train", "validation" or "test".
        source, target: languages, "en" and "de" either way round.
        limit: at most so many pairs, the first ones.

    Raises:
        CourseError: the corpus is in neither place, cannot be read, or does not have these languages.
    """
    if name not in REPOSITORIES:
        raise CourseError(f"There is no translation corpus {name!r}; choose one of {', '.join(NAMES)}.")
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    pairs = []
    for pair in _pairs(_rows(name, split), source, target, name):
        if len(pairs) == limit:
            break
        pairs.append(pair)
    if not pairs:
        raise CourseError(f"The {split} part of {name} holds no pair of sentences; check its files.")
    return pairs


def _pairs(
    rows: Iterable[Mapping[str, Any]], source: str, target: str, name: str
) -> Iterator[tuple[str, str]]:
    for row in rows:
        languages = row.get("translation") or row
        if source not in languages or target not in languages:
            known = ", ".join(str(key) for key in languages)
            raise CourseError(f"{name} has no sentences in {source!r} and {target!r}; its rows hold {known}.")
        one, other = (str(languages[language] or "").strip() for language in (source, target))
        if one and other:
            yield one, other


def _rows(name: str, split: str) -> Iterable[Mapping[str, Any]]:
    """The rows of a split as `datasets` yields them; the library is kept quiet."""
    import datasets

    files = _local_files(name, split)
    repository, configuration = REPOSITORIES[name]
    folder = str(artifacts.home() / "downloads" / "datasets")
    datasets.disable_progress_bars()
    try:
        if files:
            reader = READERS[Path(files[0]).suffix]
            return datasets.load_dataset(reader, data_files=files, split="train", cache_dir=folder)
        return datasets.load_dataset(repository, configuration, split=split, cache_dir=folder)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise CourseError(_advice(name, repository, files, error)) from error
    finally:
        datasets.enable_progress_bars()


def _local_files(name: str, split: str) -> list[str]:
    """The files of a split in $COURSE_DATA/NAME, in alphabetical order; none if there is no such folder.

    Raises:
        CourseError: the folder is there and has no file for the split, or files of several kinds.
    """
    if not (root := os.environ.get("COURSE_DATA")):
        return []
    folder = Path(root).expanduser() / name
    if not folder.is_dir():
        return []
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in READERS and path.is_file() and path.name.startswith(SPLITS[split])
    )
    kinds = {READERS[path.suffix] for path in files}
    if len(kinds) != 1:
        found = "files of several kinds" if kinds else "no file"
        raise CourseError(
            f"{folder} has {found} for the {split} part; it needs {SPLITS[split]}*.jsonl or .parquet."
        )
    return [str(path) for path in files]


def _advice(name: str, repository: str, files: list[str], error: Exception) -> str:
    if files:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"{files[0]} could not be read ({reason}); fetch it again from {repository}."
    return (
        f"The corpus {name} is not on this machine and could not be downloaded ({type(error).__name__}): put "
        f"the files of huggingface.co/datasets/{repository} into a folder {name} and name the folder that "
        "holds it in COURSE_DATA."
    )
