"""`from tapestry.node import Swarm`: an ordinary PyTorch loop, trained together with others.

    with Swarm(module, optimizer, home="mine", peer=ADDRESS, inner_steps=50) as swarm:
        for x, y in batches:
            loss = criterion(module(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if swarm.step(loss) and swarm.epoch >= 10:
                break

The script's process takes the place of the node's trainer; all else is the node's as it is, in a process of
its own, with the same guarantees (docs/decisions/012-library.md):

    your process                                the node: a child of yours, or one that runs
      loop -> swarm.step                          rounds, records, links, state, disk, metrics
        library/member.py   <- frames, a socket ->   trainer/process.py
        library/module.py   <- shared memory    ->   state/model.py
      library/daemon.py     starts, watches, ends    daemon/launch.py, trainer/guest.py

Every `inner_steps` steps (DiLoCo) `step` hands in base minus local parameters, encoded, waits for the round
and loads the new base into the module; the optimizer keeps its state. With inner_steps=0 it hands in the
mean gradient of `accumulation` batches, and the run's outer optimizer takes the step: there is no optimizer
of your own then. Between two calls of `step` the module is yours alone: nothing runs in a thread.

Who starts without a peer founds the run, with the module's parameters as state 0 and the arguments here as
its spec. Who joins gets spec and base by the one address; arguments that it gives must say the same, and a
module of another layout is refused. What is trained is what requires a gradient; buffers are each member's
own.

A script that is started again with the same home goes on where the run is.
"""

from __future__ import annotations

import atexit
import operator
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from tapestry.node.errors import UserError
from tapestry.node.home import Home
from tapestry.node.library.daemon import Daemon
from tapestry.node.library.errors import SwarmError
from tapestry.node.library.member import Loop, Member
from tapestry.node.library.module import Trained
from tapestry.node.library.optimizer import require_no_copies
from tapestry.node.library.wanted import Wanted
from tapestry.node.spec.run import RunSpec
from tapestry.node.spec.tables import TableError, read_table
from tapestry.node.spec.training import WorkerSettings
from tapestry.node.surface import control
from tapestry.node.trainer.messages import Configure, Failed
from tapestry.node.trainer.opening import ChannelClosed
from tapestry.node.trainer.worker import Channel

LEAVE_S = 20.0  # the node's own limit is 10 s
UP_S = 60.0  # from the first base to node.json. Guess
SIGN_OF_LIFE_S = 5.0  # of waiting, before the first word of it; then every other so often


