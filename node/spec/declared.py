"""HOME/data.toml: what each source of data is, whose, and what it may be used for.

A source is read for a purpose only if a declaration for that purpose holds today; what nobody declared is not
read. A purpose is `base` (the shared base is trained and measured on it) or `derive:NAME` (a model of one's
own; `derive:*` for any). A declaration covers its path and what lies in it. Of several that cover a source,
those of the longest path decide; and a folder is not read if something in it is declared otherwise.

    open                  may be used as its purposes say, and described
    restricted            the same, under a consent that `consent` names and `until` may end
    local-only            never for the base
    participant-private   may be used as its purposes say; nothing is said of it outside, not even its name

`stdlib` needs no declaration: its owner and licence are known. `--declare TEXT` appends one to the file;
`tapestry data revoke` appends to `revoked`, which goes before everything else.

Must not import torch, hivemind or transformers: the command line waits for this module.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, get_args

from tapestry.node.disk.files import atomic_write, one_at_a_time
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.spec.data import (
    WORD,
    DataSettings,
    Domain,
    Located,
    Protection,
    is_word,
    real_of,
    reals_of,
    rebased_data,
)
from tapestry.node.spec.tables import (
    Pattern,
    TableError,
    commented_toml,
    plain,
    read_table,
    read_toml,
    refuse_filled_in,
    toml_value,
)

BASE = "base"
READ = "read"  # in place of a purpose, of where a link led when it was read: was it revoked since?
Mode = Literal["open", "restricted", "local-only", "participant-private"]
SETTLE_S = 20  # Guess: nobody takes longer to save a file
PURPOSE = Pattern(r"base|derive:(\*|[A-Za-z0-9_-]{1,64})", 'base, derive:NAME or "derive:*"')
DATE = Pattern(r"|[0-9]{4}-[0-9]{2}-[0-9]{2}", "a date such as 2027-12-31")
SAID = Pattern(r"[^\x00-\x1f\x7f]{1,200}", "1 to 200 printable characters")
PERHAPS_SAID = Pattern(r"[^\x00-\x1f\x7f]{0,1000}", "at most 1000 printable characters")
OWN = "own"  # in --declare: the member's own text
FORM = 'OWNER, LICENCE[, MODE][, until YYYY-MM-DD][, consent REFERENCE], or "own"'


@dataclass(frozen=True, slots=True)
class Declaration:
    """One source. In data.toml: a table [[source]]."""

    path: Annotated[
        str, "As --data has it, without a field; relative to this folder. It covers what lies in it."
    ]
    owner: Annotated[str, SAID, "Who has the right to say what it may be used for."]
    licence: Annotated[str, SAID, 'Such as "CC-BY-4.0", or "own".']
    mode: Annotated[Mode, "Restricted needs a consent; local-only is never used for the base."]
    purposes: Annotated[tuple[str, ...], PURPOSE, "What it may be used for."]
    protected: Annotated[tuple[str, ...], WORD, "Names of [[domain]]: what of it must be dropped."] = ()
    consent: Annotated[str, PERHAPS_SAID, "Where the consent is kept: a reference, never its text."] = ""
    until: Annotated[str, DATE, "The last day on which it may be used (UTC)."] = ""
    description: Annotated[
        str,
        PERHAPS_SAID,
        "Published to members and in exported cards; never of participant-private data.",
    ] = ""


@dataclass(frozen=True, slots=True)
class Revoked:
    """A source that is not to be used any more. In data.toml: a table [[revoked]]."""

    path: Annotated[str, "As in [[source]]; it covers what lies in it."]
    at: Annotated[str, SAID, "When."]
    reason: Annotated[str, PERHAPS_SAID, "Why."] = ""


@dataclass(frozen=True, slots=True)
class Declared:
    """All of data.toml, with absolute paths."""

    protected: Annotated[tuple[str, ...], WORD, "Domains that are dropped from every source."] = ()
    source: Annotated[tuple[Declaration, ...], "What may be used, and for what."] = ()
    domain: Annotated[tuple[Domain, ...], "Protected domains."] = ()
    revoked: Annotated[tuple[Revoked, ...], "What was withdrawn; it goes before all declarations."] = ()

    @classmethod
    def load(cls, home: Home) -> Declared:
        """What the home declares; nothing where there is no file. Raises UserError."""
        path = home.data_toml
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return cls()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        try:
            raw = read_toml(path)
        except TableError as error:
            raise UserError(f"{path}: {error}") from error
        return cls.of(raw, home)

    @classmethod
    def of(cls, raw: dict[str, Any], home: Home) -> Declared:
        """What the home would declare if its data.toml held this. Raises UserError."""
        path = home.data_toml
        try:
            read = read_table(cls, raw)
            refuse_filled_in(cls, raw)
        except TableError as error:
            raise UserError(f"{path}: {error}") from error
        read = replace(
            read,
            source=tuple(replace(one, path=_absolute(one.path, home)) for one in read.source),
            revoked=tuple(replace(one, path=_absolute(one.path, home)) for one in read.revoked),
            domain=tuple(replace(one, folder=str(path.absolute().parent)) for one in read.domain),
        )
        for wrong in read.mistakes():
            raise UserError(f"{path}: {wrong}")
        return read

    def mistakes(self) -> Iterable[str]:
        """What the reader of tables cannot see."""
        known = {one.name for one in self.domain}
        for number, one in enumerate(self.source, 1):
            where = f"source[{number}]"
            if one.mode == "local-only" and BASE in one.purposes:
                yield f"{where}: local-only data are never used for the base: take base out of its purposes"
            if one.mode == "restricted" and not one.consent:
                yield f"{where}: restricted data need a consent: say where it is kept"
            if one.mode == "participant-private" and one.description:
                yield f"{where}: participant-private data are not described outside: take its description out"
            if one.until and _date(one.until) is None:
                yield f'{where}.until: "{one.until}" is no date'
            yield from (
                f'{where}.protected: there is no [[domain]] "{x}"' for x in one.protected if x not in known
            )
        yield from (
            f'protected: there is no [[domain]] "{name}"' for name in self.protected if name not in known
        )
        for domain in self.domain:
            if not domain.patterns and not domain.command:
                yield f"domain {domain.name}: it has neither patterns nor a command"
            for pattern in domain.patterns:
                try:
                    re.compile(pattern)
                except (re.error, OverflowError, RecursionError) as error:
                    yield f"domain {domain.name}: {pattern[:40]!r} is no regular expression: {error}"

    def refusal(self, path: str, purpose: str, today: datetime.date) -> str:
        """Why the source may not be read for the purpose; "" if it may."""
        for gone in self.revoked:
            if covers(gone.path, path) or covers(path, gone.path):
                return f"{gone.path} was revoked at {gone.at}"
        if purpose == READ:
            return ""
        within = [one.path for one in self.source if one.path != path and covers(path, one.path)]
        for part in dict.fromkeys(within):
            if why := self._refusal_of(self.covering(part), purpose, today):
                return f"{part}, which lies in it, is {why}"
        covering = self.covering(path)
        if not covering and _is_known(path):
            return ""
        return self._refusal_of(covering, purpose, today) if covering else "not declared"

    def _refusal_of(self, covering: tuple[Declaration, ...], purpose: str, today: datetime.date) -> str:
        for_it = [one for one in covering if allows(one, purpose)]
        if not for_it:
            said = ", ".join(dict.fromkeys(p for one in covering for p in one.purposes)) or "nothing"
            return f"declared for {said}, not for {purpose}"
        if all(one.until and one.until < today.isoformat() for one in for_it):
            return f"declared until {max(one.until for one in for_it)}, which is over"
        return ""

    def covering(self, path: str) -> tuple[Declaration, ...]:
        """The declarations that decide about a source: those of the longest path that covers it."""
        found = [one for one in self.source if covers(one.path, path)]
        longest = max((len(real_of(one.path)) for one in found), default=0)
        return tuple(one for one in found if len(real_of(one.path)) == longest)

    def may_be_named(self, path: str) -> bool:
        """Outside: not if it is participant-private, or if nobody says any more what it is."""
        covering = self.covering(path)
        return all(one.mode != "participant-private" for one in covering) and bool(
            covering or _is_known(path)
        )

    def domains_of(self, *paths: str) -> tuple[Domain, ...]:
        """What a source, and where its links lead, must be kept clear of: their own domains, those of what
        lies in them, and everybody's."""
        names = set(self.protected)
        for one in self.source:
            if any(covers(one.path, path) or covers(path, one.path) for path in paths):
                names |= set(one.protected)
        return tuple(one for one in self.domain if one.name in names)

    def protections(self, paths: Iterable[str], located: Iterable[Located] = ()) -> tuple[Protection, ...]:
        """For the trainer: of each source that has any."""
        real = {one.path: one.real for one in located}
        found = (
            Protection(path, self.domains_of(path, *real.get(path, ()))) for path in dict.fromkeys(paths)
        )
        return tuple(one for one in found if one.domains)


