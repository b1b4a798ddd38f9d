"""This member's data as the trainer sees them: training windows in an order without repetition, and sets to
measure the base on.

A source's ids are cut into windows of L + 1 that overlap by one: L ids to read, and each one's follower to
predict. So every window has targets of its own; fewer than L ids at a source's end are in none. Documents are
packed: they follow one another, each ended by eos, and a window takes them as they come.

Held out for measuring are windows spread evenly over each source, 2 % of them (held_out.py); or, if the
member gives validation sets, none of a source and all of those. Either way there is a loss for each set, by
its name. How a source goes on that was trained on before, seen.py says.

What is too doubtful to train on is refused with one line (`DataSettings` says the bounds). Must not import
torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from tapestry.node.spec.data import DataSettings, Located, Protection, SourceSettings, resolved_data
from tapestry.node.trainer.data.errors import DataError
from tapestry.node.trainer.data.held_out import held_out_of, spread_of
from tapestry.node.trainer.data.order import Position, WindowOrder, shares_of
from tapestry.node.trainer.data.seen import GoneOn, Seen, Text, go_on, read_known
from tapestry.node.trainer.data.sources import Listing, Listings, list_data, there_are
from tapestry.node.trainer.data.tally import Tally, numbered
from tapestry.node.trainer.data.tokens import TokenFile, tokenize
from tapestry.node.trainer.tokenizers.api import Tokenizer
from tapestry.node.trainer.tokenizers.byte import ByteTokenizer

# Bytes done, and bytes in all, 0 while that is not known. Called very often; may raise to end the work.
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Use:
    """What the run and the node say about how data are used."""

    sequence_length: int
    windows_per_epoch: int
    seed: int  # this node's own
    attend_across_documents: bool = True
    cursor_path: Path | None = None  # says what was seen; None: nothing was, and nobody will ask


@dataclass(frozen=True, slots=True)
class Batch:
    """Windows to train or to be measured on.

    `ids[:, :-1]` are read, `ids[:, 1:]` predicted. `segments` numbers the documents of each window, for
    each id that is read, from 0; None where attention may cross documents. With segments, an id may attend
    to ids of its own segment only, and positions count from each segment's beginning: masks.py makes both
    of them. Every target counts in the loss, also the one that follows an eos: how documents begin is worth
    learning.
    """

    ids: np.ndarray  # int64 (count, L + 1)
    segments: np.ndarray | None  # int32 (count, L)


@dataclass(frozen=True, slots=True)
class Part:
    """One source's windows, some of them held out."""

    name: str
    tokens: np.ndarray  # uint16 or uint32 (count,)
    length: int  # L
    held_out: np.ndarray  # int64 (k,), sorted window numbers

    @property
    def windows(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.length)

    @property
    def train_windows(self) -> int:
        return self.windows - len(self.held_out)

    def training(
        self,
        numbers: np.ndarray,  # int64 (n,), below train_windows: the windows that are not held out, numbered
    ) -> np.ndarray:  # int64 (n, L + 1)
        before = self.held_out - np.arange(len(self.held_out))  # training windows before each held-out one
        return self.at(numbers + np.searchsorted(before, numbers, side="right"))

    def validation(self, count_max: int) -> np.ndarray:  # int64 (n, L + 1)
        return self.at(spread_of(self.held_out, self.windows, count_max))

    def at(self, windows: np.ndarray) -> np.ndarray:  # int64 (n,) -> int64 (n, L + 1)
        return self.tokens[windows[:, None] * self.length + np.arange(self.length + 1)].astype(np.int64)