class Swarm:
    """A member of a run, around your loop. A context manager; or call `open` and `close`.

    `peer`: an invitation, the address of any one member, or several; none founds the run, or goes on with the
    home's. `inner_steps`, `name` and `run`, a table as in run.toml such as {"round": {"min_members": 2}}, are
    what all members agree on. `evaluate` gives a validation loss of the module; it is called now and then on
    a new base. `flags` are further ones of `tapestry start`. `tell` gets what a person should read; by
    default it goes to stderr.

    Raises SwarmError: str() is one line that says what to do.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        home: str | os.PathLike[str],
        peer: str | Sequence[str] = (),
        run_id: str | None = None,
        name: str | None = None,
        inner_steps: int | None = None,
        run: Mapping[str, Any] | None = None,
        evaluate: Callable[[], float] | None = None,
        flags: Sequence[str] = (),
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.module = module
        if optimizer is not None:
            require_no_copies(optimizer)
        self._loop = Loop(Trained(module), optimizer, evaluate)
        self._wanted = Wanted.of(self._loop.trained.layout, name, inner_steps, run or {})
        self._home = Home(Path(home).expanduser().absolute())
        peers = (peer,) if isinstance(peer, str) else tuple(peer)
        self._peers = tuple(one for one in peers if one)
        self._run_id = run_id
        self._flags = tuple(flags)
        self._tell = tell or _write_to_stderr
        self._daemon: Daemon | None = None
        self._member: Member
        self._fds: dict[str, int] = {}
        self._opener = 0  # pid of the process that has opened it: a fork must not close it
        self._told_s = 0.0
        self.spec: RunSpec  # of the run, once it is open

    # --- life ----------------------------------------------------------------------------------

    def __enter__(self) -> Swarm:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        code = self.close()
        if code and kind is None:
            raise SwarmError(f"the node ended with exit code {code}", f"see {self._home.log}")

    def open(self) -> Swarm:
        """Found, join or go on; returns when the module holds the run's base. Raises SwarmError."""
        if self._daemon is not None:
            raise SwarmError("this swarm is open already")
        self._opener = os.getpid()
        try:
            self._daemon = Daemon.find(self._home) or self._start()
        except UserError as error:
            raise SwarmError(str(error), error.hint, error.details) from error
        atexit.register(self.close)
        try:
            self._join(self._daemon)
        except ChannelClosed:
            raise self._failure() from None
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> int:
        """Leave in good order: the others are told, state and optimizer are saved. The node's exit code.

        Nothing happens if it is closed. A node that was running already goes on running.
        """
        daemon, self._daemon = self._daemon, None
        if daemon is None or os.getpid() != self._opener:
            return 0
        atexit.unregister(self.close)
        try:
            daemon.stop()
            if hasattr(self, "_member"):
                if daemon.is_child:
                    self._member.serve_until_gone(LEAVE_S)
                else:
                    self._member.save(self._member.epoch)
        finally:
            code = daemon.close()
            for fd in self._fds.values():
                os.close(fd)
            self._fds = {}
        return code

    def _start(self) -> Daemon:
        self._home.require_owner()
        self._home.require_restored()
        if not self._peers and not self._home.genesis.exists():
            self._home.create()
            self._wanted.write_run_toml(self._home.run_toml)
        flags = [f"--peer={peer}" for peer in self._peers]
        flags += [f"--run-id={self._run_id}"] if self._run_id else []
        if not self._home.node_toml.exists():
            flags.append("--http=127.0.0.1:0")
        return Daemon.start(self._home, [*flags, *self._flags])

    def _join(self, daemon: Daemon) -> None:
        """Agree on the run, say hello, and wait for the base."""
        self._fds = daemon.receive_buffers()
        channel = Channel(daemon.connection)
        daemon.wait_for_word(self._sign_of_life)
        first = channel.receive(wait=True)
        if not isinstance(first, Configure):
            raise ChannelClosed  # a node that cannot begin says that it ends, and no more
        try:
            settings = read_table(WorkerSettings, first.settings)
            self.spec = RunSpec.from_canonical(settings.run_spec.encode())
            self._wanted.require(self.spec)
            self._require_optimizer()
        except (TableError, UserError) as error:
            raise SwarmError(f"the node speaks another version of this protocol: {error}") from error
        except SwarmError as error:
            channel.send_last(Failed("model", error.line))
            raise
        member = Member(daemon.connection, self._fds, settings, self._loop)
        member.say_hello()
        member.wait_for_base(self._sign_of_life)
        self._member = member
        daemon.info(UP_S)
        self._tell(
            f"run {self.spec.name}, epoch {self.epoch}; swarm.invite() gives a line by which others join"
        )

    def _require_optimizer(self) -> None:
        if self.spec.train.inner_steps and self._loop.optimizer is None:
            raise SwarmError(
                f"the run takes {self.spec.train.inner_steps} inner steps, which need an optimizer",
                "Swarm(module, optimizer, ...)",
            )
        if not self.spec.train.inner_steps and self._loop.optimizer is not None:
            raise SwarmError(
                "the run averages gradients (inner_steps = 0), and its outer optimizer takes the steps",
                "Swarm(module, ...) without an optimizer, and no optimizer.step() in the loop",
            )

    # --- the loop ------------------------------------------------------------------------------

    def step(self, loss: Tensor | float | None = None, samples: SupportsIndex = 1) -> bool:
        """After each optimizer.step(), or each backward() with inner_steps=0. Whether there is a new base.

        `loss` is for those who watch. `samples`: how many this step was made of, a whole number, also in a
        tensor or of numpy, in a unit that all members use. It weighs where the run's voice is "tokens".
        At the end of a round it waits for the others, and loads what came of it into the module.
        Raises SwarmError if the node has gone, or what would be contributed is not finite; ValueError.
        """
        if self._daemon is None:
            raise SwarmError("this swarm is not open", "with Swarm(...) as swarm:")
        count = _whole(samples)
        value = None if loss is None else float(loss.detach()) if isinstance(loss, Tensor) else float(loss)
        try:
            return self._member.step(value, count, self._sign_of_life)
        except ChannelClosed:
            raise self._failure() from None

    @property
    def epoch(self) -> int:
        """How many updates the run had committed when it made the base that the module began from."""
        return self._member.epoch

    @property
    def inner_step(self) -> int:
        """Steps since that base."""
        return self._member.inner_step

    @property
    def address(self) -> str:
        """Of this node: `peer` of others' Swarm, which wait until they are admitted."""
        return str(self._node().info(UP_S).addresses[0])

    def invite(self, uses: int = 1, name: str = "", lasts_s: int = 7 * 86_400) -> str:
        """A line with which so many join: `peer` of their Swarm. For whoever may admit: the run's founder."""
        try:
            invitation, _ = control.invite(self._home, name, uses, lasts_s)
        except UserError as error:
            raise SwarmError(str(error), error.hint) from error
        return invitation.line

    @property
    def peers(self) -> list[dict[str, Any]]:
        """The other members that are up: peer_id, phase, epoch, ... as `tapestry peers --json` has it."""
        peers: list[dict[str, Any]] = self._node().ask("/peers")
        return peers

    def status(self) -> dict[str, Any]:
        """What `/status` says: phase and its reason, head, state_digest, ..."""
        status: dict[str, Any] = self._node().ask("/status")
        return status

    # --- pieces --------------------------------------------------------------------------------

    def _node(self) -> Daemon:
        if self._daemon is None:
            raise SwarmError("this swarm is not open", "with Swarm(...) as swarm:")
        return self._daemon

    def _failure(self) -> SwarmError:
        """The node has gone: why."""
        error = self._node().failure()
        self.close()
        return error

    def _sign_of_life(self, waited_s: float) -> None:
        """Waiting for the node: say for what, now and then."""
        if waited_s < SIGN_OF_LIFE_S or time.monotonic() - self._told_s < 2 * SIGN_OF_LIFE_S:
            return
        self._told_s = time.monotonic()
        try:
            status = self.status()
            what = f"{status['phase']}, {status['reason']}" if status["reason"] else status["phase"]
        except SwarmError:
            what = "the node is starting"
        self._tell(f"waiting for {waited_s:.0f} s: {what}")


def _whole(samples: SupportsIndex) -> int:
    try:
        count = operator.index(samples)
    except TypeError:
        raise ValueError(f"samples is a whole number, not {samples!r}: int(...) makes one of it") from None
    if count < 1:
        raise ValueError(f"samples is at least 1, not {count}")
    return count


def _write_to_stderr(text: str) -> None:
    sys.stderr.write(f"tapestry: {text}\n")
    sys.stderr.flush()
