"""The first seconds of a node: logging, the home's lock, the loop, and a trainer that imports while we do.

The trainer's process is started before this one imports torch and hivemind, which takes as long as its own
imports. Whatever ends the start ends it too: the kernel kills it when its parent is gone.

Must not import torch, hivemind or transformers before the trainer runs.
"""

from __future__ import annotations

import logging
import os

import uvloop

from tapestry.node.daemon.descriptors import raise_limit
from tapestry.node.daemon.early import check_early
from tapestry.node.daemon.notify import Notifier
from tapestry.node.disk.home_mark import claim
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.spec.node import NodeConfig
from tapestry.node.surface.logs import Log, LogLimits, start_logging
from tapestry.node.trainer import imports
from tapestry.node.trainer.guest import Door, Line
from tapestry.node.trainer.process import TrainerProcess

_log = logging.getLogger("tapestry.node")


def run(config: NodeConfig) -> int:
    """Run a node until it is stopped. Returns 0; raises UserError, and KeyboardInterrupt of a node that was
    not up yet."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing of ours asks a hub for anything
    raise_limit()
    notifier = Notifier(os.environ)  # before there are children that would inherit what it takes
    log = start_logging(config.log_format)
    try:
        config.home.create()
        with config.home.lock():
            # Meant for a node before us. What comes from now on is for us, and heeded as soon as we can look.
            config.home.stop_request.unlink(missing_ok=True)
            _keep_log(log, config)
            _claim(config)
            check_early(config)
            code: int = uvloop.run(_run(config, log, notifier))
            _log.info("ended exit_code=%d", code)
            if code:
                raise KeyboardInterrupt
            return code
    except UserError as error:
        is_told = config.log_format == "json" and log.is_on_screen  # as JSON, like all the rest
        if not is_told:
            log.leave_screen()  # the command line says it there
        words = "ended=failed exit_code=%d reason=%r next=%r"
        _log.error(words, error.exit_code, error.line, error.hint or "")
        if not is_told:
            raise
        return int(error.exit_code)
    except Exception as error:
        if config.log_format == "text":
            log.leave_screen()
        _log.critical("ended=failed exit_code=1 reason=%r", repr(error), exc_info=True)
        raise
    finally:
        log.close()


def _claim(config: NodeConfig) -> None:
    """It must be the original, and of a format that we know."""
    try:
        claim(config.home)
    except OSError as error:
        raise UserError(f"cannot write {config.home.mark}: {error.strerror}") from error


def _keep_log(log: Log, config: NodeConfig) -> None:
    """In the home, which is ours now."""
    home, limits = config.home, LogLimits(config.log_file_mb << 20, config.log_files)
    try:
        log.keep_in(home.log, home.log_levels, home.output, limits)
    except OSError as error:
        raise UserError(
            f"cannot write {home.log}: {error.strerror}",
            hint="make the home writable for this user, or give this node another --home",
        ) from error


async def _run(config: NodeConfig, log: Log, notifier: Notifier) -> int:
    if config.external:
        return await _run_for_scripts(config, log, notifier)
    trainer = await TrainerProcess.launch(config.threads, folder=config.home.state)
    return await _run_with(trainer, config, log, notifier)


async def _run_for_scripts(config: NodeConfig, log: Log, notifier: Notifier) -> int:
    """The trainer is the process of the script that started us, or of those that come. Raises UserError."""
    try:
        hire = Door(config.home.trainer_socket) if config.script_fd is None else Line(config.script_fd)
    except OSError as error:
        raise UserError(f"cannot listen for scripts in {config.home.path}: {error.strerror}") from error
    try:
        trainer = TrainerProcess.await_guests(hire, config.home.state)
        return await _run_with(trainer, config, log, notifier)
    finally:
        hire.close()


async def _run_with(trainer: TrainerProcess, config: NodeConfig, log: Log, notifier: Notifier) -> int:
    try:
        imports.submodules_only("hivemind")  # not its optimizers, averagers and experts, nor scipy for them
        imports.spare_torch()
        try:
            with imports.lasting():
                from tapestry.node.daemon.life import Daemon  # takes seconds, in which the loop stands still
        except OSError as error:  # hivemind makes locks of multiprocessing when it is imported
            raise _no_shared_memory(error) from error
        return await Daemon(config, log, trainer, notifier).run()
    finally:
        await trainer.stop(0)


def _no_shared_memory(error: OSError) -> UserError:
    return UserError(
        f"cannot start: {error.strerror or error}, most likely of /dev/shm, this machine's shared memory",
        exit_code=ExitCode.FAILED,
        hint="look at `df /dev/shm`: it must be a tmpfs that this user may write to, with room in it",
    )
