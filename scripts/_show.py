"""What a story shows of its nodes: a table that stays, on a terminal, or lines."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

from _nodes import Node
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text


class Show(Protocol):
    def update(self, nodes: Sequence[Node], elapsed_s: float) -> None: ...
    def event(self, text: str, *, bad: bool = False) -> None: ...
    def finish(self) -> None: ...


@contextlib.contextmanager
def opened_show(title: str, plain: bool) -> Iterator[Show]:
    console = Console(highlight=False)
    if plain or not console.is_terminal:
        yield Lines()
        return
    with Live(console=console, auto_refresh=False) as live:  # no thread: we fork
        yield LiveTable(live, title)


class LiveTable:
    """One table that stays; events scroll by above it."""

    def __init__(self, live: Live, title: str) -> None:
        self._live = live
        self._title = title

    def update(self, nodes: Sequence[Node], elapsed_s: float) -> None:
        table = Table(title=f"{self._title}, {elapsed_s:.0f} s", title_justify="left")
        for column in ("node", "phase"):
            table.add_column(column)
        for column in ("epoch", "loss", "tokens/s", "peers", "sent", "state digest"):
            table.add_column(column, justify="right")
        for node in nodes:
            table.add_row(node.label.removeprefix("node "), *cells(node))
        urls = [Text(f"{n.label}  {n.info['http']}/metrics") for n in nodes if n.info.get("http")]
        self._live.update(Group(table, *urls), refresh=True)

    def event(self, text: str, *, bad: bool = False) -> None:
        self._live.console.print(Text(text, style="bold red" if bad else ""), soft_wrap=True)

    def finish(self) -> None:
        """The table stays as it is; what is said from now on comes below it."""
        self._live.stop()


class Lines:
    """A line for a node whenever its epoch moves or it appears, for logs and pipes."""

    def __init__(self) -> None:
        self._shown: dict[str, tuple[int, bool]] = {}

    def update(self, nodes: Sequence[Node], elapsed_s: float) -> None:
        for node in nodes:
            state = (node.epoch, bool(node.info.get("http")))
            if not node.status or self._shown.get(node.label) == state:
                continue
            if state[1] and not self._shown.get(node.label, (0, False))[1]:
                self.event(f"{node.label}: metrics {node.info['http']}/metrics")
            self._shown[node.label] = state
            names = ("phase", "epoch", "loss", "tokens/s", "peers", "sent", "state digest")
            words = "  ".join(f"{name} {cell}" for name, cell in zip(names, cells(node), strict=True))
            self.event(f"{elapsed_s:6.1f} s  {node.label}  {words}")

    def event(self, text: str, *, bad: bool = False) -> None:
        print(text, flush=True)

    def finish(self) -> None:
        pass


def cells(node: Node) -> list[str]:
    """phase, epoch, loss, tokens/s, peers, sent, state digest; "-" for what is not known."""
    status = node.status
    loss, speed, peers = status.get("loss"), status.get("tokens_per_second"), status.get("peers")
    return [
        str(status.get("phase") or ("starting" if node.running else "-")),
        str(node.epoch) if node.epoch >= 0 else "-",
        f"{loss:.3f}" if isinstance(loss, int | float) else "-",
        f"{speed:.0f}" if isinstance(speed, int | float) else "-",
        "-" if peers is None else str(len(peers) if isinstance(peers, list | dict) else peers),
        megabytes(sum(node.bytes_sent.values())),
        node.digest[:12] or "-",
    ]


def bytes_text(sent: dict[str, float]) -> str:
    parts = ", ".join(f"{kind} {megabytes(count)}" for kind, count in sent.items())
    return f"{megabytes(sum(sent.values()))} ({parts})"


def megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB"
