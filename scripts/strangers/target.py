"""What is attacked, and how an attack gets its name.

An attack is one function of endpoint.py or peers.py, `async def name(target)`, under
`@attack("what it does")`. It runs until it is cancelled, in a process of its own (hostile.py).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

BEGUN = "begun"  # the file by which an attack says that it has
BUSY = "busy"  # in place of an attack, in the quiet times


@dataclass(frozen=True, slots=True)
class Target:
    """The member under attack, as anybody can know it who was told its address."""

    address: str  # /ip4/.../p2p/...
    run_id: str
    http: str
    strength: int  # connections, or whatever an attack has many of
    folder: Path  # of the hostile process: identities and sockets

    @property
    def endpoint(self) -> tuple[str, int]:
        host, port = self.http.removeprefix("http://").split(":")
        return host, int(port)

    def begin(self) -> None:
        """Said by an attack when it begins: what comes before is the start of its process."""
        (self.folder / BEGUN).touch()

    @property
    def p2p_port(self) -> int:
        return int(self.address.split("/tcp/")[1].split("/")[0])

    @property
    def peer_id(self) -> str:
        return self.address.rsplit("/", 1)[1]


Attack = Callable[[Target], Awaitable[None]]
ATTACKS: dict[str, tuple[str, Attack]] = {}
LINK = " (try --open too)"  # of an attack that is heard only by who has a link with the attacker


def attack(what: str, heard: str = "") -> Callable[[Attack], Attack]:
    """Names an attack; its function's name is how it is called. `heard`: LINK, where a link matters."""

    def add(function: Attack) -> Attack:
        ATTACKS[function.__name__.replace("_", "-")] = (what + heard, function)
        return function

    return add