def today_utc() -> datetime.date:
    """By this machine's clock."""
    return datetime.datetime.now(datetime.UTC).date()


def allows(one: Declaration, purpose: str) -> bool:
    """Whether its purposes name this one."""
    return purpose in one.purposes or (purpose.startswith("derive:") and "derive:*" in one.purposes)


def published(declared: Declared) -> tuple[str, ...]:
    """What the cards of exported models say of the data that the base learns from: descriptions, and nothing
    that was not written to be published."""
    return tuple(
        f"{one.description} (of {one.owner}, {one.licence})"
        for one in declared.source
        if one.description and one.mode != "participant-private" and allows(one, BASE)
    )


def paths_of(settings: DataSettings) -> tuple[str, ...]:
    """Of all sources and validation sets, each once."""
    paths = [one.path for one in settings.source] + [one.path for one in settings.validation]
    return tuple(dict.fromkeys(paths))


def sources_of(settings: DataSettings) -> tuple[str, ...]:
    """The training sources as --data names them, with their fields."""
    return tuple(f"{one.path}:{one.field}" if one.field else one.path for one in settings.source)


def require(
    home: Home, paths: Iterable[str], purpose: str, today: datetime.date, located: Sequence[Located] = ()
) -> tuple[Protection, ...]:
    """What the sources must be kept clear of. Raises UserError if one, or a place where it lies, may not be
    read for the purpose."""
    declared = Declared.load(home)
    paths = tuple(paths)
    for path in dict.fromkeys((*paths, *(real for one in located for real in one.real))):
        if why := declared.refusal(path, purpose, today):
            how = f'tapestry data declare "OWNER, LICENCE" {path} --home {home.path}; or start with --declare'
            hint = how if "not declared" in why else f"tapestry data list --home {home.path}"
            source = next((one.path for one in located if path in one.real and path not in paths), "")
            why += f" (a link in {source} leads there)" if source else ""
            raise UserError(f"data {path} is not read: {why}", exit_code=ExitCode.USAGE, hint=hint)
    return declared.protections(paths, located)


