"""A `tapestry` command as far as scripts/quickstart can see, for its tests: no network, no training.

The nodes share a folder beside their homes. Whoever first sees that a tick is over commits the next epoch
there, with those as members who are alive. A home called lone1 is a swarm of its own. The model of an epoch
that was named has no weights. FAKE_FAULT="KIND:NUMBER" makes node NUMBER misbehave:

digest  shows another state digest         deaf    does not end with SIGTERM
loss    learns nothing                     orphan  has a child that outlives it
dies    ends with exit code 3 at epoch 2   gap     loses epoch 2 from its chain.jsonl
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from blake3 import blake3

from tapestry.node.disk.files import seal, unseal
from tapestry.node.protocol.canon import canonical
from tapestry.node.protocol.record import Body, Member, body_to_dict

TICK_S = 0.4
RUN_ID = blake3(b"run").hexdigest()
RUN_TOML = """\
[model]
seed = 0
[data]
sequence_length = 1024
[train]
batch_size = 8
inner_steps = 32
lr = 0.0003
warmup_steps = 32
[outer]
lr = 0.7
[round]
min_members = 1
[members]
founders = []
[limits]
checkpoint_every_epochs = 5
"""


def main(command: str, *arguments: str) -> None:
    if command == "init":
        home = Path(arguments[0])
        home.mkdir(parents=True)
        (home / "node.toml").write_text("threads = 0\n")
        (home / "run.toml").write_text(RUN_TOML)
    elif command == "invite":
        flags = dict(zip(arguments[::2], arguments[1::2], strict=True))
        sys.stdout.write(json.loads((Path(flags["--home"]) / "node.json").read_text())["addresses"][0])
    elif command == "id":
        sys.stdout.write(f"12D3KooWFake{arguments[1][-1]}")
    elif command == "export":
        flags = dict(zip(arguments[1::2], arguments[2::2], strict=True))
        _export(Path(arguments[0]), flags.get("--epoch"))
    else:
        flags = dict(zip(arguments[::2], arguments[1::2], strict=True))
        FakeNode(Path(flags["--home"]), flags.get("--peer"), int(flags.get("--epochs", "0"))).run()


class FakeNode:
    def __init__(self, home: Path, peer: str | None, epochs: int) -> None:
        self.home, self.epochs = home, epochs
        lone = home.name.startswith("lone")
        self.shared = home.parent / (f"swarm-{home.name}" if lone else "swarm")
        self.number = home.name[-1]
        self.first = self.number if lone else "1"  # who founded the run
        spec = (home if lone else home.with_name("node1")) / "run.toml"
        self.min_members = int(spec.read_text().split("min_members = ")[1].split()[0])
        kind, _, number = os.environ.get("FAKE_FAULT", "").partition(":")
        self.fault = kind if number == self.number else ""
        self.epoch = 0
        if self.number == self.first:
            assert "threads = 1" in (home / "node.toml").read_text()
        else:
            assert peer is not None and "/p2p/" in peer and not (home / "run.toml").exists()

    def run(self) -> None:
        stopped = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: None if self.fault == "deaf" else stopped.set())
        if self.fault == "orphan":
            subprocess.Popen(["sleep", "60"], start_new_session=True)
        self.shared.mkdir(exist_ok=True)
        (self.shared / f"live{self.number}").write_text(str(os.getpid()))
        server = self._serve()
        self._write_node_json(server.server_port)
        while not stopped.wait(0.05):
            self._commit()
            self._follow()
            if self.epochs and self.epoch >= self.epochs:
                break
            if self.fault == "dies" and self.epoch >= 2:
                sys.stderr.write("error: no peer could be reached\n")
                os._exit(3)
        server.shutdown()

    # -- the chain

    def _commit(self) -> None:
        """Write the next record, unless another node is first or the tick is not over."""
        epoch = self._latest() + 1
        last = self.shared / f"{epoch - 1}.json"
        began = last if last.exists() else self.shared / f"live{self.first}"
        if time.time() - began.stat().st_mtime < TICK_S or len(self._alive()) < self.min_members:
            return
        temporary = self.shared / f"temporary{self.number}"
        temporary.write_text(self._record(epoch))
        with contextlib.suppress(FileExistsError):
            os.link(temporary, self.shared / f"{epoch}.json")
        temporary.unlink()

    def _record(self, epoch: int) -> str:
        prev = RUN_ID if epoch == 1 else _digest((self.shared / f"{epoch - 1}.json").read_text())
        members = tuple(Member(f"peer{number}", 100, "ab" * 32) for number in self._alive())
        body = Body(RUN_ID, epoch, prev, _state_digest(epoch - 1), members, "cd" * 32)
        return seal({"body": body_to_dict(body), "ballot": 0, "signatures": [], "draws": []}).decode()

    def _follow(self) -> None:
        """Copy what is committed into our own chain, then show it."""
        path = self.home / "chain.jsonl"
        have = len(path.read_text().splitlines()) if path.exists() else 0
        skipped = self.fault == "gap" and have >= 1
        latest = self._latest()
        for epoch in range(have + 1 + skipped, latest + 1):
            if self.fault == "gap" and epoch == 2:
                continue
            with path.open("a") as file:
                file.write((self.shared / f"{epoch}.json").read_text() + "\n")
        self.epoch = latest

    def _latest(self) -> int:
        latest = max((int(path.stem) for path in self.shared.glob("*.json")), default=0)
        return min(latest, self.epochs) if self.epochs else latest

    def _alive(self) -> list[str]:
        live = sorted(self.shared.glob("live*"))
        return [path.name.removeprefix("live") for path in live if _running(int(path.read_text() or "0"))]

    # -- the surface

    def status(self) -> dict[str, Any]:
        wrong = self.fault == "digest" and self.epoch >= 2
        return {
            "phase": "training",
            "epoch": self.epoch,
            "state_digest": _state_digest(-1 if wrong else self.epoch),
            "loss": 2.5,
            "val_loss": 5.5 if self.fault == "loss" else max(1.5, 5.56 * 0.8**self.epoch),
            "tokens_per_second": 1000.0,
            "peers": len(self._alive()) - 1,
        }

    def _serve(self) -> ThreadingHTTPServer:
        node = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = 'tapestry_network_bytes_total{direction="sent",kind='
                metrics = f'{name}"contribution"}} {node.epoch * 1e6}\n{name}"result"}} 5e5\n'
                body = metrics if self.path == "/metrics" else json.dumps(node.status())
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    def _write_node_json(self, port: int) -> None:
        info = {
            "pid": os.getpid(),
            "peer_id": f"peer{self.number}",
            "run_id": RUN_ID,
            "addresses": [f"/ip4/127.0.0.1/tcp/1/p2p/peer{self.number}"],
            "http": f"http://127.0.0.1:{port}",
        }
        temporary = self.home / "node.json.tmp"
        temporary.write_text(json.dumps(info))
        temporary.rename(self.home / "node.json")


def _export(out: Path, epoch: str | None) -> None:
    if epoch is not None:
        out.mkdir()
        (out / "tapestry.json").write_text(json.dumps({"state_digest": _state_digest(int(epoch))}))
        return
    from tapestry.node.lineage.huggingface import export_model
    from tapestry.node.spec.training import PRESETS
    from tapestry.node.trainer.models.llama import build_model, initial_state, model_layout

    model, length = PRESETS["nano"].model, PRESETS["nano"].data.sequence_length
    layout = model_layout(build_model(model, length))
    export_model(out, model, length, layout, initial_state(model, length), meta={})


def _digest(line: str) -> str:
    return blake3(canonical(unseal(line.encode())["body"])).hexdigest()


def _state_digest(epoch: int) -> str:
    return blake3(f"state {epoch}".encode()).hexdigest()


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


if __name__ == "__main__":
    main(*sys.argv[1:])
