"""Which files a source means: `list_files` finds them, and counts what it leaves out and why.

This is the cheap half of reading data: nothing is tokenized, so a command line finds every mistake about
paths, fields and encodings before it starts anything. A file is known by its real path and counts once,
however many names and sources lead to it. A link that leads out of the folder it lies in is not followed
unless the member says so: what lies elsewhere was not meant.

Must not import torch, numpy or pyarrow.
"""

from __future__ import annotations

import json
import os
import re
import stat
import sysconfig
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tapestry.node.spec.data import (
    HUB,
    STDLIB,
    DataSettings,
    Domain,
    Located,
    SourceSettings,
    ValidationSettings,
    is_word,
)
from tapestry.node.trainer.data import hub
from tapestry.node.trainer.data.errors import DamagedFile, DataError
from tapestry.node.trainer.data.files import NotText, SourceFile, check_text
from tapestry.node.trainer.data.readers.format import Format
from tapestry.node.trainer.data.readers.registry import format_in, format_named, format_of, is_json, require
from tapestry.node.trainer.data.tally import Group, Tally, merged_names, size

LINKS_MAX = 256  # places that a folder's links lead to; each is asked about before an epoch. Guess
FILES_MAX = 1_000_000
OTHER_SPLIT = re.compile(r"(^|[/_.-])(test|validation|valid|val|dev|eval)([/_.-]|$)", re.IGNORECASE)
TRAIN_SPLIT = re.compile(r"(^|[/_.-])train(ing)?([/_.-]|$)", re.IGNORECASE)
_STDLIB_LEFT_OUT = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})

# What shows that a folder is a home of this program, or a cache: https://bford.info/cachedir
CACHE_TAG = "CACHEDIR.TAG"
_OURS = frozenset({"identity.key", CACHE_TAG})

ELSEWHERE = "elsewhere than when the node was started, start it again to have that read"
LEADS_OUT = "links that lead out of the folder, not followed"

AnySource = SourceSettings | ValidationSettings
OnFile = Callable[[], None]
Asked = Mapping[str, tuple[str, ...]]  # the real paths at which a source was asked about, by its path


@dataclass(frozen=True, slots=True)
class Listing:
    """One source's files in a fixed order, and what was left out of them."""

    source: AnySource
    files: tuple[SourceFile, ...]
    tally: Tally
    domains: tuple[Domain, ...] = ()  # that the source must be kept clear of


@dataclass(frozen=True, slots=True)
class Listings:
    """All sources, and the validation sets that were given."""

    sources: tuple[Listing, ...]
    validation: tuple[Listing, ...]


def list_data(
    settings: DataSettings,
    located: Iterable[Located] | None = None,
    on_file: Callable[[], None] = lambda: None,
) -> Listings:
    """Every file once: a validation set's files are not trained on. Raises DataError.

    `located`: where each source was asked about. What lies elsewhere by now is not opened, and left out.
    None: whoever calls has nobody to ask. `on_file` is called before each file of a folder is looked at, and
    may raise: a million of them can take an hour.
    """
    if not settings.source:
        raise DataError("no data given: name files or folders of text with --data, or --data stdlib")
    taken: set[str] = set()
    asked = None if located is None else {one.path: one.real for one in located}
    validation = tuple(_listing(one, taken, "--validation", asked, on_file) for one in settings.validation)
    sources = tuple(_listing(one, taken, "--data", asked, on_file) for one in settings.source)
    for one in [*validation, *sources]:
        _refuse_mostly_left_out(one, settings)
    return Listings(sources, validation)


def located_in(settings: DataSettings) -> tuple[Located, ...]:
    """Where sources that are paths lie now, and what the links of those with follow_links lead to. All of it
    must be declared. Raises DataError."""
    found: dict[str, dict[str, None]] = {}
    every: tuple[AnySource, ...] = (*settings.source, *settings.validation)
    for one in every:
        if is_word(one.path) or not os.path.exists(one.path):
            continue
        inside = os.path.realpath(one.path)
        real = found.get(one.path, {}) | {inside: None}
        if one.follow_links and os.path.isdir(inside):
            try:
                paths = list(_paths_in(one.path, one, Tally(), one.path))
            except OSError as error:
                raise DataError(f"data {one.path}: cannot read {error.filename}: {error.strerror}") from error
            real |= dict.fromkeys(_led_to(one.path, inside, paths))
        found[one.path] = real
    return tuple(Located(path, tuple(real)) for path, real in found.items())