class Standing:
    """`require`, asked again and again: data.toml is read anew only when it, or the day, has changed.

    Of links also what they led to at the beginning is asked for: that is what was read."""

    def __init__(
        self,
        home: Home,
        uses: Mapping[str, Iterable[str]],  # paths by their purpose
        today: Callable[[], datetime.date] = today_utc,
    ) -> None:
        self._home = home
        self._uses = {purpose: tuple(paths) for purpose, paths in uses.items()}
        every = [path for paths in self._uses.values() for path in paths]
        self._uses[READ] = (*self._uses.get(READ, ()), *reals_of(every))
        self._today = today
        self._seen: object = None

    def require(self) -> None:
        """Raises UserError if one of them may not be used any more."""
        now = (self._today(), stamp_of(self._home))
        if now != self._seen:
            if self._seen is not None:
                self._settle()
                now = (now[0], stamp_of(self._home))
            for purpose, paths in self._uses.items():
                require(self._home, paths, purpose, now[0])
            self._seen = now

    def _settle(self) -> None:
        """Somebody is writing it perhaps, and days of training do not end by half a file: it counts when it
        has been the same for a second, and can be read."""
        for _ in range(SETTLE_S):
            before = stamp_of(self._home)
            time.sleep(1.0)
            with contextlib.suppress(UserError):
                Declared.load(self._home)
                if stamp_of(self._home) == before:
                    return


