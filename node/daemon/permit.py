"""Whether this node's data may still be used: asked before each epoch's training, and before it contributes.

A consent ends at midnight, and `tapestry data revoke` takes effect on a running node: HOME/data.toml is read
again whenever it, or the day, has changed. A file that cannot be read forbids until it can be; whoever asks
comes again (trainer_desk.py), so that a slip in an editor does not cost a night. What an island brings was
learnt from data of its own, which are asked for as well.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from tapestry.node.errors import UserError
from tapestry.node.home import Home
from tapestry.node.lineage.uses import require_brought
from tapestry.node.spec.data import DataSettings, Located, real_of, reals_of
from tapestry.node.spec.declared import BASE, READ, Declared, require, stamp_of, today_utc
from tapestry.node.trainer.data.errors import DataError
from tapestry.node.trainer.data.sources import located_in

Today = Callable[[], datetime.date]


class DataPermit:
    """`refusal()` is "" while all sources may be used for the base, and else says why not."""

    def __init__(
        self,
        home: Home,
        paths: tuple[str, ...],
        today: Today = today_utc,
        located: Sequence[Located] = (),  # as the trainer has them: it reads nothing else
    ) -> None:
        self._home = home
        self._paths = paths
        # Where a source that is a link lay at the start is what was read: asked for is whether it was revoked
        # since, not a declaration of its own, for the link may lead elsewhere by now.
        self._reals = reals_of(paths)
        self._located = [replace(o, real=tuple(r for r in o.real if r not in self._reals)) for o in located]
        self._today = today
        self._seen: object = None
        self._refusal = ""

    def refusal(self) -> str:
        now = (self._today(), stamp_of(self._home), self._home.brought.exists())
        if now != self._seen:
            self._refusal = self._ask(now[0])
            self._seen = None if self._refusal else now  # a right to read it shows in no stamp
        return self._refusal

    def _ask(self, today: datetime.date) -> str:
        try:
            Declared.load(self._home)
        except UserError as error:
            return f"{error.line}; training goes on when that is mended"
        try:
            require(self._home, self._paths, BASE, today, self._located)
            require(self._home, self._reals, READ, today)
            require_brought(self._home, today)
        except UserError as error:
            return f"{error.line}; start the node again without it"
        return ""


def led_to(places: Iterable[Located]) -> tuple[str, ...]:
    """The places that links in the sources lead to; where a source itself leads, `note_use` keeps."""
    return tuple(dict.fromkeys(r for one in places for r in one.real if r != real_of(one.path)))


def located(settings: DataSettings) -> tuple[Located, ...]:
    """Where the sources lie now. Raises UserError."""
    try:
        return located_in(settings)
    except DataError as error:
        raise UserError(str(error)) from error