def _led_to(root: str, inside: str, paths: Iterable[str]) -> tuple[str, ...]:
    """Of links on the way to `paths`, below `root`, whose real path is `inside`. Raises DataError."""
    roots: dict[str, None] = {inside: None}
    for path in paths:
        real = os.path.realpath(path)
        while not _lies_in(real, roots):
            roots[_way_out(root, path, roots)] = None
    places = _outermost(roots, inside)
    if len(places) > LINKS_MAX:
        folders = [one if os.path.isdir(one) else os.path.dirname(one) for one in places]
        places = _outermost(dict.fromkeys(folders), inside)
    if len(places) > LINKS_MAX:
        raise DataError(
            f"data {root}: its links lead to {len(places)} places outside, more than {LINKS_MAX}; name the "
            "folders that they lead to as sources of their own"
        )
    return tuple(places)


def _outermost(roots: dict[str, None], inside: str) -> list[str]:
    """Those that lie in no other. (What lies above "/" is "/".)"""
    places = [one for one in roots if one != inside]
    return [one for one in places if one == "/" or not _lies_in(os.path.dirname(one), roots)]


def _lies_in(real: str, roots: Container[str]) -> bool:
    return real in roots or any(str(parent) in roots for parent in Path(real).parents)


def _way_out(root: str, path: str, roots: Container[str]) -> str:
    """Where the first link on the way to `path` leads that leads out of all `roots`."""
    at = root
    for part in os.path.relpath(path, root).split(os.sep):
        at = os.path.join(at, part)
        if os.path.islink(at) and not _lies_in(real := os.path.realpath(at), roots):
            return real
    return os.path.realpath(path)


def files_below(root: str, tally: Tally) -> list[str]:
    """What a folder means, by name: nothing hidden, and no link that leads out. Raises OSError."""
    return sorted(_walk(root, False, root, tally))


def _listing(source: AnySource, taken: set[str], flag: str, asked: Asked | None, on_file: OnFile) -> Listing:
    tally = Tally()
    where = f"{flag} {source.path}"
    try:
        files = tuple(_once(_files_of(source, tally, where, asked, on_file), taken, tally))
    except FileNotFoundError:
        raise DataError(f"{where}: there is no such file or folder") from None
    except OSError as error:
        raise DataError(f"{where}: {error.filename} cannot be read: {error.strerror}") from error
    if not files:
        left = "; ".join(tally.lines()[1:])
        raise DataError(f"{where}: no text to read there{': ' + left if left else ''}")
    if len(files) > FILES_MAX:
        raise DataError(f"{where}: {len(files)} files, more than {FILES_MAX}: join them into larger ones")
    tally.files, tally.file_bytes = len(files), sum(file.size_bytes for file in files)
    return Listing(source, files, tally)


def _refuse_mostly_left_out(listing: Listing, settings: DataSettings) -> None:
    """Raises DataError where a run on what is left would hardly be what the member meant."""
    tally = listing.tally
    if tally.left_out_share <= settings.left_out_max or settings.allow_doubtful:
        return
    raise DataError(
        f"data {listing.source.path}: {tally.left_out_share:.0%} of its bytes would be left out "
        f"({'; '.join(tally.lines()[1:4])}) and {size(tally.file_bytes)} taken; "
        "name what you mean, or --allow-doubtful-data"
    )


def _once(files: Iterator[SourceFile], taken: set[str], tally: Tally) -> Iterator[SourceFile]:
    for file in files:
        real = file.real or os.path.realpath(file.path)
        if real in taken:
            tally.left_out.setdefault("read once already", Group()).add(file.path)
            continue
        taken.add(real)
        yield file


def _files_of(
    source: AnySource, tally: Tally, where: str, asked: Asked | None, on_file: OnFile
) -> Iterator[SourceFile]:
    stdlib, on_hub = STDLIB.fullmatch(source.path), HUB.fullmatch(source.path)
    if stdlib:
        return iter(_stdlib_files(where, stdlib))
    if on_hub:
        folder = hub.folder_of(on_hub["id"], on_hub["revision"])
        source = replace(source, follow_links=False)  # its links lead to its own blobs
        return _folder_files(
            str(folder), source, tally, str(folder.parent.parent), None, on_file, one_split=True
        )
    if source.path.startswith(("stdlib:", "hub:")):
        raise DataError(f"{where}: write stdlib:K/N, or hub:OWNER/NAME and perhaps @REVISION")
    mode = os.stat(source.path).st_mode
    places = None if asked is None else asked.get(source.path, ())
    real = os.path.realpath(source.path)
    if places is not None and not _lies_in(real, places):
        raise DataError(f"{where}: it leads to {real}, {ELSEWHERE}")
    if stat.S_ISDIR(mode):
        return _folder_files(source.path, source, tally, source.path, places, on_file)
    if not stat.S_ISREG(mode):
        raise DataError(f"{where}: neither a file nor a folder")
    return iter([replace(_single_file(source, where), real=real)])


