"""What /status, /peers and /readyz say of a node: read from the runtime when asked, nothing kept."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from tapestry.node.protocol.messages import Stage

if TYPE_CHECKING:
    from tapestry.node.daemon.runtime import Runtime


class NodeView:
    """The http.View of a node, from before it has joined until it has stopped."""

    def __init__(
        self,
        version: str,
        started_at: float,
        upload_bytes_per_second: float | None = None,  # the caps; None: there is none
        download_bytes_per_second: float | None = None,
    ) -> None:
        self.stopping = False
        self._caps = {
            "upload_bytes_per_second": upload_bytes_per_second,
            "download_bytes_per_second": download_bytes_per_second,
        }
        self._version = version
        self._started_at = started_at
        self._runtime: Runtime | None = None
        self._run_id = ""
        self._run_name = ""

    def attach(self, runtime: Runtime, run_id: str, run_name: str) -> None:
        """From now on there is something to show."""
        self._runtime, self._run_id, self._run_name = runtime, run_id, run_name

    def status(self) -> dict[str, Any]:
        """The contract's keys. `epoch`, `head` and `state_digest` are of one state, the one we hold."""
        runtime = self._runtime
        base: dict[str, Any] = {
            "peer_id": "",
            "run_id": self._run_id,
            "run_name": self._run_name,
            "version": self._version,
            "phase": "stopping" if self.stopping else "starting",
            "reason": "",
            "epoch": 0,
            "head": "",
            "state_digest": "",
            "params": 0,
            "loss": None,
            "val_loss": None,
            "tokens_total": 0,
            "tokens_per_second": 0.0,
            "peers": 0,
            "round": None,
            "dropped_records": 0,
            "dropped_weight": 0,
            "caps": self._caps,
            "addresses": [],
            "uptime_s": round(time.time() - self._started_at, 1),
        }
        if runtime is None:
            return base
        core, view = runtime.core, runtime.view
        epoch = max(core.sync.state_epoch, 0)
        on_chain = core.sync.state_epoch >= 0 and epoch <= core.chain.epoch
        return base | {
            "peer_id": core.ctx.me,
            "phase": "stopping" if self.stopping else core.phase(),
            "reason": core.reason(time.monotonic()),
            "epoch": epoch,
            "head": core.chain.head_at(epoch) if on_chain else "",
            "state_digest": core.sync.state_digest,
            "params": core.chain.genesis.params,
            "loss": view.loss,
            "val_loss": view.val_loss,
            "tokens_total": view.tokens_total,
            "tokens_per_second": view.tokens_per_second,
            "peers": sum(v.up for v in core.ctx.peers.values()),
            "round": self._round(runtime),
            "dropped_records": runtime.dropped.records,
            "dropped_weight": runtime.dropped.weight,
            "addresses": list(runtime.network.addresses) if runtime.network is not None else [],
        }

    def peers(self) -> list[dict[str, Any]]:
        """One table per peer that is up, as last heard."""
        runtime = self._runtime
        if runtime is None:
            return []
        now = time.monotonic()
        tables = []
        for peer, seen in sorted(runtime.core.ctx.peers.items()):
            status = seen.status
            if not seen.up:
                continue
            tables.append(
                {
                    "peer_id": peer,
                    "phase": status.phase if status is not None else "",
                    "epoch": status.epoch if status is not None else None,
                    "head": status.head if status is not None else "",
                    "same_head": status is not None
                    and (status.head, status.state_epoch) == (runtime.core.chain.head, status.epoch),
                    "heard_s": round(now - seen.heard_at, 1),
                    "addresses": list(runtime.network.addresses_of(peer))
                    if runtime.network is not None
                    else [],
                }
            )
        return tables

    def ready(self) -> tuple[bool, str]:
        """Joined, at the head, and contributing."""
        runtime = self._runtime
        if self.stopping:
            return False, "stopping"
        if runtime is None:
            return False, "starting"
        phase = runtime.core.phase()
        return phase in ("training", "averaging"), f"{phase}: {runtime.core.reason(time.monotonic())}"

    def _round(self, runtime: Runtime) -> dict[str, Any] | None:
        round_ = runtime.core.round
        if round_ is None:
            return None
        roster = round_.exchange.roster
        return {
            "epoch": round_.epoch,
            "ballot": round_.ballot,
            "leader": round_.leader,
            "stage": Stage(round_.stage).name.lower(),
            "forced": round_.forced,
            "electorate": len(round_.electorate),
            "members": len(roster.members) if roster is not None and round_.stage > Stage.READY else 0,
            "waiting_on": list(round_.exchange.waiting_on()),
        }
