"""A worker without a model, run as a child by test_process.py: one way of misbehaving per mode.

fake_worker.py MODE FLAG --channel FD ...; FLAG is a file by which a mode knows that it ran before.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

from tapestry.node.trainer import messages
from tapestry.node.trainer.messages import HEADER, body_length, pack, unpack_command
from tapestry.node.trainer.shared import SLOTS

N = 6


def main(mode: str, flag: Path, channel: socket.socket) -> int:
    ran_before = flag.exists()
    flag.touch()
    read(channel)  # Configure
    if mode == "no data":
        channel.sendall(pack(messages.Failed("data", "no such file: give --data")))
        return 3
    if mode == "dies before hello":
        print("first line\nlast words", file=sys.stderr)  # noqa: T201
        return 5
    if mode == "reads slowly":
        time.sleep(2.5)
    if mode == "tokenizes":
        for done in (3, 6):
            channel.sendall(pack(messages.Tokenizing(done, 6, 1.5)))
    shape = (2, 3) if not (mode == "another model" and ran_before) else (3, 2)
    channel.sendall(pack(messages.Hello(("weight",), (shape,), 100, 10, "cpu", -1, "")))
    while True:
        command = read(channel)
        if isinstance(command, messages.Stop):
            if mode == "deaf to stop":
                signal.pause()
            return 0
        if isinstance(command, messages.Evaluate):
            if mode == "crashes once" and not ran_before:
                os.kill(os.getpid(), signal.SIGKILL)
            channel.sendall(pack(messages.Validation(command.epoch, 2.5)))
        if isinstance(command, messages.Judge):
            if mode == "crashes once" and not ran_before:
                os.kill(os.getpid(), signal.SIGKILL)
            channel.sendall(pack(messages.Judged("another", 9.0, 9.0)))
            channel.sendall(pack(messages.Judged(command.head, 2.5, 2.75)))
        if isinstance(command, messages.Save) and mode == "saves slowly":
            time.sleep(2.5)
            channel.sendall(pack(messages.Saved(command.epoch, "")))
        if isinstance(command, messages.Initialise):
            os.kill(os.getpid(), signal.SIGKILL)
        if isinstance(command, messages.Begin):
            on_begin(mode, ran_before, channel, command)


def on_begin(mode: str, ran_before: bool, channel: socket.socket, command: messages.Begin) -> None:
    epoch, generation = command.epoch, command.generation
    if mode in ("crashes once", "another model") and not ran_before:
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "crashes always":
        print("out of memory", file=sys.stderr)  # noqa: T201
        sys.exit(7)
    if mode == "garbage" and not ran_before:
        channel.sendall(HEADER.pack(3) + b"abc")
        signal.pause()
    if mode == "huge frame" and not ran_before:
        channel.sendall(HEADER.pack(2**32 - 1))
        signal.pause()
    if mode == "silent" and not ran_before:
        signal.pause()
    if mode == "stale":
        channel.sendall(pack(contribution(epoch - 1, generation)))
    if mode == "late":  # it was on its way when the same epoch began once more
        if generation == 1:
            return
        channel.sendall(pack(contribution(epoch, generation - 1)))
    if mode == "slow":
        for _ in range(6):
            channel.sendall(pack(messages.Alive()))
            time.sleep(0.3)
    if mode == "writes":
        write(command)
    weight = 5
    if mode == "tells what it is told":
        weight = 10 + command.counted + 100 * command.afresh + 1000 * command.follows
    channel.sendall(pack(contribution(epoch, generation, weight)))


def write(command: messages.Begin) -> None:
    """The epoch in every byte of the place that we were given."""
    fd = int(next(a for a in sys.argv if a.startswith("--contribution=")).partition("=")[2])
    size = os.fstat(fd).st_size // SLOTS
    os.pwrite(fd, bytes([command.epoch]) * size, command.slot * size)


def contribution(epoch: int, generation: int, weight: int = 5) -> messages.Contribution:
    return messages.Contribution(
        epoch, generation, weight, norm=1.0, loss=2.0, tokens=5, steps=1, waited_s=0.0
    )


def read(channel: socket.socket) -> messages.Command:
    header = channel.recv(HEADER.size, socket.MSG_WAITALL)
    if not header:
        sys.exit(0)
    return unpack_command(channel.recv(body_length(header), socket.MSG_WAITALL))


if __name__ == "__main__":
    descriptor = int(sys.argv[sys.argv.index("--channel") + 1])
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), socket.socket(fileno=descriptor)))
