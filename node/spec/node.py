"""node.toml, environment and flags: one node's own affairs, which no other member need share.

Defaults give way to node.toml, node.toml to the environment, the environment to flags. Read with the
strict reader of runspec.py: an unknown key is an error that names the key that was meant.

The environment variables: TAPESTRY_HOME (see home.py), TAPESTRY_HTTP, TAPESTRY_DEVICE,
TAPESTRY_LOG_FORMAT.

Must not import torch, hivemind or transformers: the command line waits for this module.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tapestry.dht.addresses import AddressError, parse_announce, parse_listen, parse_peer
from tapestry.node.errors import UserError
from tapestry.node.home import Home
from tapestry.node.spec.data import (
    NO_DATA,
    DataSettings,
    data_table,
    merged_data,
    path_in,
    rebased_data,
    resolved_data,
    source_of,
    split_field,
    validation_of,
)
from tapestry.node.spec.invitation import Invitation, read_invitation
from tapestry.node.spec.listen import Said, read_listening
from tapestry.node.spec.tables import Between, Pattern, TableError, commented_toml, read_table, read_toml
from tapestry.node.spec.training import AS_USUAL, DEVICE, LocalTraining

ISLAND_LISTEN = ("/ip4/127.0.0.1/tcp/0",)
RUN_ID_HEX_DIGITS = 64  # blake3
# Below, a peer of 64 gets less than what links.py takes for a drip. Guess; above is no line.
MIN_RATE, MAX_RATE = "1mbit", "1000gbit"
RATE = Pattern(
    r"|0|(?P<number>[0-9]{1,9}(\.[0-9]{1,6})?) ?(?P<unit>[kmg]bit)",
    'digits and kbit, mbit or gbit (per second), such as "20mbit", or "" or "0" for no cap',
)
_BYTES_S = {"kbit": 1e3 / 8, "mbit": 1e6 / 8, "gbit": 1e9 / 8}
_VARIABLES = {"http": "TAPESTRY_HTTP", "device": "TAPESTRY_DEVICE", "log_format": "TAPESTRY_LOG_FORMAT"}
PEER_HINT = (
    "that node's start printed its whole address, and `tapestry status` there shows `peer_id`; or take the "
    "line that `tapestry invite` prints there, which has everything"
)
_FLAGS = {"peers": "peer"}  # keys whose flag has another name


@dataclass(frozen=True, slots=True)
class Ending:
    """When a node is to end by itself. At most one of the two is given."""

    epochs: int | None = None  # after so many epochs more
    until_epoch: int | None = None  # once its state is of this epoch


ENDLESS = Ending()


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """Everything that `tapestry start` was told, checked. Make one with `resolve`."""

    home: Home
    run: Path | None  # run.toml; None: resume the home's run, or take the spec from a peer
    run_id: str | None  # 64 hex digits that the run must have
    peers: tuple[str, ...]  # full addresses, ending in /p2p/<peer id>
    base: Path | None  # a Hugging Face directory with the run's base, if this member has one
    data: DataSettings  # resolved: named sources with absolute paths, never none
    listen: tuple[str, ...]
    announce: tuple[str, ...]
    listen_said: Said  # of these two, without the flags
    kept: tuple[str, ...]  # flags of an earlier start that hold: "--listen ADDRESS"
    relay: bool  # carry connections of members behind NAT
    http_host: str
    http_port: int  # 0: a free one
    http_tls: tuple[Path, Path] | None  # certificate and key; None: not encrypted
    device: str  # as spec.training.DEVICE
    threads: int  # of the trainer, at least 1
    training: LocalTraining
    upload_bytes_per_second: float | None  # cap; None: there is none
    download_bytes_per_second: float | None
    log_format: Literal["text", "json"]
    log_file_mb: int
    log_files: int
    branches_kept: int  # chains that lost at a fork; 0: none
    branches_bytes: int  # that they may take, all together
    trackers: tuple[str, ...]  # surface/trackers.KINDS
    otlp_endpoint: str  # of an OpenTelemetry collector; "": as the environment says
    ending: Ending
    max_params: int | None  # refuse to join a run of more; None: as many as the machine has room for
    show_spec: bool = False  # print what the run agreed on when joining it
    island: bool = False  # trains on alone, and listens to nobody: lineage/island.py
    invitation: Invitation | None = None  # that --peer named
    waits: bool = True  # until it is admitted
    external: bool = False  # a script trains, and brings module and data: node/library
    script_fd: int | None = None  # the socket of the script that has started this node; it ends with it

    @classmethod
    def resolve(cls, home: Home, flags: Mapping[str, Any], env: Mapping[str, str]) -> NodeConfig:
        """Merge the sources; raises UserError that names the flag, the variable or the file and key.

        `flags` are those of `tapestry start`, by their Python names; None and () mean: not given.
        """
        values, where = _merged([_file_layer(home), _environment_layer(env), _flags_layer(flags)])
        options = read_table(NodeToml, values)
        host, port = _host_and_port(options.http, where["http"])
        said = _said_of_listening(home)
        reached = _reached(home, options, flags, said)
        invitation = _invitation(options.peers, where["peers"])
        return cls(
            home=home,
            run=_run_file(options.run, where["run"], home),
            run_id=_run_id(flags.get("run_id")) or (invitation.run_id if invitation is not None else None),
            peers=() if flags.get("island") else _peers(_of_invitations(options.peers), where["peers"]),
            invitation=invitation,
            waits=not flags.get("no_wait"),
            base=_base(options.base, where["base"]),
            data=NO_DATA if flags.get("external") else _data(options.data, home),
            listen=ISLAND_LISTEN
            if flags.get("island")
            else _addresses(reached.listen, where["listen"], parse_listen),
            announce=()
            if flags.get("island")
            else _addresses(reached.announce, where["announce"], parse_announce),
            listen_said=said,
            kept=() if flags.get("island") else reached.kept,
            relay=options.relay,
            http_host=host,
            http_port=port,
            http_tls=_tls(options.http_cert, options.http_key, where),
            device=options.device,
            threads=options.threads or len(os.sched_getaffinity(0)),
            training=options.training,
            upload_bytes_per_second=_bytes_s(options.max_upload, where["max_upload"]),
            download_bytes_per_second=_bytes_s(options.max_download, where["max_download"]),
            log_format=options.log_format,
            log_file_mb=options.log_file_mb,
            log_files=options.log_files,
            branches_kept=options.branches_kept,
            branches_bytes=options.branches_mb << 20,
            trackers=options.trackers,
            otlp_endpoint=_url(options.otlp_endpoint, where["otlp_endpoint"]),
            ending=_ending(flags.get("epochs"), flags.get("until_epoch")),
            max_params=options.max_params or None,
            show_spec=bool(flags.get("show_spec")),
            island=bool(flags.get("island")),
            external=bool(flags.get("external")),
            script_fd=flags.get("script_fd"),
        )


@dataclass(frozen=True, slots=True)
class NodeToml:
    """node.toml. Paths in it are relative to the home."""

    run: Annotated[
        str, 'The run spec. "" uses run.toml beside this file if it is there, and else asks a peer.'
    ] = ""
    base: Annotated[
        str,
        "A Hugging Face directory with the base that the run continues, if this member has one. The founder "
        "needs it; whoever joins has it from the peers if this is empty.",
    ] = ""
    peers: Annotated[
        tuple[str, ...],
        'Whom to join: "/ip4/203.0.113.7/tcp/4001/p2p/12D3KooW...". With none, start founds the run, or '
        "goes on with the one of this home.",
    ] = ()
    listen: Annotated[
        tuple[str, ...],
        "Where other nodes reach this one; port 0 takes a free port. "
        '"/ip4/127.0.0.1/tcp/0" is for trials on one machine. --listen goes before it, and holds for later '
        "starts, until this key is changed.",
    ] = ("/ip4/0.0.0.0/tcp/0",)
    announce: Annotated[
        tuple[str, ...],
        "Addresses to tell others in place of the found ones, e.g. of a router that forwards a port.",
    ] = ()
    relay: Annotated[
        bool,
        "Whether this node carries the connections of members behind NAT, encrypted between their ends, "
        "within max_upload.",
    ] = True
    http: Annotated[
        str, 'HOST:PORT of the metrics and status pages; port 0 takes a free port. "[::1]:9470" for IPv6.'
    ] = "127.0.0.1:9470"
    http_cert: Annotated[
        str,
        "A certificate and its chain in PEM: those pages are then served over TLS. Read again when renewed.",
    ] = ""
    http_key: Annotated[str, "The key of http_cert, in PEM, without a password."] = ""
    device: Annotated[
        str,
        DEVICE,
        "Where the trainer computes; auto takes a GPU if there is one. Several GPUs share the model and each "
        "batch (FSDP2).",
    ] = "auto"
    threads: Annotated[int, Between(0, 1_024), "CPU threads of the trainer; 0: one per core."] = 0
    max_upload: Annotated[
        str,
        RATE,
        f"Cap of what this node sends, {MIN_RATE} to {MAX_RATE}: contributions, results and state wait for "
        "it; control messages count and never wait. What libp2p and TCP add is not counted: stay 5 % below "
        "what the line may give.",
    ] = ""
    max_download: Annotated[str, RATE, "The same for what this node receives."] = ""
    max_params: Annotated[
        int,
        Between(0, 2**50),
        "Refuse to join a run of more parameters than this; 0: of more than this machine has memory for.",
    ] = 0
    log_format: Annotated[Literal["text", "json"], "text for people, json for log collectors."] = "text"
    log_file_mb: Annotated[
        int, Between(1, 10_000), "Size at which HOME/node.log is put away as node.log.1, in MiB."
    ] = 16
    log_files: Annotated[int, Between(1, 1_000), "How many of them are kept, node.log among them."] = 5
    branches_kept: Annotated[
        int,
        Between(0, 1_000),
        "How many chains that lost at a fork stay in HOME/branches; the oldest goes first. 0: none.",
    ] = 16
    branches_mb: Annotated[
        int,
        Between(1, 2**30),
        "Room for them in MiB, all together; never more than half of what would be free without them.",
    ] = 8_192
    trackers: Annotated[
        tuple[Literal["tensorboard", "wandb", "trackio"], ...],
        "Experiment trackers that get loss, speed and round times of every epoch. tensorboard writes to "
        "HOME/tensorboard. Each is an extra: pip install 'tapestry-node[tensorboard]'.",
    ] = ()
    otlp_endpoint: Annotated[
        str,
        'An OpenTelemetry collector that gets what /metrics shows: "http://127.0.0.1:4318". With none, the '
        "environment's OTEL_EXPORTER_OTLP_ENDPOINT counts. An extra: pip install 'tapestry-node[otel]'.",
    ] = ""
    data: Annotated[DataSettings, "What this member trains on and is measured on."] = NO_DATA
    training: Annotated[
        LocalTraining, "How this node's trainer computes what the run asks for. The result is the same."
    ] = AS_USUAL

    def to_toml(self) -> str:
        """A commented node.toml that reads back to these values."""
        return (
            "# This node's own affairs. Flags of `tapestry start` go before what is here.\n"
            "# Paths are relative to this folder.\n\n" + commented_toml(self)
        )


@dataclass(frozen=True, slots=True)
class _Reached:
    """Where others reach the node."""

    listen: tuple[str, ...]
    announce: tuple[str, ...]
    kept: tuple[str, ...]  # as in NodeConfig


def _said_of_listening(home: Home) -> Said:
    """By node.toml, or by default."""
    values, _ = _merged([_file_layer(home)])
    said = read_table(NodeToml, values)
    return said.listen, said.announce


def _reached(home: Home, options: NodeToml, flags: Mapping[str, Any], said: Said) -> _Reached:
    """As `options` have it, or where a flag of an earlier start has put it: spec/listen.py."""
    last = None if flags.get("listen") else read_listening(home)
    if last is None or last.said != said:
        return _Reached(options.listen, options.announce, ())
    announce = options.announce if flags.get("announce") else last.announce
    listens = [f"--listen {one}" for one in last.listen if last.listen != options.listen]
    announces = [f"--announce {one}" for one in announce if announce != options.announce]
    return _Reached(last.listen, announce, (*listens, *announces))


@dataclass(frozen=True, slots=True)
class _Layer:
    """What one source says, and how an error names a key of it."""

    table: Mapping[str, Any]
    where: Callable[[str], str]
    base: Path  # of relative paths


def named_sources(home: Home, env: Mapping[str, str]) -> tuple[str, ...]:
    """What node.toml and the environment name as data, with fields or without; perhaps nothing."""
    values, _ = _merged([_file_layer(home), _environment_layer(env)])
    data = read_table(NodeToml, values).data
    return (*data.paths, *(one.path for one in data.source), *(one.path for one in data.validation))


def sources_for(home: Home, sources: Iterable[str]) -> DataSettings:
    """The sources, each as `--data` names it, with the encoding and the bounds that node.toml says of them.

    No links are followed: nobody was asked whether what they lead to may be used. Raises UserError.
    """
    values, _ = _merged([_file_layer(home)])
    said = read_table(NodeToml, values).data
    fields = [(one.path, one.field) if one.field else split_field(one.path) for one in said.source]
    known = dict(zip(fields, (one.encoding for one in said.source), strict=True))
    wanted = [source_of(text) for text in sources]
    return DataSettings(
        source=tuple(replace(one, encoding=known.get((one.path, one.field), "")) for one in wanted),
        left_out_max=said.left_out_max,
        malformed_max=said.malformed_max,
        allow_doubtful=said.allow_doubtful,
    )


def _file_layer(home: Home) -> _Layer:
    table = read_toml(home.node_toml) if os.path.lexists(home.node_toml) else {}
    for cap in ("max_upload", "max_download"):
        if table.get(cap) == 0 and type(table[cap]) is int:
            table[cap] = "0"  # the only number that needs no unit
    if "data" in table:
        table["data"] = data_table(table["data"])
    return _Layer(table, lambda key: f"{home.node_toml}: {key}", home.path)


def _environment_layer(env: Mapping[str, str]) -> _Layer:
    table = {key: env[variable] for key, variable in _VARIABLES.items() if env.get(variable)}
    return _Layer(table, lambda key: _VARIABLES[key], Path.cwd())


def _flags_layer(flags: Mapping[str, Any]) -> _Layer:
    names = {key: f"--{_FLAGS.get(key, key).replace('_', '-')}" for key in NodeToml.__dataclass_fields__}
    given = {key: flags.get(key) for key in names if flags.get(key) not in (None, ())}
    table = {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}
    data = _data_flags(flags)
    table = {**table, "data": data} if data else {key: table[key] for key in table if key != "data"}
    return _Layer(table, lambda key: names.get(key, f"--{key.split('.')[0]}"), Path.cwd())


def _data_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """--data, --validation and --allow-doubtful-data as the table [data]; only what was given."""
    table: dict[str, Any] = {}
    if flags.get("data"):
        table["paths"] = list(flags["data"])
    if flags.get("validation"):
        table["validation"] = [validation_of(text) for text in flags["validation"]]
    if flags.get("allow_doubtful_data"):
        table["allow_doubtful"] = True
    return table


def _merged(layers: Sequence[_Layer]) -> tuple[dict[str, Any], dict[str, str]]:
    """The value of each key that somebody set, and for every key what to call it in an error.

    Each layer is checked by itself, so that a mistake is found also where another layer overrides it.
    """
    values: dict[str, Any] = {}
    where = dict.fromkeys(NodeToml.__dataclass_fields__, "default")
    for layer in layers:
        try:
            read_table(NodeToml, layer.table)
        except TableError as error:
            key, _, problem = str(error).partition(": ")
            raise UserError(f"{layer.where(key)}: {problem}") from error
        new = {key: _rebased(key, value, layer.base) for key, value in layer.table.items()}
        if "data" in new:
            new["data"] = merged_data(values.get("data", {}), new["data"])
        values |= new
        where |= {key: layer.where(key) for key in layer.table}
    return values, where


def _rebased(key: str, value: Any, base: Path) -> Any:
    if key in ("run", "base", "http_cert", "http_key") and value:
        return str(path_in(base, value))
    if key == "data":
        return rebased_data(value, base)
    return value


def _host_and_port(text: str, where: str) -> tuple[str, int]:
    match = re.fullmatch(
        r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9.-]+)):(?P<port>[0-9]{1,5})", text
    )
    if match is None or int(match["port"]) > 65_535:
        raise UserError(
            f"{where}: '{text}' is not HOST:PORT, such as 127.0.0.1:9470; port 0 takes a free one"
        )
    if match["v6"]:
        try:
            ipaddress.IPv6Address(match["v6"])
        except ValueError as error:
            raise UserError(f"{where}: '{match['v6']}' is not an IPv6 address") from error
    return match["v6"] or match["host"], int(match["port"])


def _url(text: str, where: str) -> str:
    if text and not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", text):
        raise UserError(f"{where}: {text} is no URL", hint="http://127.0.0.1:4318")
    return text


def _tls(cert: str, key: str, where: Mapping[str, str]) -> tuple[Path, Path] | None:
    if bool(cert) != bool(key):
        given, missing = ("http_cert", "http_key") if cert else ("http_key", "http_cert")
        raise UserError(f"{where[given]} is given without {missing}", hint="TLS needs both")
    return (Path(cert), Path(key)) if cert else None


def _peers(texts: tuple[str, ...], where: str) -> tuple[str, ...]:
    return _addresses(texts, where, lambda text: parse_peer(text).maddr, PEER_HINT)


def _run_file(text: str, where: str, home: Home) -> Path | None:
    if not text:
        return home.run_toml if os.path.lexists(home.run_toml) else None
    if not os.path.isfile(text):
        raise UserError(f"{where}: there is no file {text}")
    return Path(text)


def _base(text: str, where: str) -> Path | None:
    if text and not os.path.isdir(text):
        raise UserError(f"{where}: there is no directory {text}")
    return Path(text) if text else None


def _run_id(value: str | None) -> str | None:
    if value is not None and not re.fullmatch(rf"[0-9a-f]{{{RUN_ID_HEX_DIGITS}}}", value):
        raise UserError(f"--run-id: '{value[:80]}' is not a run id, which has {RUN_ID_HEX_DIGITS} hex digits")
    return value


def _invitation(texts: tuple[str, ...], where: str) -> Invitation | None:
    """The one among them, if there is one; it may come with several addresses."""
    found = {read.secret: read for read in map(read_invitation, texts) if read is not None}
    if len(found) > 1:
        raise UserError(
            f"{where}: there are {len(found)} invitations, and one admits", hint="keep one of them"
        )
    return next(iter(found.values()), None)


def _of_invitations(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Each invitation's address in its place."""
    read = [(text, read_invitation(text)) for text in texts]
    return tuple([text if invitation is None else invitation.address for text, invitation in read])