def stamp_of(home: Home) -> tuple[int, int] | None:
    """Of data.toml: it differs when the file was changed. None if there is none."""
    try:
        info = os.stat(home.data_toml)
    except OSError:
        return None
    return info.st_mtime_ns, info.st_size


def undeclared(home: Home, paths: Iterable[str], purpose: str) -> list[str]:
    """Sources for which a declaration could still be made: nothing covers them for this purpose."""
    declared = Declared.load(home)
    return [
        path
        for path in paths
        if declared.refusal(path, purpose, datetime.date.min).startswith(("not declared", "declared for"))
        and not any(one.mode == "local-only" for one in declared.covering(path) if purpose == BASE)
    ]


def parse_declaration(text: str, path: str, purpose: str) -> Declaration:
    """What `--declare TEXT` says of a source. Raises UserError."""
    if text.strip() == OWN:
        return Declaration(path, "this member", OWN, "participant-private", (purpose,))
    owner, _, rest = (part.strip() for part in text.partition(","))
    licence, *more = (part.strip() for part in rest.split(","))
    values: dict[str, object] = {}
    for part in more:
        word, _, said = part.partition(" ")
        if part in get_args(Mode):
            values["mode"] = part
        elif word in ("until", "consent") and said:
            values[word] = said.strip()
        else:
            raise UserError(f"--declare: {part[:60]!r} is not understood", hint=f"it is {FORM}")
    table = {"mode": "participant-private", "owner": owner, "licence": licence, **values}
    try:
        made = read_table(Declaration, table | {"path": path, "purposes": [purpose]})
    except TableError as error:
        raise UserError(f"--declare: {error}", hint=f"it is {FORM}") from error
    for wrong in Declared(source=(made,)).mistakes():
        raise UserError(f"--declare: {wrong.partition(': ')[2]}", hint=f"it is {FORM}")
    return made


def append(home: Home, entries: Iterable[Declaration | Revoked]) -> None:
    """Put tables at the end of data.toml; a new file begins with what its keys mean. Raises UserError.

    Commands that do so at once take turns, so that none undoes what another wrote.
    """
    path = home.data_toml
    added = ""
    for one in entries:
        kind = "source" if isinstance(one, Declaration) else "revoked"
        said = {name: value for name, value in plain(one).items() if value not in ("", [])}
        added += f"\n[[{kind}]]\n" + "".join(
            f"{name} = {toml_value(value)}\n" for name, value in said.items()
        )
    home.create()
    try:
        with one_at_a_time(path):
            text = path.read_text(encoding="utf-8") if os.path.lexists(path) else template()
            Declared.load(home)  # else what is wrong would be called the new entry's
            raw = tomllib.loads((text + added).removeprefix("\ufeff"))
            Declared.of(raw, home)  # a file with a mistake lets a running node read nothing
            atomic_write(path, (text + added).encode(), 0o600)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot write {path}: {error}", exit_code=ExitCode.FAILED) from error


def template() -> str:
    """A data.toml that declares nothing, with what every key means."""
    return (
        "# What each source of data is, whose, and what it may be used for. A source that is not declared\n"
        "# here is not read. `tapestry start --declare TEXT` appends to this file.\n\n"
        + commented_toml(Declared())
    )


# --- paths ------------------------------------------------------------------------------------------


def _absolute(path: str, home: Home) -> str:
    absolute: str = rebased_data({"paths": [path]}, home.path)["paths"][0]
    return absolute


def covers(outer: str, inner: str) -> bool:
    """Whether a declaration of `outer` speaks of `inner`."""
    if is_word(outer) or is_word(inner):
        return inner == outer or inner.startswith((f"{outer}:", f"{outer}@"))
    one, other = real_of(outer), real_of(inner)
    return other == one or other.startswith(one.rstrip("/") + "/")


def _is_known(path: str) -> bool:
    """The sources of the Python standard library: of the Python Software Foundation, under its licence."""
    return path == "stdlib" or path.startswith("stdlib:")


def _date(text: str) -> datetime.date | None:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        return None
