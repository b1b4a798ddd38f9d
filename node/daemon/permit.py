"""Whether this node's data may still be used: asked before each epoch's training, and before it contributes.

A consent ends at midnight, and `tapestry data revoke` takes effect on a running node: HOME/data.toml is read
again whenever it, or the day, has changed. A file that cannot be read forbids until it can be; whoever asks
comes again (trainer_desk.py), so that a slip in an editor does not cost a night. What an island brings was
learnt from data of its own, which are asked for as well.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable

from tapestry.node.errors import UserError
from tapestry.node.home import Home
from tapestry.node.lineage.uses import require_brought
from tapestry.node.spec.data import DataSettings, reals_of
from tapestry.node.spec.declared import BASE, NO_LINKS, READ, Beyond, Declared, require, stamp_of, today_utc
from tapestry.node.trainer.data.errors import DataError
from tapestry.node.trainer.data.sources import linked_out

Today = Callable[[], datetime.date]


class DataPermit:
    """`refusal()` is "" while all sources may be used for the base, and else says why not."""

    def __init__(
        self, home: Home, paths: tuple[str, ...], today: Today = today_utc, linked: Beyond = NO_LINKS
    ) -> None:
        self._home = home
        self._paths = paths
        self._linked = linked
        self._reals = reals_of(paths)  # a link may lead elsewhere while this is what is trained on
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
            require(self._home, self._paths, BASE, today, self._linked)
            require(self._home, self._reals, READ, today)
            require_brought(self._home, today)
        except UserError as error:
            return f"{error.line}; start the node again without it"
        return ""


def beyond(settings: DataSettings) -> Beyond:
    """What sources read through links, beyond their folders. Raises UserError."""
    try:
        return linked_out(settings)
    except DataError as error:
        raise UserError(str(error)) from error
