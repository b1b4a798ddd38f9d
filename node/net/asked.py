"""What a start can be refused for before it asks anybody: its run, its spec, and whom it is to join.

Looked at before torch and hivemind are imported (daemon/early.py), and again by join.py. Must not import
them.
"""

from __future__ import annotations

from collections.abc import Sequence

from tapestry.dht.addresses import PeerAddress
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.protocol.record import Genesis
from tapestry.node.spec.node import NodeConfig
from tapestry.node.spec.run import RunSpec, diff, proposals

TAKE_IT = "remove the file, or point --run elsewhere, to take the run as it is"


def spec_to_found(config: NodeConfig) -> RunSpec:
    """Of the run that this start founds. Raises UserError."""
    if config.run is None:
        raise UserError(
            f"there is no run: {config.home.path} holds none, and neither --peer nor a run.toml is given",
            hint="`tapestry init DIR` writes a run.toml to found a run with; `--peer ADDRESS` joins one",
        )
    if config.run_id is not None:
        raise UserError("--run-id names a run to join, but no --peer is given to join it by")
    return RunSpec.load_to_found(config.run)


def own_spec(config: NodeConfig, genesis: Genesis) -> RunSpec:
    """Of the home's run, which goes on. Raises UserError if --run-id or a run.toml means another."""
    spec = RunSpec.of_genesis(genesis)
    check_run_id(config, genesis.run_id, str(config.home.path))
    if config.run is not None:
        _check_own_spec(config, RunSpec.load(config.run), spec)
    return spec


def check_run_id(config: NodeConfig, run_id: str, whose: str) -> None:
    """Raises UserError if --run-id is another."""
    if config.run_id is not None and config.run_id != run_id:
        raise UserError(
            f"--run-id is {config.run_id}, but {whose} is of run {run_id}", exit_code=ExitCode.REFUSED
        )


def _check_own_spec(config: NodeConfig, here: RunSpec, spec: RunSpec) -> None:
    """And what the run of this home was founded with: it stays so, and records change what can be changed."""
    differences = diff(here, spec, "in the run")
    if not differences:
        return
    asked = proposals(here, spec)
    commands = " and ".join(f"tapestry propose set {one}" for one in asked)
    change = f"with the file as it was, ask all members for it: {commands}; or " if asked else ""
    raise UserError(
        f"{config.run} differs from the run in {config.home.path}, which goes on as it was founded:",
        exit_code=ExitCode.REFUSED,
        details=tuple(differences),
        hint=change + TAKE_IT,
    )


def refuse_ourselves(peers: Sequence[PeerAddress], peer_id: str) -> None:
    """Raises UserError if one of --peer is the key of this home."""
    for peer in peers:
        if peer.peer_id == peer_id:
            raise UserError(
                f"--peer {peer.maddr} has the key of this home itself",
                exit_code=ExitCode.REFUSED,
                hint="name another member; if this home is a copy of that node's, give it a key of its own: "
                "remove identity.key, vote.json and home.json from it",
            )