def _addresses(
    texts: tuple[str, ...], where: str, parse: Callable[[str], str], hint: str | None = None
) -> tuple[str, ...]:
    try:
        return tuple(parse(text) for text in texts)
    except AddressError as error:
        raise UserError(f"{where}: {error}", hint=hint) from error


def _data(settings: DataSettings, home: Home) -> DataSettings:
    hint = (
        f"--data PATH (a file or a folder of text), or paths = [...] below [data] in {home.node_toml}; "
        "--data stdlib takes the sources of the Python standard library"
    )
    return resolved_data(settings, hint)


def _bytes_s(text: str, where: str) -> float | None:
    """A rate as RATE has it, in bytes per second; None for no cap."""
    if text in ("", "0"):
        return None
    rate = _rate(text)
    if not _rate(MIN_RATE) <= rate <= _rate(MAX_RATE):
        raise UserError(f"{where}: {text} is not from {MIN_RATE} to {MAX_RATE}", hint='"0" sets no cap')
    return rate


def _rate(text: str) -> float:
    match = re.fullmatch(RATE.regex, text)
    assert match is not None, "the strict reader has checked it"
    return float(match["number"]) * _BYTES_S[match["unit"]]


def _ending(epochs: int | None, until_epoch: int | None) -> Ending:
    if epochs is not None and epochs < 1:
        raise UserError(f"--epochs: {epochs} is not a positive number of epochs")
    if until_epoch is not None and until_epoch < 1:
        raise UserError(f"--until-epoch: {until_epoch} is not a positive epoch")
    if epochs is not None and until_epoch is not None:
        raise UserError(
            "--epochs and --until-epoch exclude each other",
            hint="--epochs N makes N epochs more, --until-epoch E goes on to epoch E",
        )
    return Ending(epochs, until_epoch)
