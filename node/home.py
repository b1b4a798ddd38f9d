"""The home directory: what one node keeps on disk, and the proof of who is using it.

disk/lock.py says how a process has a home; whether the node is ready is read of the lock and HOME/node.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pwd
import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

from tapestry.node.disk.files import atomic_write
from tapestry.node.disk.lock import Held, HomeLock, holder_of, is_held, take
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.protocol import strict

GITIGNORE = "# A node's home: its key, its token and its members' data are nobody else's.\n*\n"
NODE_JSON_BYTES_MAX = 64 * 1024  # Guess: a node has a handful of addresses.
ENDPOINT_BYTES_MAX = 512
WAY_BACK = "tapestry rejoin --bring contributes what was learnt, rejoin --keep NAME makes a derivative of it"


def way_back(since_epoch: int | None) -> dict[str, Any] | None:
    """What /status says of an island that began from the state of `since_epoch`; None: there is none."""
    return None if since_epoch is None else {"since_epoch": since_epoch, "back": WAY_BACK}


@dataclass(frozen=True, slots=True)
class Home:
    """Where everything of one node lies. Making one touches nothing."""

    path: Path

    @classmethod
    def locate(cls, flag: str | None, env: Mapping[str, str]) -> Home:
        """--home, else $TAPESTRY_HOME, else the platform's user data directory; made absolute."""
        chosen = flag or env.get("TAPESTRY_HOME")
        return cls(Path(chosen).expanduser().absolute() if chosen else _user_data_directory())

    @property
    def identity_key(self) -> Path:
        return self.path / "identity.key"

    @property
    def genesis(self) -> Path:
        return self.path / "genesis.json"

    @property
    def chain(self) -> Path:
        return self.path / "chain.jsonl"

    @property
    def chain_index(self) -> Path:
        """Where each record's line ends; made again of chain.jsonl if it is missing: disk/chain_file.py."""
        return self.path / "chain.index"

    @property
    def chain_marks(self) -> Path:
        """What the records come to, now and then: as chain.index."""
        return self.path / "chain.marks"

    @property
    def vote(self) -> Path:
        return self.path / "vote.json"

    @property
    def updates(self) -> Path:
        return self.path / "updates"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def branches(self) -> Path:
        """What lost at forks: disk/branches.py"""
        return self.path / "branches"

    @property
    def branch_json(self) -> Path:
        """In a branch: what it is."""
        return self.path / "branch.json"

    @property
    def accusations(self) -> Path:
        """Proofs that a reducer lied: disk/accusations.py."""
        return self.path / "accusations"

    @property
    def trainer(self) -> Path:
        return self.path / "trainer"

    @property
    def base(self) -> Path:
        """The files of the base that the run pins: disk/base.py."""
        return self.path / "base"

    @property
    def state(self) -> Path:
        """Where files without a name hold parameters and outer state; may be a link. disk/scratch.py"""
        return self.path / "state"

    @property
    def cache(self) -> Path:
        return self.path / "cache"

    @property
    def node_json(self) -> Path:
        return self.path / "node.json"

    @property
    def endpoint(self) -> Path:
        """`PID URL` of a node's endpoint, from its first second on: node.json comes when it is ready."""
        return self.path / "endpoint"

    @property
    def http_token(self) -> Path:
        """What the endpoint asks for where other machines reach it: surface/token.py"""
        return self.path / "http.token"

    @property
    def http_cert(self) -> Path:
        """The certificate that the endpoint shows, if it has one: surface/tls.py"""
        return self.path / "http.cert"

    @property
    def listen(self) -> Path:
        """What port 0 became the last time."""
        return self.path / "listen.json"

    @property
    def peers(self) -> Path:
        """Where other members were found last."""
        return self.path / "peers.json"

    @property
    def history(self) -> Path:
        """What the page shows of the past: surface/history.py. Nothing depends on it."""
        return self.path / "history.jsonl"

    @property
    def node_toml(self) -> Path:
        return self.path / "node.toml"

    @property
    def run_toml(self) -> Path:
        return self.path / "run.toml"

    @property
    def agreed_toml(self) -> Path:
        """The spec of the run that was joined, to read; nothing reads it."""
        return self.path / "agreed.toml"

    @property
    def island(self) -> Path:
        """The home as it was when it began to train on alone: lineage/island.py"""
        return self.path / "island"

    @property
    def left_island(self) -> Path:
        """In what lies aside of an island: where it began. lineage/island.py"""
        return self.path / "island.json"

    @property
    def brought(self) -> Path:
        """What was learnt on an island and is to be contributed: lineage/bring.py"""
        return self.path / "brought.safetensors"

    @property
    def given(self) -> Path:
        """The same, when a record has it that may still be left or undone."""
        return self.path / "brought.given"

    @property
    def offered(self) -> Path:
        """Names of contributions that carried it, a line each."""
        return self.path / "brought.offered"

    @property
    def egress(self) -> Path:
        """What left this node: lineage/egress.py"""
        return self.path / "egress.jsonl"

    @property
    def data_toml(self) -> Path:
        """What each source of data may be used for: spec/declared.py"""
        return self.path / "data.toml"

    @property
    def descriptions(self) -> Path:
        """What members say of their data, signed: net/descriptions.py"""
        return self.path / "descriptions.json"

    @property
    def data_events(self) -> Path:
        """What data were declared, used and revoked: lineage/uses.py"""
        return self.path / "data-events.jsonl"

    @property
    def log(self) -> Path:
        """The node's log, rotated by the node to node.log.1 and so on: surface/logs.py"""
        return self.path / "node.log"

    @property
    def output(self) -> Path:
        """What a node that has no terminal prints: the banner, why it ended, what a crash leaves."""
        return self.path / "node.out"

    @property
    def log_levels(self) -> Path:
        """How much each subsystem says: surface/log_levels.py"""
        return self.path / "log-levels.json"

    @property
    def trainer_socket(self) -> Path:
        """Where scripts come to a node that runs with --external; mode 0600."""
        return self.path / "trainer.sock"

    @property
    def control_socket(self) -> Path:
        """Where commands reach the running node: daemon/control.py; mode 0600."""
        return self.path / "control.sock"

    @property
    def lock_file(self) -> Path:
        return self.path / "lock"

    @property
    def mark(self) -> Path:
        """Which home this is, and where it belongs: disk/home_mark.py"""
        return self.path / "home.json"

    @property
    def exit_mark(self) -> Path:
        """Of a home that `tapestry exit` made, until a node starts in it: lineage/leave.py"""
        return self.path / "exit"

    @property
    def restoring(self) -> Path:
        """Here while a backup is unpacked into this home: what of it is moved to its place."""
        return self.path / ".restoring"

    @property
    def stop_request(self) -> Path:
        """What `tapestry stop` leaves for a node that no signal of ours reaches."""
        return self.path / "stop"

    def require_there(self) -> None:
        """Raises UserError where there is no such folder: a slip of the pen of who asks about it."""
        if not self.path.is_dir():
            raise UserError(f"there is no home {self.path}", hint="name it with --home DIR")

    def create(self) -> None:
        """Make the directory if it is not there, closed to others; raises UserError."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the home {self.path}: {error.strerror}") from error
        ignore = self.path / ".gitignore"
        if not os.path.lexists(ignore):
            with contextlib.suppress(OSError):  # a home that is only read
                ignore.write_text(GITIGNORE)

    def open_output(self) -> BinaryIO:
        """For a node that has no terminal: empty, and appended to. Raises OSError."""
        file = self.output.open("ab")
        file.truncate(0)
        return file

    def require_owner(self) -> None:
        """Raises UserError for root where the home is another user's: that user's node could not read what
        root writes there, nor start again.

        Whose it is, its key says; the folder itself only while there is none, and if it is not empty. So
        root's own node in a folder of another user, as in a container, stays what it was. Where the file
        system gives root's files to that user too, as some do, all is well.
        """
        if os.geteuid() != 0:
            return
        owner = 0
        with contextlib.suppress(OSError):
            if any(self.path.iterdir()):
                key = self.identity_key
                owner = os.stat(key if key.exists() else self.path).st_uid
        if owner not in (0, self._owner_of_new_files()):
            name = _user_name(owner)
            raise UserError(
                f"the home {self.path} belongs to {name}, whose node could not read what root writes there",
                exit_code=ExitCode.REFUSED,
                hint=f"sudo -u {shlex.quote(name)} tapestry ...; or, if the node is to be root's, "
                f"chown -R root {self.path}",
            )

    def _owner_of_new_files(self) -> int:
        try:
            with tempfile.NamedTemporaryFile(dir=self.path) as file:
                return os.fstat(file.fileno()).st_uid
        except OSError:
            return os.geteuid()

    def require_free(self) -> None:
        """Raise what `lock` would raise if a live node has it: for a look before anything is started."""
        if self.is_held():
            raise self._in_use()

    def require_restored(self) -> None:
        """Raises UserError where a backup is not restored to its end: `restore`, which is to be given again,
        refuses where others have written."""
        if self.restoring.exists():
            raise UserError(
                f"{self.path} was not restored to its end",
                hint=f"give `tapestry restore FILE --home {self.path}` again: it begins anew",
            )

    def require_way(self, alone: bool, to_others: bool = True) -> None:
        """Raises UserError where a node cannot start with `--island` (`alone`), or not without it, or not
        without a peer (`to_others`), or not at all yet."""
        self.require_restored()
        if alone and not self.genesis.exists():
            raise UserError(f"{self.path} holds no run to go on with alone")
        if not alone and self.island.exists():
            raise UserError(
                f"{self.path} is on an island: epochs that it made alone would be given up",
                hint=f"{WAY_BACK}; --island goes on alone",
            )
        if not alone and not to_others and self.exit_mark.exists():
            raise UserError(
                f"{self.path} is an exit from its run: it has the key of the home that it was made of, and "
                "knows no other member",
                hint="--island goes on alone; --peer ADDRESS goes on with the others, and the home that it "
                "was made of must not run again then",
            )
        if alone and not self.island.exists() and self.brought.exists():
            raise UserError(
                f"{self.path} has still to bring to the others what it learnt on its last island",
                hint="start it without --island until that is in a record: the log says brought",
            )

    def lock(self) -> HomeLock:
        """Take the home for this process; raises UserError with exit code 2 if a live node has it."""
        try:
            return take(self.lock_file)
        except Held as error:
            raise self._in_use() from error
        except OSError as error:
            raise UserError(f"cannot lock the home {self.path}: {error.strerror}") from error

    def is_held(self) -> bool:
        """Whether a live node has this home, wherever it runs: what the lock says.

        Raises PermissionError: of another user's home nobody can say.
        """
        return is_held(self.lock_file)

    def holder(self) -> int | None:
        """The pid of the live node that has this home; None if there is none, or none that we could
        signal."""
        holder = holder_of(self.lock_file) if self.is_held() else None
        return holder.pid if holder is not None and holder.is_here() else None

    def holder_host(self) -> str:
        """Where the holder says that it runs; "" if it says nothing."""
        holder = holder_of(self.lock_file)
        return holder.host if holder is not None else ""

    def write_node_json(self, info: NodeInfo) -> None:
        """Say that the node is ready, atomically; raises OSError."""
        atomic_write(self.node_json, json.dumps(dataclasses.asdict(info), indent=1).encode() + b"\n")

    def write_endpoint(self, url: str) -> None:
        """Where this process answers while it is not ready; raises OSError."""
        atomic_write(self.endpoint, f"{os.getpid()} {url}\n".encode())

    def remove_endpoint(self) -> None:
        self.endpoint.unlink(missing_ok=True)

    def starting_url(self, pid: int | None) -> str | None:
        """Where the process that starts here answers; None if it does not yet."""
        try:
            with self.endpoint.open(encoding="utf-8") as file:
                words = file.read(ENDPOINT_BYTES_MAX).split()
        except (OSError, ValueError):
            return None
        return words[1] if len(words) == 2 and words[0] == str(pid) else None

    def remove_node_json(self) -> None:
        """A node that stops takes its sign down."""
        self.node_json.unlink(missing_ok=True)

    def read_node_json(self) -> NodeState:
        """Who runs here, judged by the lock and its holder: a node.json that outlived its node is stale."""
        info = self._node_info()
        if not self.is_held():
            return NodeState(Liveness.STALE if info else Liveness.NOT_RUNNING, None, info)
        holder = holder_of(self.lock_file)
        pid = holder.pid if holder is not None else None
        if info is None or info.pid != pid:
            return NodeState(Liveness.STARTING, pid, None)
        return NodeState(Liveness.RUNNING, pid, info)

    def _node_info(self) -> NodeInfo | None:
        try:
            with self.node_json.open("rb") as file:
                return _node_info_from(json.loads(file.read(NODE_JSON_BYTES_MAX)))
        except (OSError, ValueError, RecursionError):
            return None

    def _in_use(self) -> UserError:
        pid = self.holder()
        where = f"pid {pid}" if pid else f"in another container or machine: {self.holder_host() or 'unknown'}"
        by = f"a live node ({where})"
        return UserError(
            f"the home {self.path} is in use by {by}",
            hint=f"tapestry stop --home {self.path}, or give this node another --home",
        )


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """What HOME/node.json says."""

    pid: int
    peer_id: str
    run_id: str
    addresses: tuple[str, ...]  # full, ending in /p2p/<peer id>
    http: str  # http://HOST:PORT
    version: str
    started_at: str  # UTC, 2026-11-22T04:55:51Z


class Liveness(Enum):
    NOT_RUNNING = "not running"
    STARTING = "starting"  # has the lock, has not written node.json yet
    RUNNING = "running"
    STALE = "stale"  # died without taking its node.json away


@dataclass(frozen=True, slots=True)
class NodeState:
    liveness: Liveness
    pid: int | None  # of the live process: STARTING and RUNNING
    info: NodeInfo | None  # RUNNING, and the dead node's in STALE


def _user_name(uid: int) -> str:
    """As sudo takes it."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"#{uid}"


def _user_data_directory() -> Path:
    import platformdirs  # only here: most calls name their home

    return platformdirs.user_data_path("tapestry", appauthor=False)


def _node_info_from(table: object) -> NodeInfo:
    """Raises ValueError unless it is what `write_node_json` writes."""
    fields = strict.table(table, [field.name for field in dataclasses.fields(NodeInfo)], "node.json")
    strict.integer(fields["pid"], 0, 2**31, "pid")
    addresses = strict.sequence(fields["addresses"], NODE_JSON_BYTES_MAX, "addresses")
    for name in ("peer_id", "run_id", "http", "version", "started_at"):
        strict.text(fields[name], NODE_JSON_BYTES_MAX, name)
    for address in addresses:
        strict.text(address, NODE_JSON_BYTES_MAX, "an address")
    return NodeInfo(**{**fields, "addresses": tuple(addresses)})
