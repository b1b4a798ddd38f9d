"""One peer of scripts/bench_averaging.py, in a process of its own; it obeys lines of JSON on its stdin.

Three systems, one interface: `ready` (all peers have met), `round(start_at)` and `result`. A round gives the
moment, on the machine's monotonic clock, at which this peer had the mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

PIECE = 1 << 22  # elements: what is compared and drawn at a time
READY_S = 120.0
ROUND_S = 600.0


def vector(peer: int, n: int, out: Tensor | None = None) -> Tensor:  # f32 (n,)
    """The peer's contribution, N(0, 1); any process can draw any peer's."""
    values = torch.empty(n) if out is None else out
    generator = torch.Generator().manual_seed(1000 + peer)
    for start in range(0, n, PIECE):
        values[start : start + PIECE].normal_(generator=generator)
    return values


def error_of(result: Tensor, peers: int) -> float:
    """Root mean square of what the result is off the true mean, as a share of the mean's own."""
    n, off, size = result.numel(), 0.0, 0.0
    generators = [torch.Generator().manual_seed(1000 + peer) for peer in range(peers)]
    draw = torch.empty(min(n, PIECE))
    for start in range(0, n, PIECE):
        piece = result[start : start + PIECE].double()
        mean = torch.zeros_like(piece)
        for generator in generators:
            mean += draw[: len(piece)].normal_(generator=generator)
        mean /= peers
        off += float((piece - mean).square().sum())
        size += float(mean.square().sum())
    return math.sqrt(off / size)


