"""What people ask of the node that runs in a home, over HOME/control.sock. daemon/control.py answers.

A change of who belongs to the run needs the node's key and its swarm, so it is asked for and not made here.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home, Liveness
from tapestry.node.net.admission import who_admits
from tapestry.node.protocol.members import Roll, invite_value
from tapestry.node.spec.invitation import Invitation
from tapestry.node.trainer.guest import knock

ANSWER_S = 10.0
BYTES_MAX = 8 << 20


def ask(home: Home, request: Mapping[str, Any]) -> dict[str, Any]:
    """What the running node answers. Raises UserError."""
    if home.read_node_json().liveness is not Liveness.RUNNING:
        raise not_running(home)
    try:
        with knock(home.control_socket) as connection:
            connection.settimeout(ANSWER_S)
            connection.sendall(json.dumps(request).encode() + b"\n")
            answer = json.loads(_line(connection))
    except (OSError, ValueError) as error:
        raise UserError(
            f"the node in {home.path} does not answer: {error}", exit_code=ExitCode.FAILED
        ) from error
    if "fault" in answer:
        raise UserError(f"not done: {answer['fault']}", exit_code=ExitCode.REFUSED)
    return dict(answer)


def invite(home: Home, name: str, uses: int, lasts_s: int) -> tuple[Invitation, dict[str, Any]]:
    """A new invitation, and what the node answers; it is good from the next record on. `lasts_s` 0: for ever.

    Raises UserError.
    """
    info = home.read_node_json().info
    if info is None or not info.addresses:
        raise not_running(home)
    invitation = Invitation.drawn(info.addresses[0], info.run_id)
    expires_at = int(time.time()) + lasts_s if lasts_s else 0
    value = invite_value(name, uses, expires_at)
    return invitation, ask(home, {"do": "ask", "kind": "invite", "peer": invitation.key, "value": value})


def roll_table(roll: Roll, phases: Mapping[str, str]) -> dict[str, Any]:
    """A roll as `tapestry members` shows it. `phases`: by peer, of those who are heard."""
    return {
        "run_id": roll.run_id,
        "charter": asdict(roll.charter),
        "settings": dict(roll.settings),
        "admitted_by": who_admits(roll),
        "members": [
            {
                "peer": peer,
                "name": seat.name,
                "since": seat.since,
                "voice": seat.voice,
                "founder": peer in roll.council,
                "phase": phases.get(peer, ""),
            }
            for peer, seat in roll.members.items()
        ],
        "invites": [{"key": key, **asdict(invite)} for key, invite in roll.invites.items()],
        "removed": dict(roll.removed),
    }


def not_running(home: Home) -> UserError:
    return UserError(
        f"no node is running in {home.path}",
        exit_code=ExitCode.FAILED,
        hint="start it: a change of members needs its key and its swarm",
    )


def _line(connection: socket.socket) -> bytes:
    data = bytearray()
    while not data.endswith(b"\n"):
        piece = connection.recv(1 << 16)
        if not piece or len(data) > BYTES_MAX:
            raise ValueError("its answer is not whole")
        data += piece
    return bytes(data)
