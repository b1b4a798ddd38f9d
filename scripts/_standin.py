"""A node whose trainer has no model: contributions of any number of parameters, for measuring the node.

    python -P scripts/_standin.py start --home DIR ...      as `tapestry start`, of STANDIN_PARAMS parameters

The node's command starts a worker of this file in place of the real one. That takes STANDIN_STEP_S for its
"inner steps" and then writes valid payloads, noise that is drawn once, into the shared memory, as the real
one does. So what a node of a thousand million parameters needs is measured where none such can be trained.
"""

from __future__ import annotations

import functools
import math
import os
import socket
import sys
import time
from typing import Any

import torch

from tapestry.compression.codecs import get_codec
from tapestry.compression.payloads import PayloadLayout
from tapestry.node.spec.tables import read_table
from tapestry.node.spec.training import WorkerSettings
from tapestry.node.trainer import messages as tm
from tapestry.node.trainer.opening import ChannelClosed
from tapestry.node.trainer.shared import BUFFERS, map_slot, map_vector
from tapestry.node.trainer.worker import Channel

SCALE = 1e-3  # of the noise
DRAW = 1 << 22  # elements of the initial state at a time


def main() -> None:
    if "--channel" in sys.argv:
        torch.set_num_threads(1)
        fds = {name: _option(name) for name in BUFFERS}
        Worker(Channel(socket.socket(fileno=_option("channel"))), fds).run()
        return
    from tapestry.node.cli.main import main as tapestry
    from tapestry.node.spec import size
    from tapestry.node.trainer.process import TrainerProcess

    size.parameters_of = lambda spec: int(os.environ["STANDIN_PARAMS"])  # whatever the spec's preset has

    command = (sys.executable, "-P", os.path.abspath(__file__))
    TrainerProcess.launch = functools.partial(TrainerProcess.launch, command=command)  # type: ignore[method-assign]
    sys.exit(tapestry())


class Worker:
    """Obeys as trainer/worker.py."""

    def __init__(self, channel: Channel, fds: dict[str, int]) -> None:
        self._channel = channel
        self._fds = fds
        self._n = int(os.environ["STANDIN_PARAMS"])
        self._step_s = float(os.environ["STANDIN_STEP_S"])
        self._layout: PayloadLayout
        self._payloads: dict[int, Any] = {}  # elements of a shard -> uint8 payload of noise

    def run(self) -> None:
        """Until Stop, or until the node is gone."""
        configure = self._channel.receive(wait=True)
        assert isinstance(configure, tm.Configure)
        self._prepare(read_table(WorkerSettings, configure.settings))
        hello = {"train_tokens": 1, "validation_tokens": 1, "device": "cpu", "inner_epoch": -1, "note": ""}
        self._channel.send(tm.Hello(names=("all",), shapes=((self._n,),), **hello))
        try:
            while not isinstance(command := self._channel.receive(wait=True), tm.Stop):
                self._obey(command)
        except ChannelClosed:
            return

    def _prepare(self, settings: WorkerSettings) -> None:
        codec = get_codec(settings.codec)
        self._layout = PayloadLayout.of(codec, self._n, settings.shard_elements)
        generator = torch.Generator().manual_seed(settings.node_seed & 0xFFFFFFFF)
        for n in {shard.n for shard in self._layout.shards}:
            self._payloads[n] = codec.encode(SCALE * torch.randn(n, generator=generator))

    def _obey(self, command: tm.Command | None) -> None:
        if isinstance(command, tm.Initialise):
            self._initialise()
        elif isinstance(command, tm.Evaluate):
            self._channel.send(tm.Validation(command.epoch, 1.0))
        elif isinstance(command, tm.Save):
            self._channel.send(tm.Saved(command.epoch, ""))
        elif isinstance(command, tm.Begin):
            time.sleep(self._step_s)
            self._contribute(command)

    def _initialise(self) -> None:
        vector = map_vector(self._fds["initial"], self._n, writable=True)
        noise = SCALE * torch.randn(min(DRAW, self._n))
        for start in range(0, self._n, DRAW):
            vector[start : start + DRAW] = noise[: min(DRAW, self._n - start)]
        self._channel.send(tm.Initialised())

    def _contribute(self, command: tm.Begin) -> None:
        out = map_slot(self._fds["contribution"], self._layout.size, command.slot, writable=True)
        for shard, payload in zip(self._layout.shards, self._layout.views(out), strict=True):
            payload.copy_(self._payloads[shard.n])
        told: dict[str, Any] = {"weight": 1, "norm": SCALE * math.sqrt(self._n), "loss": 1.0, "tokens": 1}
        told |= {"steps": 1, "waited_s": 0.0}
        self._channel.send(tm.Contribution(epoch=command.epoch, generation=command.generation, **told))


def _option(name: str) -> int:
    for index, argument in enumerate(sys.argv):
        if argument == f"--{name}":
            return int(sys.argv[index + 1])
        if argument.startswith(f"--{name}="):
            return int(argument.partition("=")[2])
    raise SystemExit(f"--{name} is missing")


if __name__ == "__main__":
    main()