class TapestryPeer:
    """A whole node but for its trainer, as daemon/assembly.py puts it together.

    The trainer is a stand-in that has its contribution at once, as float32 in memory, and encodes it in a
    thread of this process. A round is timed from before that till the outer step of the agreed mean has been
    taken on the parameters; on the way the result and two votes go to disk and a quorum commits. `mean_at` is
    earlier: all result shards are there, as payloads.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.begun = -1
        self.times: dict[str, float] = {}
        self.applied = asyncio.Event()

    async def start(self) -> None:
        from tapestry.compression.payloads import PayloadLayout
        from tapestry.dht.addresses import parse_listen, parse_peer
        from tapestry.dht.identity import Identity
        from tapestry.dht.p2pd import SwarmConfig
        from tapestry.dht.swarm import Swarm
        from tapestry.node.daemon.assembly import Own, assemble
        from tapestry.node.daemon.keeper import Keeper, found_run
        from tapestry.node.daemon.views import Reporter
        from tapestry.node.disk.store import Store
        from tapestry.node.home import Home
        from tapestry.node.lineage.crypto import NodeCrypto
        from tapestry.node.net.throttle import Throttles
        from tapestry.node.spec.run import RunSpec, preset_spec
        from tapestry.node.state.model import Arithmetic, ModelState
        from tapestry.node.surface.logs import LiveLine
        from tapestry.node.surface.metrics import Metrics

        peer, times, applied = self, self.times, self.applied

        class TimedState(ModelState):
            def apply(self, *arguments: Any, **named: Any) -> None:
                times["committed"] = time.monotonic()
                super().apply(*arguments, **named)
                times["applied"] = time.monotonic()

        class TimedKeeper(Keeper):
            def write_update(self, *arguments: Any) -> None:
                times["mean"] = time.monotonic()
                super().write_update(*arguments)
                times["written"] = time.monotonic()

            def apply(self, record: Any) -> tuple[int, str]:
                done = super().apply(record)
                times["digested"] = time.monotonic()
                peer.record = record
                peer.loop.call_soon_threadsafe(applied.set)
                return done

        options = self.options
        self.loop = asyncio.get_running_loop()
        folder = Path(options["folder"])
        home = Home(folder / f"tapestry-{options['peer']}")
        home.create()
        identity = Identity.load_or_create(home.identity_key)
        crypto = NodeCrypto(identity)
        table = preset_spec("nano", "bench").to_dict()
        table["compression"]["shard_elements"] = options["shard_elements"]
        table["compression"]["codec"] = options["codec"]
        table["limits"]["checkpoint_every_epochs"] = 100_000
        (folder / f"id-{options['peer']}").write_text(identity.peer_id)
        ids = [await asyncio.to_thread(_text_of, folder / f"id-{one}") for one in range(options["peers"])]
        table["members"]["founders"] = ids[1:]  # beside who founds it: there is nobody to be invited
        table["round"].update(stall_s=30.0, exchange_max_s=ROUND_S, straggler_wait_s=60.0)
        table["round"].update(options["round"])
        table["audit"].update(options["audit"])
        spec = RunSpec.from_dict(table)
        n = options["params"]
        state = TimedState(torch.zeros(n), "00" * 32, Arithmetic.of(spec, n), 0, "")
        state.buffers["momentum"].zero_()
        store = Store(home, crypto)
        await asyncio.to_thread(store.load)
        if options["peer"] == 0:
            loaded = await asyncio.to_thread(found_run, spec, identity.peer_id, state, home, store, crypto)
        else:
            founded = Home(folder / "tapestry-0").genesis
            loaded = await asyncio.to_thread(_join_run, founded, spec, state, home, store)
        genesis = loaded.genesis
        assert genesis is not None
        keeper = TimedKeeper(home, spec, store, loaded, genesis, state)
        self.state, self.store, self.metrics = state, store, Metrics("0")
        listen = (parse_listen(f"/ip4/{options['address']}/tcp/0"),)
        config = SwarmConfig(identity_path=home.identity_key, listen=listen, nat_port_map=False)
        swarm = await Swarm.start(config)
        first = []
        if options["peer"] == 0:
            (folder / "address-0").write_text((await swarm.addresses())[0])
        else:
            first = [parse_peer(await asyncio.to_thread(_text_of, folder / "address-0"))]
        payloads = PayloadLayout.of(state.arithmetic.codec, n, spec.compression.shard_elements)
        self.trainer: Any = _Trainer(vector(options["peer"], n), payloads, self)
        reporter = Reporter(self.metrics, LiveLine(sys.stderr, enabled=False))
        own = Own(home, identity, crypto, config, tuple(first), reporter, Throttles())
        node = await assemble(own, spec, keeper, self.trainer)
        self.runtime, self.network = node.runtime, node.network
        self.tasks = [
            asyncio.create_task(node.runtime.run()),
            asyncio.create_task(node.network.run(swarm, node.runtime.network)),
        ]

    async def ready(self) -> None:
        count = self.options["peers"]
        deadline = time.monotonic() + READY_S

        def met() -> bool:
            core = self.runtime.snapshot()
            at_head = [p for p in core.peers if p.head == core.chain_head and p.taking_part]
            linked = self.network.linked
            return len(at_head) == len(linked) == count - 1 and self.begun == core.chain_epoch

        while not met():
            for task in self.tasks:
                if task.done():
                    task.result()
            if time.monotonic() > deadline:
                raise RuntimeError("the peers did not meet")
            await asyncio.sleep(0.01)

    async def round(self, start_at: float) -> dict[str, float]:
        from tapestry.node.trainer.messages import Contribution

        self.applied.clear()
        await _sleep_till(start_at)
        values = {"epoch": self.begun, "weight": 1, "norm": self.trainer.norm, "loss": 1.0}
        fields = Contribution.__dataclass_fields__
        values |= {name: 0 for name in fields if name not in values}
        values |= {name: 0.0 for name in ("waited_s",) if name in fields}
        await asyncio.to_thread(self.trainer.encode)
        self.times["encoded"] = time.monotonic()
        self.runtime.trainer.on_event(Contribution(**values))
        async with asyncio.timeout(ROUND_S):
            await self.applied.wait()
        members = [m for m in self.record.body.members if m.weight]
        if len(members) != self.options["peers"]:
            raise RuntimeError(f"{len(members)} of {self.options['peers']} contributions were averaged")
        return {f"{name}_at": at for name, at in self.times.items()} | {"end_at": self.times["applied"]}

    def result(self) -> Tensor:
        """What was averaged last: decoded from the update log, where it lies as it was applied."""
        body, arithmetic = self.record.body, self.state.arithmetic
        payloads = self.store.read_update(body.epoch, self.record.head, body.result)
        mean = torch.empty(self.state.n)
        for shard, payload in zip(arithmetic.shards, payloads, strict=True):
            arithmetic.codec.decode(payload, shard.n, out=mean[shard.start : shard.stop])
        return mean

    def extra(self) -> dict[str, Any]:
        lag = [
            line
            for line in self.metrics.render().decode().splitlines()
            if line.startswith("tapestry_loop_lag_seconds_bucket") or "loop_lag_seconds_count" in line
        ]
        sent = dict(self.metrics.bytes_by_kind("sent"))
        return {"state_digest": self.state.digest(), "loop_lag": lag, "sent_by_kind": sent}

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.wait(self.tasks)


def _join_run(founded: Path, spec: Any, state: Any, home: Any, store: Any) -> Any:
    """What the home then holds. The state that a run begins with is known here, and so not fetched."""
    from tapestry.node.disk.checkpoints import Checkpoints

    home.genesis.write_text(_text_of(founded))
    loaded = store.load()
    state.head = loaded.genesis.run_id
    checkpoints = Checkpoints(home.checkpoints, state.head, spec.limits.checkpoints_kept)
    checkpoints.load()
    checkpoints.save(state, state.digest())
    return loaded


class _Trainer:
    """Has its contribution from the start; encodes it when it is told."""

    def __init__(self, vector: Tensor, payloads: Any, peer: TapestryPeer) -> None:
        self.contribution = torch.zeros(payloads.size, dtype=torch.uint8)
        self.must_copy = True  # it encodes to the same memory every time
        self.norm = float(vector.double().norm())
        self._vector = vector
        self._payloads = payloads
        self._peer = peer

    def encode(self) -> None:
        for shard, payload in zip(
            self._payloads.shards, self._payloads.views(self.contribution), strict=True
        ):
            self._payloads.codec.encode(self._vector[shard.start : shard.stop], payload)

    def begin(self, epoch: int, *_: object) -> None:
        self._peer.begun = epoch

    def nothing(self, *_: object) -> None: ...

    abort = close_round = evaluate = go_on = save = settle = nothing


class HivemindPeer:
    """hivemind.DecentralizedAverager. Matchmaking is done before the clock runs: a round is timed from
    `allow_allreduce` till the step's result, tensors averaged in place in shared memory."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    async def start(self) -> None:
        self._start()  # on the main thread: it forks, and sets signals

    def _start(self) -> None:
        _mend_hivemind()
        import hivemind
        from hivemind.compression import Float16Compression, NoCompression, Uniform8BitQuantization

        codecs = {"8bit": Uniform8BitQuantization, "float16": Float16Compression, "float32": NoCompression}
        options, folder = self.options, Path(self.options["folder"])
        meeting = folder / "meeting"
        host = [f"/ip4/{options['address']}/tcp/0"]
        first = _text_of(meeting).split() if options["peer"] else []
        self.dht = hivemind.DHT(host_maddrs=host, initial_peers=first, start=True)
        if not options["peer"]:
            meeting.write_text("\n".join(str(address) for address in self.dht.get_visible_maddrs()))
        self.vector = vector(options["peer"], options["params"])
        self.averager = hivemind.DecentralizedAverager(
            [torch.zeros(options["params"])],
            self.dht,
            start=True,
            prefix="bench",
            target_group_size=options["peers"],
            min_group_size=options["peers"],
            min_matchmaking_time=3.0,
            request_timeout=3.0,
            allreduce_timeout=ROUND_S,
            compression=codecs[options["codec"]](),
        )

    async def ready(self) -> None:
        await asyncio.to_thread(self._ready)

    def _ready(self) -> None:
        from hivemind.averaging.control import AveragingStage

        with self.averager.get_tensors() as tensors:
            tensors[0].copy_(self.vector)
        self.step = self.averager.step(require_trigger=True, wait=False, timeout=READY_S, allow_retries=True)
        deadline = time.monotonic() + READY_S
        while self.step.stage != AveragingStage.AWAITING_TRIGGER:
            if self.step.done() or time.monotonic() > deadline:
                raise RuntimeError(f"no group: {self.step.stage}")
            time.sleep(0.01)

    async def round(self, start_at: float) -> dict[str, float]:
        return await asyncio.to_thread(self._round, start_at)

    def _round(self, start_at: float) -> dict[str, float]:
        time.sleep(max(0.0, start_at - time.monotonic()))
        self.step.allow_allreduce()
        gathered = self.step.result(timeout=ROUND_S)
        end_at = time.monotonic()
        if gathered is None or len(gathered) != self.options["peers"]:
            raise RuntimeError(f"a group of {len(gathered or ())}")
        return {"end_at": end_at}

    def result(self) -> Tensor:
        with self.averager.get_tensors() as tensors:
            return tensors[0].clone()

    def extra(self) -> dict[str, Any]:
        return {}

    async def close(self) -> None:
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self.averager.shutdown()
        self.dht.shutdown()


