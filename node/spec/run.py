"""run.toml: what all members of a run must agree on.

Read strictly, whether it is the founder's file or comes from a peer: unknown keys are errors that name
the key that was meant, and every value has a type and bounds. The canonical form is the basis of the run
id, so two members with the same run id cannot disagree on a single key.

Each key is declared once, with its bounds and its comment; the reader, the error messages and the
commented file that `tapestry init` writes all come from that declaration. config.py reads node.toml with
the same reader.

Must not import torch, hivemind or transformers: the command line waits for this module.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tapestry.node.errors import ExitCode, UserError
from tapestry.node.protocol.canon import MEMBERS_MAX
from tapestry.node.protocol.members import SHARE, Charter, charter_fault
from tapestry.node.protocol.record import Genesis, wire_bytes
from tapestry.node.protocol.settings import SETTINGS, Settings, bounds_of
from tapestry.node.spec.tables import (
    Between,
    Name,
    Pattern,
    TableError,
    commented_toml,
    flat,
    keys_of,
    load_json,
    plain,
    read_table,
    read_toml,
    shown,
)
from tapestry.node.spec.training import (
    BELOW_ONE,
    PRESETS,
    DataSpec,
    ModelSpec,
    TrainingSpec,
    TrainSpec,
    without_effect,
)

# Sections that are newer than the first runs, each as nodes behaved before there was one: so a run that was
# founded without it is read. Never changed, whatever the defaults become: all must read one spec alike.
LATER: Mapping[str, Mapping[str, Any]] = {"gate": {"margin": 0.0, "windows": 8}}
# Keys that are newer than their section, likewise. Where a key has this value the canonical form leaves it
# out: a spec that does not need the key is the same text, with the same run id, before it and after.
LATER_KEYS: Mapping[str, Mapping[str, Any]] = {"data": {"add_bos": False}}


@dataclass(frozen=True, slots=True)
class RunSpec:
    """The run spec. Build one with `load`, `from_dict` or `from_canonical`: those check it."""

    name: Annotated[str, RUN_NAME, "What people call this run."]
    model: Annotated[ModelSpec, "The network that everyone trains. All sizes are part of the run id."]
    data: Annotated[DataSpec, "How text becomes training samples. The text itself is each member's own."]
    train: Annotated[TrainSpec, "What a member does between two rounds."]
    compression: Annotated[CompressionSpec, "How contributions cross the network."]
    mean: Annotated[MeanSpec, "How the contributions of a round become one."]
    outer: Annotated[OuterSpec, "The step that everyone takes, on the averaged contribution, after a round."]
    gate: Annotated[
        GateSpec, "Whether members measure a result on data of their own before they vote for it."
    ]
    audit: Annotated[AuditSpec, "Who looks over the reducers' shoulders: docs/trust.md."]
    round: Annotated[RoundSpec, "How long a round waits, and for whom."]
    limits: Annotated[LimitsSpec, "Bounds that all members keep."]
    members: Annotated[MembersSpec, "Who belongs to the run at its start, and the rules for what follows."]

    @classmethod
    def load(cls, path: Path) -> RunSpec:
        """Read run.toml; raises UserError, naming the file and the key."""
        return cls.from_dict(read_toml(path), str(path))

    @classmethod
    def load_to_found(cls, path: Path) -> RunSpec:
        """Read the run.toml of a run that is yet to be; raises UserError also for keys that make no sense."""
        spec = cls.load(path)
        try:
            _check_sense(spec)
        except TableError as error:
            raise UserError(f"{path}: {error}") from error
        return spec

    @classmethod
    def from_dict(cls, table: Mapping[str, object], where: str = "run spec") -> RunSpec:
        """Check a table of tables and fill in the defaults; raises UserError that starts with `where`."""
        name = table.get("name")
        if isinstance(name, str):  # one name, however the keyboard composes its letters
            table = {**table, "name": unicodedata.normalize("NFC", name)}
        try:
            return _checked(read_table(cls, table))
        except TableError as error:
            raise UserError(f"{where}: {error}") from error

    @classmethod
    def from_canonical(cls, data: bytes) -> RunSpec:
        """Read a run's spec: exactly the bytes that `canonical` makes, but for sections that are newer than
        the run (LATER, LATER_KEYS); or UserError with exit code 4."""
        try:
            table = load_json(data)
            newer: set[str] = set()
            if isinstance(table, Mapping):
                newer = {name for name in LATER if name not in table}
                table = {**table, **{name: LATER[name] for name in newer}}
                for name, keys in LATER_KEYS.items():
                    if isinstance(table.get(name), Mapping):
                        table[name] = {**keys, **table[name]}
            spec = _checked(read_table(cls, table))
            if spec.canonical(newer) != data:
                whole = {name: value for name, value in spec.to_dict().items() if name not in newer}
                raise TableError(_not_canonical(table, whole))
        except TableError as error:
            raise UserError(
                f"the run's spec is not one of this version of tapestry: {error}",
                exit_code=ExitCode.REFUSED,
                hint="the run goes on with the version that its members use; what this one changed is in its "
                "changelog",
            ) from error
        return spec

    @classmethod
    def of_genesis(cls, genesis: Genesis) -> RunSpec:
        """Of a run; raises UserError with exit code 4 where its rules are not what the chain follows."""
        spec = cls.from_canonical(genesis.spec.encode())
        if spec.members.charter() != genesis.charter:
            raise UserError(
                "the run is refused: the rules in its [members] are not those of its genesis",
                exit_code=ExitCode.REFUSED,
            )
        return spec

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, every key present."""
        return {key: plain(getattr(self, key)) for key, _ in keys_of(RunSpec)}

    def canonical(self, without: Collection[str] = ()) -> bytes:
        """JSON with sorted keys, no white space, ASCII, floats as Python's repr: one spec, one text.

        Without the sections `without`, and without the keys of LATER_KEYS that are as nodes behaved before.
        """
        table = {
            name: _without_later(name, value) for name, value in self.to_dict().items() if name not in without
        }
        text = json.dumps(table, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return text.encode("ascii")

    def to_toml(self) -> str:
        """A commented run.toml that reads back to this spec."""
        return (
            "# What all members of this run must agree on. The run id is made from it:\n"
            "# after the run is founded, a change makes another run.\n\n" + commented_toml(self)
        )


def preset_spec(preset: str, name: str) -> RunSpec:
    """The spec of a new run called `name`; raises UserError for an unknown preset or a bad name."""
    if preset not in PRESETS:
        raise UserError(f"{shown(preset)} is no preset; there are {', '.join(PRESETS)}")
    return new_spec(name, PRESETS[preset])


def new_spec(name: str, training: TrainingSpec, shard_elements: int | None = None) -> RunSpec:
    """The spec of a new run, all else by default; raises UserError for a bad name."""
    table = {"name": name} | plain(training)
    if shard_elements is not None:
        table["compression"] = {"shard_elements": shard_elements}
    return RunSpec.from_dict(table, "a new run")


def training_spec(spec: RunSpec) -> TrainingSpec:
    """The part of the spec that the trainer needs."""
    return TrainingSpec(spec.model, spec.data, spec.train)


def diff(here: RunSpec, other: RunSpec, where: str = "at the peer") -> list[str]:
    """One line per key that differs, as `train.inner_steps: 50 here, 100 at the peer`."""
    ours, theirs = dict(flat(here.to_dict())), dict(flat(other.to_dict()))
    return [
        f"{key}: {_side(ours, key, 'here')}, {_side(theirs, key, where)}" for key in _differing(ours, theirs)
    ]


def proposals(here: RunSpec, run: RunSpec) -> list[str]:
    """What of the differences a record can change while the run goes on: words for `tapestry propose set`."""
    ours, theirs = dict(flat(here.to_dict())), dict(flat(run.to_dict()))
    return [
        f"{key} {shown(ours[key])}"
        for key in _differing(ours, theirs)
        if key in SETTINGS and SETTINGS[key].takes(ours[key])
    ]


def why_no_change(spec: RunSpec, settings: Settings, key: str) -> str:
    """Why a record should not change `key` so that `settings` are what records have changed, in words; "" if
    it may: it would change nothing, or run.toml could not have it so either."""
    why = without_effect(key, training_spec(spec))
    if why:
        return why
    table = spec.to_dict()
    for name, value in settings.items():
        section, field = name.split(".")
        table[section][field] = int(value) if SETTINGS[name].whole else value
    try:
        _checked(read_table(RunSpec, table))
    except TableError as error:
        return str(error)
    return ""


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    return [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]


Seconds = Literal["auto"] | float
NORM_MAX = Between(0, 1_000, above=True)
NORM_MAX_COMMENT = (
    "Longest that a contribution may be in a shard, times the members' median norm there; it is scaled down "
    "to that. The reducer computes the norms itself."
)


# ---- the sections ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CompressionSpec:
    """[compression]."""

    codec: Annotated[
        Literal["int8-block", "bnb-dynamic8"],
        "int8-block: linear, blocks of 256. bnb-dynamic8: the dynamic map of bitsandbytes, for heavy tails.",
    ] = "int8-block"
    shard_elements: Annotated[
        int,
        Between(256, 2**26, multiple_of=256),
        "Parameters that are sent and averaged as one piece. Guess: not measured yet.",
    ] = 262_144
    residual: Annotated[bool, "Error feedback: add what the codec rounded away to the next contribution."] = (
        False
    )


MEAN_COMMENT = (
    "clipped (norm_max): no contribution counts for more than norm_max times the median norm. "
    "aligned (norm_max): clipped, without those that pull against all others together. "
    "mean: the weighted mean; one member can spoil it. trimmed (trim): the middle of each element's values. "
    "sign-elected (norm_max): clipped, then the mean of those that have the sign of the sum. "
    "With one or two contributions all are mean. docs/trust.md says which holds against what."
)


@dataclass(frozen=True, slots=True)
class ClippedSpec:
    """[mean] with rule = "clipped"."""

    rule: Annotated[Literal["clipped"], MEAN_COMMENT] = "clipped"
    norm_max: Annotated[float, NORM_MAX, NORM_MAX_COMMENT] = 1.5


@dataclass(frozen=True, slots=True)
class AlignedSpec:
    """[mean] with rule = "aligned"."""

    rule: Annotated[Literal["aligned"], MEAN_COMMENT] = "aligned"
    norm_max: Annotated[float, NORM_MAX, NORM_MAX_COMMENT] = 1.5


@dataclass(frozen=True, slots=True)
class PlainMeanSpec:
    """[mean] with rule = "mean"."""

    rule: Annotated[Literal["mean"], MEAN_COMMENT] = "mean"


@dataclass(frozen=True, slots=True)
class TrimmedSpec:
    """[mean] with rule = "trimmed"."""

    rule: Annotated[Literal["trimmed"], MEAN_COMMENT] = "trimmed"
    trim: Annotated[
        float,
        Between(0, 0.5),
        "At each element, the share of the weight at either end that does not count. 0.5: the median.",
    ] = 0.25


@dataclass(frozen=True, slots=True)
class SignElectedSpec:
    """[mean] with rule = "sign-elected"."""

    rule: Annotated[Literal["sign-elected"], MEAN_COMMENT] = "sign-elected"
    norm_max: Annotated[float, NORM_MAX, NORM_MAX_COMMENT] = 1.5


MeanSpec = ClippedSpec | AlignedSpec | PlainMeanSpec | TrimmedSpec | SignElectedSpec


OUTER_COMMENT = (
    "nesterov (lr, momentum) for inner_steps > 0; "
    "adamw (lr, betas, eps, weight_decay) for inner_steps = 0. Each takes its own keys only."
)


@dataclass(frozen=True, slots=True)
class NesterovSpec:
    """[outer] with optimizer = "nesterov": for pseudo-gradients. Defaults: DiLoCo, 2311.08105."""

    optimizer: Annotated[Literal["nesterov"], OUTER_COMMENT] = "nesterov"
    lr: Annotated[float, bounds_of("outer.lr"), "Outer learning rate. DiLoCo: 0.7."] = 0.7
    momentum: Annotated[float, Between(0, BELOW_ONE), "Nesterov momentum. DiLoCo: 0.9."] = 0.9
    norm: Annotated[
        Literal["mean", "members"],
        "How long the averaged contribution is before the step. mean: as it is, which is 1/sqrt(n) of theirs "
        "where members go their own ways. members: as long as contributions are, by their median.",
    ] = "mean"


@dataclass(frozen=True, slots=True)
class AdamWSpec:
    """[outer] with optimizer = "adamw": for mean gradients."""

    optimizer: Annotated[Literal["adamw"], OUTER_COMMENT] = "adamw"
    lr: Annotated[float, bounds_of("outer.lr"), "Outer learning rate."] = 1e-3
    betas: Annotated[tuple[float, float], Between(0, BELOW_ONE), "AdamW's decay rates."] = (
        0.9,
        0.95,
    )
    eps: Annotated[float, Between(1e-30, 1), "AdamW's epsilon."] = 1e-8
    weight_decay: Annotated[float, Between(0, 10), "AdamW's weight decay."] = 0.0


OuterSpec = NesterovSpec | AdamWSpec


@dataclass(frozen=True, slots=True)
class GateSpec:
    """[gate]"""

    margin: Annotated[
        float,
        bounds_of("gate.margin"),
        "A member does not vote for a result that makes the loss on its held-out data worse by more than "
        "this. What a majority refuses is made again without the contribution that differs most from the "
        "others. 0: nobody measures.",
    ] = 0.0
    windows: Annotated[
        int, Between(1, 4_096), "Held-out windows that a member measures on, of each result."
    ] = 8


@dataclass(frozen=True, slots=True)
class AuditSpec:
    """[audit]"""

    share: Annotated[
        float,
        bounds_of("audit.share"),
        "Of every record's shards, those that another member averages again after the commit; drawn by the "
        "record itself. Each costs its contributions once more. 0: nobody looks.",
    ] = 0.05
    on_lie: Annotated[
        Literal["remove", "rollback", "mark"],
        "remove: the nodes of those who may remove a member sign the removal of a reducer whose lie is "
        "proven, by themselves. rollback: and that the run goes on from the state before the lie, if their "
        "disks still have it. mark: it is shown to people.",
    ] = "remove"


@dataclass(frozen=True, slots=True)
class RoundSpec:
    """[round]. What is "auto" each node computes from the epochs and exchanges that it measured: pace.py."""

    straggler_wait_s: Annotated[
        Seconds,
        bounds_of("round.straggler_wait_s"),
        "With a quorum ready, how long to wait for the other live members. auto: a quarter of an epoch, at "
        "least 5 s.",
    ] = "auto"
    closing_grace_s: Annotated[
        Seconds,
        bounds_of("round.closing_grace_s"),
        "Time for stragglers to contribute what they have, once told. auto: three quarters of an epoch, at "
        "least 2 s.",
    ] = "auto"
    commit_grace_s: Annotated[
        float,
        bounds_of("round.commit_grace_s"),
        "With a quorum's accepts, how long to wait for those of the others.",
    ] = 1.0
    stall_s: Annotated[
        float, Between(0.1, 3_600), "A member that makes no progress for so long has failed in this round."
    ] = 5.0
    exchange_max_s: Annotated[
        Seconds,
        bounds_of("round.exchange_max_s"),
        "Longest exchange of a round, even if it makes progress. auto: what the model takes at 10 Mbit/s, at "
        "least 300 s; less where exchanges are short, more after one that was given up.",
    ] = "auto"
    quorum_loss_s: Annotated[
        Seconds,
        bounds_of("round.quorum_loss_s"),
        "After so long without a quorum, on_quorum_loss decides. auto: an epoch, at least 30 s.",
    ] = "auto"
    wait_max_s: Annotated[
        float, bounds_of("round.wait_max_s"), "Longest that any of the four may be where it is auto."
    ] = 43_200.0
    on_quorum_loss: Annotated[
        Literal["auto", "wait", "continue"],
        "wait: the rest stands still. continue: the survivors go on alone, and when they meet again, what a "
        "majority of the last full electorate signed wins. auto: wait where three or more decide.",
    ] = "auto"
    min_members: Annotated[
        int, bounds_of("round.min_members"), "No round starts with fewer contributions."
    ] = 1
    max_influence: Annotated[
        float, bounds_of("round.max_influence"), "Largest share of the total weight that one member may have."
    ] = 1.0


@dataclass(frozen=True, slots=True)
class LimitsSpec:
    """[limits]. Guesses, sized for runs of up to 64 members."""

    max_peers: Annotated[int, Between(2, 10_000), "Members that a node talks to."] = 64
    max_control_frame_bytes: Annotated[
        int, Between(4_096, 2**26), "Longest message other than shards; what is longer is refused unread."
    ] = 1_048_576
    checkpoint_every_epochs: Annotated[int, Between(1, 100_000), "Epochs between two checkpoints."] = 5
    checkpoints_kept: Annotated[int, Between(1, 1_000), "Checkpoints that stay on disk."] = 3
    updates_kept_epochs: Annotated[
        int, Between(1, 10_000_000), "Epochs whose encoded result stays on disk, for members that were away."
    ] = 1_000
    updates_kept_bytes: Annotated[
        int, Between(2**20, 2**50), "Room for those results; the oldest go first."
    ] = 8 * 2**30


@dataclass(frozen=True, slots=True)
class MembersSpec:
    """[members]. Later records may change all of it: `tapestry propose`."""

    admission: Annotated[
        Literal["members", "open"],
        "members: who comes waits until it is admitted. open: who comes contributes, and votes when "
        "admitted.",
    ] = "members"
    admit_by: Annotated[
        str,
        Pattern(r"founder|majority|council [1-9]\d{0,3}/[1-9]\d{0,3}", 'founder, majority, or "council K/N"'),
        "Who admits, removes and changes rules: any founder, K of the N founders, or most of the members.",
    ] = "founder"
    founders: Annotated[
        tuple[str, ...], "Peer ids that belong to the run from the start, beside the one who founds it."
    ] = ()
    voice: Annotated[
        Literal["equal", "tokens", "fixed"],
        "What a contribution counts: the same for all, the tokens that its sender says it trained on, or a "
        "number that records give each member.",
    ] = "equal"
    open_share: Annotated[
        float,
        Between(0.000001, 0.999999),
        "In an open run, the share that all who are no members have together.",
    ] = 0.2
    open_votes_after: Annotated[
        int,
        Between(0, 1_000_000),
        "In an open run, the contributions after which one is a member by itself; 0: only by admission.",
    ] = 0

    def charter(self) -> Charter:
        """As the genesis has it."""
        share = round(self.open_share * SHARE)
        return Charter(self.admission, self.admit_by, self.voice, share, self.open_votes_after)


def _not_canonical(table: object, whole: Mapping[str, Any]) -> str:
    """What the table lacks of the whole spec that was read from it, if anything."""
    assert isinstance(table, Mapping), "a spec was read from it"
    for name, value in whole.items():
        if name not in table:
            return f"it has no {name}"
        if isinstance(value, Mapping) and isinstance(table[name], Mapping):
            for key in value:
                if key not in table[name]:
                    return f"it has no {name}.{key}"
    return "not in canonical form: a value is written differently"


def _without_later(section: str, value: Any) -> Any:
    """The section without the keys that say what nodes did before there were these keys."""
    later = LATER_KEYS.get(section)
    if later is None:
        return value
    return {key: one for key, one in value.items() if key not in later or one != later[key]}


def _checked(spec: RunSpec) -> RunSpec:
    """What single keys cannot say."""
    fault = charter_fault(spec.members.charter(), 1 + len(spec.members.founders))
    if fault is not None:
        rule = shown(spec.members.admit_by)
        raise TableError(
            f"members.admit_by: {rule} with {1 + len(spec.members.founders)} founders; "
            "a council K/N has all N of them (the one who founds the run, and those of members.founders)"
        )
    training_spec(spec).check()
    if spec.round.min_members > spec.limits.max_peers:
        raise TableError(
            f"round.min_members: {spec.round.min_members} with limits.max_peers = {spec.limits.max_peers}; "
            "must not be larger"
        )
    members = min(spec.limits.max_peers, MEMBERS_MAX)
    votes = 2 * members  # by the electorate before as well
    record_bytes = wire_bytes(members, 2 * votes + members)  # with as many draws, and `behind`
    if spec.limits.max_control_frame_bytes < record_bytes:
        raise TableError(
            f"limits.max_control_frame_bytes: {spec.limits.max_control_frame_bytes} with limits.max_peers = "
            f"{spec.limits.max_peers}; must be at least {record_bytes}, for a record with all of them"
        )
    return spec


def _check_sense(spec: RunSpec) -> None:
    """Keys that contradict each other, or have no effect. Raises TableError.

    Asked when a run is founded; a run that has such a spec already goes on with it.
    """
    inner_steps, optimizer, accumulation = (
        spec.train.inner_steps,
        spec.outer.optimizer,
        spec.train.accumulation,
    )
    if accumulation > 1 and inner_steps:
        raise TableError(
            f"train.accumulation: {accumulation} with train.inner_steps = {inner_steps}; it has no effect "
            "there: set accumulation = 1, or inner_steps = 0 (train.batch_size makes inner steps larger)"
        )
    if inner_steps and optimizer == "adamw":
        raise TableError(
            f'outer.optimizer: "adamw" with train.inner_steps = {inner_steps}; it takes mean gradients: '
            'set outer.optimizer = "nesterov", or train.inner_steps = 0'
        )
    if not inner_steps and optimizer == "nesterov":
        raise TableError(
            'outer.optimizer: "nesterov" with train.inner_steps = 0; it takes pseudo-gradients: '
            'set outer.optimizer = "adamw", or train.inner_steps above 0'
        )


# ---- declaring keys ----------------------------------------------------------------------------------


RUN_NAME = Name(64)


# ---- reading -----------------------------------------------------------------------------------------


# ---- writing -----------------------------------------------------------------------------------------


def _side(values: Mapping[str, object], key: str, where: str) -> str:
    return f"{shown(values[key])} {where}" if key in values else f"not {where}"
