"""Dates as people write them in 43 locales, and in ISO 8601, from Babel's copy of the Unicode CLDR."""

import datetime
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml

from shared.data.preprocessing import hash_fraction
from shared.data.tokenizers import UNKNOWN, CharTokenizer
from shared.runtime import files

PAD, BEGIN, END = "<pad>", "<bos>", "<eos>"
SPLITS = ("train", "held-out dates", "held-out formats")


@dataclass(frozen=True, slots=True)
class DatePair:
    """A date as it is written somewhere, and what it means.

    Attributes:
        source: such as "12. März 2021".
        target: ISO 8601, "2021-03-12".
        locale: CLDR's name, "de".
        format: one of CLDR's lengths or a skeleton, "long".
        held_out: "" in training, "date" or "format" for what training never sees.
    """

    source: str
    target: str
    locale: str
    format: str
    held_out: str


@cache
def settings() -> dict[str, Any]:
    """What `configs/data/dates.yaml` says."""
    path = files.repository_root() / "configs" / "data" / "dates.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def date_pairs(split: str, count: int, seed: int = 0) -> list[DatePair]:
    """Draw pairs, uniformly over locales, formats and days.

    One tenth of the days, chosen by hash, is in no training pair of any locale: "held-out dates" draws from
    these. "held-out formats" draws known days in formats that are in no training pair.

    Args:
        split: "train", "held-out dates" or "held-out formats".
        count: how many.
        seed: the same seed gives the same pairs.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    chosen = settings()
    names = chosen["held_out_formats" if split == "held-out formats" else "formats"]
    days = _days(held_out=split == "held-out dates")
    writers = [
        (locale, name, write) for locale in chosen["locales"] for name, write in _writers(locale, names)
    ]
    held_out = {"train": "", "held-out dates": "date", "held-out formats": "format"}[split]
    draw = random.Random(f"{split} {seed}")
    pairs = []
    for _ in range(count):
        locale, name, write = draw.choice(writers)
        day = draw.choice(days)
        pairs.append(DatePair(write(day), day.isoformat(), locale, name, held_out))
    return pairs


def date_tokenizer() -> CharTokenizer:
    """The characters of every locale and format, after "<pad>" (id 0), "<bos>", "<eos>", "<unk>" and a token
    for each locale."""
    chosen = settings()
    names = chosen["formats"] + chosen["held_out_formats"]
    year = chosen["last"].year
    # Every month's name, every weekday's name and, in the ISO dates, every digit.
    days = [datetime.date(year, month, day) for month in range(1, 13) for day in range(1, 8)]
    characters = {
        character
        for locale in chosen["locales"]
        for _, write in _writers(locale, names)
        for day in days
        for character in write(day)
    }
    special = [PAD, BEGIN, END, UNKNOWN, *[locale_token(locale) for locale in chosen["locales"]]]
    return CharTokenizer(sorted(characters | set("0123456789-")), special)


def locale_token(locale: str) -> str:
    """The special token that names a locale, such as "<de>"."""
    return f"<{locale}>"


def encode_dates(pairs: Sequence[DatePair], tokenizer: CharTokenizer) -> list[tuple[list[int], list[int]]]:
    """Ids for the encoder (locale, characters, "<eos>") and the decoder ("<bos>", ISO date, "<eos>").

    The locale comes first because 04/03/21 cannot be read without it.
    """
    begin, end = tokenizer.special_tokens[BEGIN], tokenizer.special_tokens[END]
    return [
        (
            [tokenizer.special_tokens[locale_token(pair.locale)], *tokenizer.encode(pair.source), end],
            [begin, *tokenizer.encode(pair.target), end],
        )
        for pair in pairs
    ]


@cache
def _days(held_out: bool) -> list[datetime.date]:
    chosen = settings()
    first, last, share = chosen["first"], chosen["last"], chosen["held_out_days"]
    days = (first + datetime.timedelta(n) for n in range((last - first).days + 1))
    return [day for day in days if (hash_fraction(day.isoformat()) < share) == held_out]


def _writers(locale: str, names: Sequence[str]) -> list[tuple[str, Callable[[datetime.date], str]]]:
    """The formats among `names` that the locale has and that say year, month and day."""
    from babel import Locale

    data = Locale.parse(locale)
    writers = []
    for name in names:
        pattern = data.date_formats.get(name) or data.datetime_skeletons.get(name)
        if pattern is not None and _says_everything(pattern.pattern):
            writers.append((name, lambda day, pattern=pattern: pattern.apply(day, data)))
    return writers


def _says_everything(pattern: str) -> bool:
    """Whether a CLDR pattern has fields for year, month and day; text between apostrophes is no field."""
    fields = set("".join(pattern.split("'")[::2]))
    return "y" in fields and bool(fields & {"M", "L"}) and "d" in fields
