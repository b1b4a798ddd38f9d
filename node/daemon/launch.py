"""The first seconds of a node: logging, the home's lock, the loop, and a trainer that imports while we do.

The trainer's process is started before this one imports torch and hivemind, which takes as long as its own
imports. Whatever ends the start ends it too: the kernel kills it when its parent is gone.

Must not import torch, hivemind or transformers before the trainer runs.
"""

from __future__ import annotations

import os

import uvloop

from tapestry.node.daemon.descriptors import raise_limit
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.spec.node import NodeConfig
from tapestry.node.surface.logs import LiveLine, start_logging
from tapestry.node.trainer import imports
from tapestry.node.trainer.guest import Door, Line
from tapestry.node.trainer.process import TrainerProcess


def run(config: NodeConfig) -> int:
    """Run a node until it is stopped. Returns 0; raises UserError."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing of ours asks a hub for anything
    raise_limit()
    live = start_logging(config.log_format)
    config.home.create()
    with config.home.lock():
        code: int = uvloop.run(_run(config, live))
        return code


async def _run(config: NodeConfig, live: LiveLine) -> int:
    if config.external:
        return await _run_for_scripts(config, live)
    trainer = await TrainerProcess.launch(config.threads, folder=config.home.state)
    return await _run_with(trainer, config, live)


async def _run_for_scripts(config: NodeConfig, live: LiveLine) -> int:
    """The trainer is the process of the script that started us, or of those that come. Raises UserError."""
    try:
        hire = Door(config.home.trainer_socket) if config.script_fd is None else Line(config.script_fd)
    except OSError as error:
        raise UserError(f"cannot listen for scripts in {config.home.path}: {error.strerror}") from error
    try:
        trainer = TrainerProcess.await_guests(hire, config.home.state)
        return await _run_with(trainer, config, live)
    finally:
        hire.close()


async def _run_with(trainer: TrainerProcess, config: NodeConfig, live: LiveLine) -> int:
    try:
        imports.submodules_only("hivemind")  # not its optimizers, averagers and experts, nor scipy for them
        try:
            with imports.lasting():
                from tapestry.node.daemon.life import Daemon  # takes seconds, in which the loop stands still
        except OSError as error:  # hivemind makes locks of multiprocessing when it is imported
            raise _no_shared_memory(error) from error
        return await Daemon(config, live, trainer).run()
    finally:
        await trainer.stop(0)


def _no_shared_memory(error: OSError) -> UserError:
    return UserError(
        f"cannot start: {error.strerror or error}, most likely of /dev/shm, this machine's shared memory",
        exit_code=ExitCode.FAILED,
        hint="look at `df /dev/shm`: it must be a tmpfs that this user may write to, with room in it",
    )