class GlooPeer:
    """torch.distributed.all_reduce over gloo, float32, not encrypted; the division by the count included."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    async def start(self) -> None:
        from datetime import timedelta

        import torch.distributed as distributed

        options = self.options
        os.environ["GLOO_SOCKET_IFNAME"] = options["interface"]
        self.values = torch.empty(options["params"])
        store = f"file://{options['folder']}/gloo"
        await asyncio.to_thread(
            distributed.init_process_group,
            "gloo",
            init_method=store,
            rank=options["peer"],
            world_size=options["peers"],
            timeout=timedelta(seconds=ROUND_S),
        )

    async def ready(self) -> None:
        vector(self.options["peer"], self.options["params"], out=self.values)

    async def round(self, start_at: float) -> dict[str, float]:
        import torch.distributed as distributed

        await _sleep_till(start_at)
        distributed.all_reduce(self.values)
        self.values /= self.options["peers"]
        return {"end_at": time.monotonic()}

    def result(self) -> Tensor:
        return self.values

    def extra(self) -> dict[str, Any]:
        return {}

    async def close(self) -> None:
        return


def _mend_hivemind() -> None:
    """With NumPy >= 2.4 `int(array of one)` raises in a reducer, and hivemind averages nothing, in silence.
    This is its method with `.item()` instead."""
    from hivemind.compression.quantization import Quantization

    def extract(self: Any, serialized_tensor: Any) -> Tensor:
        buffer = serialized_tensor.buffer
        size = np.frombuffer(buffer, count=1, dtype=np.int64).item()
        codebook = np.frombuffer(buffer, offset=8, count=size, dtype=self.codebook_dtype)
        quantized = np.frombuffer(buffer, offset=8 + codebook.nbytes, dtype=self.indices_dtype)
        indices = torch.as_tensor(quantized, dtype=torch.int64).reshape(tuple(serialized_tensor.size))
        values = torch.as_tensor(codebook).to(dtype=getattr(torch, serialized_tensor.dtype))
        return values[indices].requires_grad_(serialized_tensor.requires_grad)

    Quantization.extract = extract


def _text_of(path: Path) -> str:
    """Of a file that another peer writes."""
    deadline = time.monotonic() + READY_S
    while not path.exists() or not path.read_text():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{path} did not come")
        time.sleep(0.02)
    return path.read_text()


async def _sleep_till(moment: float) -> None:
    await asyncio.sleep(max(0.0, moment - time.monotonic()))


def _rss_peak_bytes() -> dict[str, int]:
    """Highest resident memory of this process and, together, of those it started."""
    me = psutil.Process()
    own = _peak(me.pid)
    rest = 0
    for child in me.children(recursive=True):
        with contextlib.suppress(OSError):
            rest += _peak(child.pid)
    return {"own": own, "children": rest}


def _peak(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _cpu_s() -> dict[str, float]:
    """Processor seconds so far: of the main thread, of the others, of the processes that this one started."""
    me = psutil.Process()
    used = {"main": 0.0, "threads": 0.0, "children": 0.0}
    for thread in me.threads():
        used["main" if thread.id == me.pid else "threads"] += thread.user_time + thread.system_time
    for child in me.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times = child.cpu_times()
            used["children"] += times.user + times.system
    return used


PEERS: dict[str, Any] = {"tapestry": TapestryPeer, "hivemind": HivemindPeer, "gloo": GlooPeer}


async def _serve(options: dict[str, Any], answers: int) -> None:
    torch.set_num_threads(1)
    peer = PEERS[options["kind"]](options)

    def answer(value: dict[str, Any]) -> None:
        os.write(answers, json.dumps(value).encode() + b"\n")

    await peer.start()
    answer({"started": True})
    while True:
        line = await asyncio.to_thread(sys.stdin.readline)
        if not line:
            break
        command = json.loads(line)
        if command["do"] == "ready":
            await peer.ready()
            answer({"base_bytes": _rss_peak_bytes()["own"], "run_cpu_s": sum(_cpu_s().values())})
        elif command["do"] == "round":
            before = _cpu_s()
            times = await peer.round(command["start_at"])
            answer(times | {"cpu_s": {part: used - before[part] for part, used in _cpu_s().items()}})
        elif command["do"] == "result":
            peak, used_s = _rss_peak_bytes(), sum(_cpu_s().values())  # before it is decoded for this question
            result = await asyncio.to_thread(peer.result)
            path = Path(options["folder"]) / f"result-{options['system']}-{options['peer']}.f32"
            result.numpy().tofile(path)
            error = await asyncio.to_thread(error_of, result, options["peers"])
            answer({"path": str(path), "error": error, "rss": peak, "run_cpu_s": used_s} | peer.extra())
        elif command["do"] == "end":
            break
    await peer.close()


def main() -> None:
    options = json.loads(sys.argv[1])
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    if options["kind"] == "tapestry":
        import uvloop

        uvloop.run(_serve(options, answers))
    else:
        asyncio.run(_serve(options, answers))
    os._exit(0)  # hivemind's threads do not end by themselves


if __name__ == "__main__":
    main()
