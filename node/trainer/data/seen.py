"""What of each source was seen before, and how it goes on when its files have changed.

A source is known by its text, not by where its files lie or when they were written: by a digest of the ids of
all its windows but the last, in which a text that grows may change a few. So

- the same text goes on exactly where it was, also under another path, name or date;
- text that was added at its end joins the windows of this pass that have not come yet (order.py). What is
  held out stays so, and nothing that was trained on becomes held out (held_out.py);
- of any other text nobody can say which windows were seen. The source of the same name begins a new pass
  then, in another order than before, and one line says so.

A source that is left out for a while is remembered. Files that did not change are not read for this.

Must not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from tapestry.node.spec.data import SOURCES_MAX
from tapestry.node.trainer.data.held_out import held_out_of
from tapestry.node.trainer.data.order import Course

CURSOR_VERSION = 2
CURSOR_BYTES_MAX = 16 << 20
GROWTHS_MAX = 64  # within one pass; each makes a batch 0.6 ms dearer. Guess
COUNT_MAX = 1 << 62  # of windows: what numpy can add


@dataclass(frozen=True, slots=True)
class Text:
    """A source as it is now."""

    name: str
    key: str  # of its file of ids
    windows: int
    holds_out: bool  # whether some of them are held out
    order_key: bytes
    digest_of: Callable[[int], str]  # of the ids of the first so many windows but the last

    @property
    def training_windows(self) -> int:
        """How many are not held out."""
        return self.windows - (len(held_out_of(self.windows)) if self.holds_out else 0)


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of a source: which text it was, and how much of it has come in which order."""

    name: str
    key: str
    windows: int
    digest: str
    holds_out: bool
    course: Course
    count: int = 0  # windows that have come

    def to_plain(self) -> dict[str, Any]:
        """For cursor.json."""
        course = self.course
        return {
            "name": self.name,
            "key": self.key,
            "windows": self.windows,
            "digest": self.digest,
            "holds_out": self.holds_out,
            "order": course.key.decode("utf-8", "surrogateescape"),
            "sizes": [list(one) for one in course.sizes],
            "start": course.start,
            "number": course.number,
            "count": self.count,
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Seen:
        """Raises ValueError, TypeError, LookupError."""
        sizes = tuple((place, count) for place, count in plain["sizes"])
        course = Course(
            str(plain["order"]).encode("utf-8", "surrogateescape"), sizes, plain["start"], plain["number"]
        )
        seen = cls(
            str(plain["name"]),
            str(plain["key"]),
            plain["windows"],
            str(plain["digest"]),
            bool(plain["holds_out"]),
            course,
            plain["count"],
        )
        counts_of((seen.windows, course.start, course.number, seen.count))
        places, counts = zip((-1, 0), *(counts_of(one) for one in sizes), strict=True)
        if places[1] or not _rises(places) or not _rises(counts) or places[-1] >= counts[-1]:
            raise ValueError("no course")
        if len(sizes) > GROWTHS_MAX or seen.count < course.began:
            raise ValueError("no course")
        return seen


@dataclass(frozen=True, slots=True)
class Known:
    """What cursor.json says of sources."""

    sources: tuple[Seen, ...] = ()  # those of then
    absent: tuple[Seen, ...] = ()  # those that were left out then
    damaged: bool = False  # or of another version


@dataclass(frozen=True, slots=True)
class GoneOn:
    """How all sources go on."""

    sources: tuple[Seen, ...]
    absent: tuple[Seen, ...]  # to be remembered
    lines: tuple[str, ...]  # for people: what did not simply go on


def read_cursor(path: Path) -> dict[str, Any]:
    """What the file says; nothing if it is missing or none of ours."""
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(CURSOR_BYTES_MAX))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_known(path: Path | None) -> Known:
    """What cursor.json says of sources; one that is damaged, or of another version, says nothing."""
    if path is None or not path.exists():
        return Known()
    plain = read_cursor(path)
    try:
        if plain["version"] != CURSOR_VERSION:
            raise ValueError("of another version")
        sources, absent = (tuple(map(Seen.from_plain, plain[name])) for name in ("sources", "absent"))
        return Known(sources, absent)
    except (ValueError, TypeError, LookupError, AttributeError):
        return Known(damaged=True)