@dataclass(frozen=True, slots=True)
class Corpus:
    """All of a member's data, tokenized."""

    parts: tuple[Part, ...]  # training sources
    sets: tuple[Part, ...]  # to measure on; `held_out` of each are its windows
    order: WindowOrder
    seen: tuple[Seen, ...]  # of the training sources
    absent: tuple[Seen, ...]  # sources that were trained on before, and are not given now
    eos_id: int
    use: Use
    summary: tuple[str, ...]  # lines for people: what was read, left out, doubted

    @property
    def train_tokens(self) -> int:
        """That are predicted in one pass."""
        return sum(part.train_windows for part in self.parts) * self.use.sequence_length

    @property
    def validation_tokens(self) -> int:
        return sum(len(part.held_out) for part in self.sets) * self.use.sequence_length

    def batch(self, position: Position, count: int) -> tuple[Batch, Position]:
        """The next windows, and the position after them."""
        chosen, after = self.order.draw(position, count)
        ids = np.empty((count, self.use.sequence_length + 1), dtype=np.int64)
        for source, part in enumerate(self.parts):
            places = [place for place, (one, _) in enumerate(chosen) if one == source]
            if places:
                ids[places] = part.training(np.array([chosen[place][1] for place in places], dtype=np.int64))
        return self._batch(ids), after

    def validation(self, windows_max: int) -> dict[str, Batch]:
        """By the set's name; at most so many windows of all sets, but one of each; always the same."""
        each = max(1, windows_max // len(self.sets))
        return {part.name: self._batch(part.validation(each)) for part in self.sets}

    def validation_windows(self, windows_max: int) -> np.ndarray:
        """int64 (count, L + 1): those of all sets. For benchmarks."""
        return np.concatenate([batch.ids for batch in self.validation(windows_max).values()])

    def windows_at(self, start: int, count: int) -> np.ndarray:
        """int64 (count, L + 1): from the `start`-th window on. For benchmarks without a cursor."""
        position = self.order.advance(self.order.start(), start)
        return self.batch(position, count)[0].ids

    def _batch(self, ids: np.ndarray) -> Batch:
        if self.use.attend_across_documents:
            return Batch(ids, None)
        return Batch(ids, segments_of(ids[:, :-1], self.eos_id))


def segments_of(
    ids: np.ndarray,  # int64 (count, L)
    eos_id: int,
) -> np.ndarray:  # int32 (count, L)
    """For each id how many documents ended before it in its window; an eos belongs to its document."""
    ended = np.cumsum(ids == eos_id, axis=1, dtype=np.int32)
    before: np.ndarray = ended - (ids == eos_id).astype(np.int32)
    return before


def load_corpus(
    sources: Sequence[str],
    cache_dir: Path,
    sequence_length: int,
    seed: int = 0,
    on_progress: OnProgress = lambda done, total: None,
) -> Corpus:
    """Of sources as `--data` takes them, by bytes: for benchmarks. Raises DataError, UserError."""
    settings = resolved_data(DataSettings(paths=tuple(sources)), "name files or folders")
    use = Use(sequence_length, windows_per_epoch=1, seed=seed)
    return open_corpus(settings, ByteTokenizer(), cache_dir, use, on_progress)


def open_corpus(
    settings: DataSettings,
    tokenizer: Tokenizer,
    cache_dir: Path,
    use: Use,
    on_progress: OnProgress = lambda done, total: None,
    protected: Sequence[Protection] = (),
    located: Sequence[Located] | None = None,
) -> Corpus:
    """Tokenizes, or maps what an earlier start has tokenized; `located`: see `list_data`.

    Raises DataError.
    """
    listings = _kept_clear(list_data(settings, located, lambda: on_progress(0, 0)), protected)
    files = _tokenize_all(settings, listings, tokenizer, cache_dir, on_progress)
    count = len(listings.sources)
    hold_out = not listings.validation
    wholes = [_part(listing, file, use) for listing, file in zip(listings.sources, files, strict=False)]
    gone_on = _go_on(wholes, files, use, hold_out, on_progress)
    parts = tuple(replace(part, held_out=held_out_of(part.windows)) if hold_out else part for part in wholes)
    sets = tuple(
        _whole(_part(listing, file, use))
        for listing, file in zip(listings.validation, files[count:], strict=True)
    ) or tuple(part for part in parts if len(part.held_out))
    if not sets:
        needed = 2 * use.sequence_length + 1
        raise DataError(
            f"the data hold {sum(len(part.tokens) for part in parts)} tokens; one training and one "
            f"validation window of sequence_length {use.sequence_length} need {needed}: add more text with "
            "--data"
        )
    order = _order(settings.source, gone_on.sources, settings.rehearsal_share)
    warning = _refuse_too_small(settings, parts, order, use)
    summary = [
        line
        for part, file in zip((*parts, *sets[: len(listings.validation)]), files, strict=True)
        for line in _described(part, file.tally)
    ]
    summary += [*gone_on.lines, *warning]
    return Corpus(parts, sets, order, gone_on.sources, gone_on.absent, tokenizer.eos_id, use, tuple(summary))


def _kept_clear(listings: Listings, protected: Sequence[Protection]) -> Listings:
    """Each listing with the domains of its source."""
    domains = {one.path: one.domains for one in protected}

    def with_domains(every: Sequence[Listing]) -> tuple[Listing, ...]:
        return tuple(replace(one, domains=domains.get(one.source.path, ())) for one in every)

    return Listings(with_domains(listings.sources), with_domains(listings.validation))


def _tokenize_all(
    settings: DataSettings,
    listings: Listings,
    tokenizer: Tokenizer,
    cache_dir: Path,
    on_progress: OnProgress,
) -> list[TokenFile]:
    every = [*listings.sources, *listings.validation]
    total = sum(listing.tally.file_bytes for listing in every)
    files, done = [], 0
    for listing in every:
        files.append(
            tokenize(
                listing,
                tokenizer,
                cache_dir,
                lambda count, before=done: on_progress(before + count, total),  # type: ignore[misc]
                lambda tally, listing=listing: _refuse_malformed(  # type: ignore[misc]
                    listing, tally, settings
                ),
            )
        )
        done += listing.tally.file_bytes
    return files


def _refuse_malformed(listing: Listing, tally: Tally, settings: DataSettings) -> None:
    if settings.allow_doubtful:
        return
    path = listing.source.path
    if tally.rows and tally.no_field.count == tally.rows:
        raise DataError(
            f"data {path}: no row has text in the field {listing.source.field}{there_are(listing)}"
        )
    if tally.malformed_share > settings.malformed_max:
        said = "; ".join(tally.lines()[1:])
        raise DataError(
            f"data {path}: {tally.malformed_share:.1%} is malformed or has no text, of {tally.rows} rows and "
            f"{tally.chars} characters ({said}): mend it, or --allow-doubtful-data"
        )
    if tally.left_out_share > settings.left_out_max:
        raise DataError(
            f"data {path}: {tally.left_out_share:.0%} of its bytes cannot be read "
            f"({'; '.join(tally.lines()[1:4])}): mend it, or --allow-doubtful-data"
        )


def _part(listing: Listing, file: TokenFile, use: Use) -> Part:
    """With nothing held out."""
    whole = Part(listing.source.name, file.tokens, use.sequence_length, np.zeros(0, np.int64))
    if not whole.windows:
        raise DataError(
            f"data {listing.source.path}: {numbered(len(file.tokens), 'token')}, fewer than the "
            f"{use.sequence_length + 1} of one window: add text, or leave it out"
        )
    return whole


def _whole(part: Part) -> Part:
    """A validation set: all of it is held out."""
    return Part(part.name, part.tokens, part.length, np.arange(part.windows))


def _go_on(
    parts: Sequence[Part], files: Sequence[TokenFile], use: Use, hold_out: bool, on_progress: OnProgress
) -> GoneOn:
    """Reads the ids of sources whose digests are not known."""

    def digest_of(file: TokenFile, windows: int) -> str:
        read = (windows - 1) * use.sequence_length + 1
        total = sum(file.tally.file_bytes for file in files)
        return file.digest_of(read, lambda: on_progress(total, total)) if use.cursor_path else ""

    texts = [
        Text(
            part.name,
            file.key,
            part.windows,
            hold_out,
            b"%d/%s" % (use.seed, part.name.encode()),
            partial(digest_of, file),
        )
        for part, file in zip(parts, files, strict=False)
    ]
    return go_on(read_known(use.cursor_path), texts)


def _order(sources: Sequence[SourceSettings], seen: Sequence[Seen], rehearsal_share: float) -> WindowOrder:
    courses = tuple(one.course for one in seen)
    shares = shares_of(
        tuple(course.count for course in courses),
        [one.weight for one in sources],
        [one.rehearsal for one in sources],
        rehearsal_share,
    )
    return WindowOrder(courses, shares)


def _refuse_too_small(
    settings: DataSettings, parts: Sequence[Part], order: WindowOrder, use: Use
) -> list[str]:
    """Nothing, or the warning that stands for a refusal."""
    for part, count, share in zip(parts, order.counts, order.shares, strict=True):
        passes = use.windows_per_epoch * share / sum(order.shares) / count
        if passes > settings.passes_per_epoch_max:
            what = f"data {part.name}: an epoch of this run goes over it {passes:.1f} times ({count} windows)"
            if settings.allow_doubtful:
                return [what]
            raise DataError(f"{what}: it would be learnt by heart; add text, or --allow-doubtful-data")
    return []


def _described(part: Part, tally: Tally) -> list[str]:
    lines = [
        f"data {part.name}: {tally.lines()[0]}, {len(part.tokens)} tokens, {part.train_windows} windows to "
        f"train on and {len(part.held_out)} to measure on"
    ]
    return lines + [f"data {part.name}: {line}" for line in tally.lines()[1:]]