def _single_file(source: AnySource, where: str) -> SourceFile:
    try:
        file_format = _format_in(source.path, source)
        require(file_format, where)
        file = _source_file(source.path, file_format, source)
        if source.field and not file_format.is_table:
            raise DataError(_no_fields(source, where))
        if file_format.is_table and not source.field:
            raise DataError(_which_field(file_format, file, where))
        if not file_format.is_packed:
            check_text(source.path, source.encoding)
    except (NotText, DamagedFile) as error:
        raise DataError(f"{where}: {error}") from error
    return file


def _format_in(path: str, source: AnySource) -> Format:
    """Without a field a .json of one line is text: code has many, and no rows are lost in it."""
    return format_in(path, source.encoding, 1 if source.field else 2)


def _no_fields(source: AnySource, where: str) -> str:
    what = f"is read as text, which has no fields: leave :{source.field} out, or name it .jsonl, .csv or .tsv"
    if is_json(source.path):
        what = "is no JSON lines, an object in each line, as `jq -c '.[]'` makes them of a list"
    return f"{where} {what}"


def _which_field(file_format: Format, file: SourceFile, where: str) -> str:
    names = file_format.fields(file)
    example = next(
        (name for name in ("text", "content", "body") if name in names), names[0] if names else "text"
    )
    return f"{where}: say which field holds the text{_shown_fields(names)}, as in {where}:{example}"


def there_are(listing: Listing) -> str:
    """The fields of the first table of a source, for an error message; "" if it tells none."""
    for file in listing.files:
        file_format = format_named(file.format)
        if file_format.is_table:
            return _shown_fields(file_format.fields(file))
    return ""


def _shown_fields(names: list[str]) -> str:
    return f" (there are: {merged_names(names)})" if names else ""


def _folder_files(
    root: str,
    source: AnySource,
    tally: Tally,
    within: str,
    places: Container[str] | None,  # where it was asked about
    on_file: OnFile,
    one_split: bool = False,
) -> Iterator[SourceFile]:
    paths = list(_paths_in(root, source, tally, within))
    if one_split:
        paths = _train_split(root, _without_card(root, paths, tally), tally)
    for path in paths:
        on_file()
        real = os.path.realpath(path)
        if places is not None and not _lies_in(real, places):
            tally.leave_out(ELSEWHERE, path, 0)
        elif (file := _file_in_folder(path, source, tally)) is not None:
            yield replace(file, real=real)


def _paths_in(root: str, source: AnySource, tally: Tally, within: str) -> Iterator[str]:
    saved = _saved_dataset(root)
    if saved is None:
        yield from _walk(root, source.follow_links, within, tally)
    for path in saved or ():
        if source.follow_links or _is_inside(path, os.path.realpath(within)):
            yield path
        else:
            tally.leave_out(LEADS_OUT, path, 0)


def _file_in_folder(path: str, source: AnySource, tally: Tally) -> SourceFile | None:
    """None, and counted, if it cannot be read."""
    try:
        size_bytes = os.stat(path).st_size
        if not size_bytes:
            return None
        file_format = _format_in(path, source)
        if source.field and is_json(path) and not file_format.is_table:
            tally.leave_out("json that is no JSON lines", path, size_bytes)
            return None
        if file_format.is_table and not source.field:
            reason = f"{file_format.name} without a field, give the folder as FOLDER:FIELD"
            tally.leave_out(reason, path, size_bytes)
            return None
        require(file_format, path)
        if not file_format.is_packed:
            check_text(path, source.encoding)
        return _source_file(path, file_format, source)
    except NotText as reason:
        tally.leave_out(str(reason), path, size_bytes)
    except DamagedFile as reason:
        tally.leave_out(str(reason).partition(":")[0], path, size_bytes)
    except OSError as error:
        tally.leave_out(f"cannot be read: {error.strerror}", path, 0)
    return None