def counts_of(plain: Iterable[Any]) -> tuple[int, ...]:
    """Raises ValueError for what are no counts."""
    counts = tuple(plain)
    if not all(type(count) is int and 0 <= count < COUNT_MAX for count in counts):
        raise ValueError("not counts")
    return counts


def go_on(known: Known, texts: Sequence[Text]) -> GoneOn:
    """Each text with what is known of it."""

    def moved_and_grown(one: Seen, text: Text) -> bool:
        return one in known.sources and _moved(one, text)  # for each absent one a long text would be read

    left = [*known.sources, *known.absent]
    found: dict[int, tuple[Seen, str]] = {}
    kept = (_same_files, _same_source, _moved_whole, moved_and_grown)
    for matches, goes_on in (*((one, _kept) for one in kept), (_same_name, _anew)):
        for index, text in enumerate(texts):
            one = next((one for one in left if matches(one, text)), None) if index not in found else None
            if one is not None:
                left.remove(one)
                found[index] = goes_on(one, text)
    every = [found.get(index) or (_begun(text), _unknown(known, text)) for index, text in enumerate(texts)]
    lines = tuple(f"data {seen.name}: {line}" for seen, line in every if line)
    return GoneOn(tuple(seen for seen, _ in every), tuple(left[:SOURCES_MAX]), lines)


def _same_text(one: Seen, text: Text) -> bool:
    """Perhaps with more at its end."""
    return one.windows <= text.windows and text.digest_of(one.windows) == one.digest


def _same_files(one: Seen, text: Text) -> bool:
    """Their ids may have been made again, and be others: a program may judge otherwise."""
    return one.key == text.key and _same_text(one, text)


def _same_source(one: Seen, text: Text) -> bool:
    return one.name == text.name and _same_text(one, text)


def _moved(one: Seen, text: Text) -> bool:
    """Under another name. Of a single window there is only one id to know it by."""
    return one.windows > 1 and _same_text(one, text)


def _moved_whole(one: Seen, text: Text) -> bool:
    return one.windows == text.windows and _moved(one, text)


def _same_name(one: Seen, text: Text) -> bool:
    return one.name == text.name


def _kept(one: Seen, text: Text) -> tuple[Seen, str]:
    """The text is the same, or has grown."""
    if one.holds_out != text.holds_out:
        return _anew(one, text, "other windows are held out, for validation sets were given or taken away")
    after = f"it goes on after {one.count} windows"
    course, line = one.course, "" if one.key == text.key else f"the same text in other files; {after}"
    if text.windows > one.windows:
        course = one.course.grown(one.count, text.training_windows)
        line = f"{text.windows - one.windows} windows were added at its end; {after}"
        if len(course.sizes) > GROWTHS_MAX:
            course = one.course.anew(one.count, course.count)
            line = f"it has grown more than {GROWTHS_MAX} times within one pass, and begins another one"
    seen = _of(text, course)
    return replace(seen, count=one.count), line if one.count else ""


def _anew(one: Seen, text: Text, why: str = "its text has changed other than at its end") -> tuple[Seen, str]:
    seen = _of(text, one.course.anew(one.count, text.training_windows))
    return replace(seen, count=one.count), _begins_anew(text, why) if one.count else ""


def _begins_anew(text: Text, why: str) -> str:
    line = f"{why}: its order begins anew, and what was trained on before comes again"
    if not text.holds_out:
        return line
    return f"{line}, also where it is measured; --validation names text that is measured and never trained on"


def _begun(text: Text) -> Seen:
    return _of(text, Course.of(text.order_key, text.training_windows))


def _unknown(known: Known, text: Text) -> str:
    return _begins_anew(text, "cursor.json is damaged, or of another version") if known.damaged else ""


def _of(text: Text, course: Course) -> Seen:
    return Seen(text.name, text.key, text.windows, text.digest_of(text.windows), text.holds_out, course)


def _rises(values: Sequence[int]) -> bool:
    return all(before < after for before, after in pairwise(values))