def _walk(root: str, follow_links: bool, within: str, tally: Tally) -> Iterator[str]:
    """Files below `root` in a fixed order; nothing hidden, no loop of links."""
    inside = os.path.realpath(within)
    seen = {os.path.realpath(root)}
    for folder, folders, names in os.walk(root, onerror=_raise, followlinks=follow_links):
        if _OURS & set(names):
            folders[:] = []
            tally.leave_out("homes and caches of this program", folder, 0)
            continue
        kept = []
        for name in sorted(folders):
            path = os.path.join(folder, name)
            if name.startswith(".") or name == "__pycache__":
                continue
            if os.path.islink(path) and not follow_links:
                tally.leave_out("links to folders, not followed", path, 0)
            elif os.path.realpath(path) not in seen:
                seen.add(os.path.realpath(path))
                kept.append(name)
        folders[:] = kept
        for name in sorted(names):
            path = os.path.join(folder, name)
            if name.startswith(".") or not os.path.isfile(path):
                continue
            if os.path.islink(path) and not follow_links and not _is_inside(path, inside):
                tally.leave_out(LEADS_OUT, path, 0)
                continue
            yield path


def _is_inside(path: str, root: str) -> bool:
    return os.path.realpath(path).startswith(root.rstrip("/") + "/")


def _saved_dataset(root: str) -> Iterator[str] | None:
    """The arrow files of a folder that `datasets` saved, of its split `train` if it has several; or None."""
    splits = _json_of(os.path.join(root, "dataset_dict.json")).get("splits")
    if isinstance(splits, list) and splits:
        root = os.path.join(root, "train" if "train" in splits else str(splits[0]))
    listed = _json_of(os.path.join(root, "state.json")).get("_data_files")
    if not isinstance(listed, list):
        return None
    names = [one.get("filename") for one in listed if isinstance(one, dict)]
    return iter([os.path.join(root, name) for name in names if isinstance(name, str) and "/" not in name])


def _json_of(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            value = json.loads(file.read(1 << 20))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _without_card(root: str, paths: Sequence[str], tally: Tally) -> list[str]:
    """Without what a hub keeps beside the data to describe them."""
    about = {path for path in paths if os.path.relpath(path, root) in hub.ABOUT}
    for path in sorted(about):
        tally.left_out.setdefault("it describes the data set", Group()).add(path)
    return [path for path in paths if path not in about]


def _train_split(root: str, paths: Sequence[str], tally: Tally) -> list[str]:
    """Without what is named as another split, where one is named train: a test set must stay one."""
    names = {path: os.path.relpath(path, root) for path in paths}
    if not any(TRAIN_SPLIT.search(name) for name in names.values()):
        return list(paths)
    others = [
        path for path, name in names.items() if OTHER_SPLIT.search(name) and not TRAIN_SPLIT.search(name)
    ]
    for path in others:
        tally.left_out.setdefault("of another split than train", Group()).add(path)
    return [path for path in paths if path not in set(others)]


def _stdlib_files(where: str, match: re.Match[str]) -> list[SourceFile]:
    part, parts = (int(match[1]), int(match[2])) if match[1] else (1, 1)
    if not 1 <= part <= parts:
        raise DataError(f"{where}: the part must be between 1 and {parts}")
    source = SourceSettings("stdlib")
    files = []
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib"), onerror=_raise):
        folders[:] = sorted(set(folders) - _STDLIB_LEFT_OUT)
        for name in sorted(names):
            path = os.path.join(folder, name)
            if name.endswith(".py") and not os.path.islink(path) and os.path.getsize(path):
                files.append(_source_file(path, _text_format(), source))
    chosen = _balanced_part(files, part, parts)
    if not chosen:
        raise DataError(f"{where}: there are only {len(files)} files, fewer than {parts} parts")
    return chosen


def _balanced_part(files: list[SourceFile], part: int, parts: int) -> list[SourceFile]:
    """The largest file not yet placed goes to the smallest part: disjoint, and near equal in bytes."""
    if parts > len(files):
        return []
    totals = [0] * parts
    chosen = []
    for file in sorted(files, key=lambda file: (-file.size_bytes, file.path)):
        smallest = totals.index(min(totals))
        totals[smallest] += file.size_bytes
        if smallest == part - 1:
            chosen.append(file)
    return sorted(chosen, key=lambda file: file.path)


def _source_file(path: str, file_format: Format, source: AnySource) -> SourceFile:
    info = os.stat(path)
    field = source.field if file_format.is_table else ""
    encoding = "" if file_format.is_packed else source.encoding
    absolute = str(Path(path).absolute())
    return SourceFile(absolute, info.st_size, info.st_mtime_ns, file_format.name, field, encoding)


def _text_format() -> Format:
    return format_of("x")


def _raise(error: OSError) -> None:
    raise error
