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

import dataclasses
import difflib
import json
import math
import re
import textwrap
import tomllib
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from tapestry.node.errors import ExitCode, UserError
from tapestry.node.protocol.chain import MEMBERS_MAX, wire_bytes
from tapestry.node.trainer.settings import PRESETS, InnerSettings, ModelSettings, TrainingSettings

FILE_BYTES_MAX = 64 * 1024  # Guess; a run.toml with all its comments has 8 kB.
SHOWN_CHARS_MAX = 60  # of a wrong value, in an error message
BELOW_ONE = 0.999999  # a decay rate of 1 would never forget its start

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RunSpec:
    """The run spec. Build one with `load`, `from_dict` or `from_canonical`: those check it."""

    name: Annotated[str, RUN_NAME, "What people call this run."]
    model: Annotated[ModelSpec, "The network that everyone trains. All sizes are part of the run id."]
    data: Annotated[DataSpec, "How text becomes training samples. The text itself is each member's own."]
    train: Annotated[TrainSpec, "What a member does between two rounds."]
    compression: Annotated[CompressionSpec, "How contributions cross the network."]
    outer: Annotated[OuterSpec, "The step that everyone takes, on the averaged contribution, after a round."]
    round: Annotated[RoundSpec, "How long a round waits, and for whom."]
    limits: Annotated[LimitsSpec, "Bounds that all members keep."]

    @classmethod
    def load(cls, path: Path) -> RunSpec:
        """Read run.toml; raises UserError, naming the file and the key."""
        return cls.from_dict(read_toml(path), str(path))

    @classmethod
    def from_dict(cls, table: Mapping[str, object], where: str = "run spec") -> RunSpec:
        """Check a table of tables and fill in the defaults; raises UserError that starts with `where`."""
        try:
            return _checked(read_table(cls, table))
        except TableError as error:
            raise UserError(f"{where}: {error}") from error

    @classmethod
    def from_canonical(cls, data: bytes) -> RunSpec:
        """Read a peer's spec: exactly the bytes that `canonical` makes, or UserError with exit code 4."""
        try:
            spec = _checked(read_table(cls, _load_json(data)))
            if spec.canonical() != data:
                raise TableError("not in canonical form: a key is missing or a value is written differently")
        except TableError as error:
            raise UserError(
                f"the peer's run spec cannot be used: {error}",
                exit_code=ExitCode.REFUSED,
                hint="the peer may run another version of tapestry",
            ) from error
        return spec

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, every key present."""
        return {key: _plain(getattr(self, key)) for key, _ in keys_of(RunSpec)}

    def canonical(self) -> bytes:
        """JSON with sorted keys, no white space, ASCII, floats as Python's repr: one spec, one text."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
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
    model, inner = PRESETS[preset].model, PRESETS[preset].inner
    return RunSpec.from_dict(
        {
            "name": name,
            "model": {key: getattr(model, key) for key, _ in keys_of(ModelSpec) if key != "seed"}
            | {"seed": PRESETS[preset].seed},
            "data": {"tokenizer": model.tokenizer, "sequence_length": model.sequence_length},
            "train": {
                "batch_size": inner.batch_size,
                "inner_steps": inner.steps,
                "overlap": inner.overlap,
                "accumulation": inner.accumulation,
                "optimizer": inner.optimizer,
                "lr": inner.lr,
                "betas": [inner.beta1, inner.beta2],
                "eps": inner.eps,
                "weight_decay": inner.weight_decay,
                "warmup_steps": inner.warmup_steps,
                "grad_clip": inner.gradient_clip,
            },
        },
        "a new run",
    )


def training_settings(spec: RunSpec) -> TrainingSettings:
    """The part of the spec that the trainer needs, in its own words."""
    model, train = spec.model, spec.train
    return TrainingSettings(
        model=ModelSettings(
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            layers=model.layers,
            heads=model.heads,
            kv_heads=model.kv_heads,
            sequence_length=spec.data.sequence_length,
            architecture=model.architecture,
            tokenizer=spec.data.tokenizer,
            tie_embeddings=model.tie_embeddings,
        ),
        inner=InnerSettings(
            steps=train.inner_steps,
            batch_size=train.batch_size,
            accumulation=train.accumulation,
            optimizer=train.optimizer,
            lr=train.lr,
            beta1=train.betas[0],
            beta2=train.betas[1],
            eps=train.eps,
            weight_decay=train.weight_decay,
            warmup_steps=train.warmup_steps,
            gradient_clip=train.grad_clip,
            overlap=train.overlap,
        ),
        seed=model.seed,
    )


def diff(here: RunSpec, peer: RunSpec) -> list[str]:
    """One line per key that differs, as `train.inner_steps: 50 here, 100 at the peer`."""
    ours, theirs = dict(_flat(here.to_dict())), dict(_flat(peer.to_dict()))
    return [
        f"{key}: {_side(ours, key, 'here')}, {_side(theirs, key, 'at the peer')}"
        for key in {**ours, **theirs}
        if ours.get(key) != theirs.get(key)
    ]


# ---- the sections ------------------------------------------------------------------------------------

_TINY = PRESETS["tiny"]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """[model]. The defaults here, in [data] and in [train] are those of the preset `tiny`."""

    architecture: Annotated[
        Literal["llama"], "llama: decoder-only, as in transformers. The only one so far."
    ] = "llama"
    hidden_size: Annotated[int, Between(8, 16_384), "Width. heads divides it, with an even quotient."] = (
        _TINY.model.hidden_size
    )
    intermediate_size: Annotated[int, Between(8, 65_536), "Width inside the feed-forward layers."] = (
        _TINY.model.intermediate_size
    )
    layers: Annotated[int, Between(1, 256), "Number of transformer layers."] = _TINY.model.layers
    heads: Annotated[int, Between(1, 256), "Attention heads."] = _TINY.model.heads
    kv_heads: Annotated[int, Between(1, 256), "Key and value heads; divides heads."] = _TINY.model.kv_heads
    tie_embeddings: Annotated[bool, "Use one matrix as input embedding and output layer."] = (
        _TINY.model.tie_embeddings
    )
    seed: Annotated[int, Between(0, 2**32 - 1), "Seed of the initial parameters."] = _TINY.seed


@dataclass(frozen=True, slots=True)
class DataSpec:
    """[data]."""

    tokenizer: Annotated[
        Literal["byte"], "byte: UTF-8 bytes and three special tokens. The only one so far."
    ] = "byte"
    sequence_length: Annotated[int, Between(2, 65_536), "Tokens in one training sample."] = (
        _TINY.model.sequence_length
    )


@dataclass(frozen=True, slots=True)
class TrainSpec:
    """[train]. The inner optimizer's numbers have no effect with inner_steps = 0."""

    batch_size: Annotated[int, Between(1, 65_536), "Samples in one forward pass."] = _TINY.inner.batch_size
    inner_steps: Annotated[
        int,
        Between(0, 100_000),
        "Local steps before each round (DiLoCo, 2311.08105: 30 to 500). "
        "0 sends a mean gradient instead, and the inner optimizer is not used.",
    ] = _TINY.inner.steps
    overlap: Annotated[
        bool,
        "Go on with the next inner steps while the round exchanges, take its result one round late, and keep "
        "them: slow links cost no training time, while a round is shorter than the inner steps. "
        "Needs inner_steps > 0.",
    ] = _TINY.inner.overlap
    accumulation: Annotated[
        int, Between(1, 4_096), "With inner_steps = 0: batches whose mean gradient is one contribution."
    ] = _TINY.inner.accumulation
    optimizer: Annotated[
        Literal["adamw"], "The inner optimizer; its state never leaves the member. The only one so far."
    ] = "adamw"
    lr: Annotated[float, Between(0, 10, above=True), "Learning rate of the inner optimizer."] = _TINY.inner.lr
    betas: Annotated[tuple[float, float], Between(0, BELOW_ONE), "AdamW's decay rates."] = (
        _TINY.inner.beta1,
        _TINY.inner.beta2,
    )
    eps: Annotated[float, Between(1e-30, 1), "AdamW's epsilon."] = _TINY.inner.eps
    weight_decay: Annotated[float, Between(0, 10), "AdamW's weight decay. DiLoCo: 0.1."] = (
        _TINY.inner.weight_decay
    )
    warmup_steps: Annotated[
        int, Between(0, 1_000_000), "Inner steps, counted over the whole run, in which lr rises from 0."
    ] = _TINY.inner.warmup_steps
    grad_clip: Annotated[
        float, Between(1e-9, 1e9), "Largest norm of a step's gradient; a large number does not clip."
    ] = _TINY.inner.gradient_clip


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


OUTER_COMMENT = (
    "nesterov (lr, momentum) for inner_steps > 0; "
    "adamw (lr, betas, eps, weight_decay) for inner_steps = 0. Each takes its own keys only."
)


@dataclass(frozen=True, slots=True)
class NesterovSpec:
    """[outer] with optimizer = "nesterov": for pseudo-gradients. Defaults: DiLoCo, 2311.08105."""

    optimizer: Annotated[Literal["nesterov"], OUTER_COMMENT] = "nesterov"
    lr: Annotated[float, Between(0, 10, above=True), "Outer learning rate. DiLoCo: 0.7."] = 0.7
    momentum: Annotated[float, Between(0, BELOW_ONE), "Nesterov momentum. DiLoCo: 0.9."] = 0.9


@dataclass(frozen=True, slots=True)
class AdamWSpec:
    """[outer] with optimizer = "adamw": for mean gradients."""

    optimizer: Annotated[Literal["adamw"], OUTER_COMMENT] = "adamw"
    lr: Annotated[float, Between(0, 10, above=True), "Outer learning rate."] = 1e-3
    betas: Annotated[tuple[float, float], Between(0, BELOW_ONE), "AdamW's decay rates."] = (
        0.9,
        0.95,
    )
    eps: Annotated[float, Between(1e-30, 1), "AdamW's epsilon."] = 1e-8
    weight_decay: Annotated[float, Between(0, 10), "AdamW's weight decay."] = 0.0


OuterSpec = NesterovSpec | AdamWSpec


@dataclass(frozen=True, slots=True)
class RoundSpec:
    """[round]. The times are guesses, made for rounds of about ten seconds."""

    straggler_wait_s: Annotated[
        float, Between(0, 86_400), "With a quorum ready, how long to wait for the other live members."
    ] = 5.0
    closing_grace_s: Annotated[
        float,
        Between(0, 3_600),
        "Time for stragglers to contribute what they have, once told.",
    ] = 2.0
    commit_grace_s: Annotated[
        float, Between(0, 3_600), "With a quorum's accepts, how long to wait for those of the others."
    ] = 1.0
    stall_s: Annotated[
        float, Between(0.1, 3_600), "A member that makes no progress for so long has failed in this round."
    ] = 5.0
    exchange_max_s: Annotated[
        float,
        Between(1, 604_800),
        "Longest exchange of a round, even if it makes progress: raise it for large models on slow links.",
    ] = 300.0
    quorum_loss_s: Annotated[
        float, Between(1, 604_800), "After so long without a quorum, on_quorum_loss decides."
    ] = 30.0
    on_quorum_loss: Annotated[
        Literal["continue", "wait"],
        "continue: the survivors go on alone, and the chain with more work wins when they meet again. "
        "wait: they stand still.",
    ] = "continue"
    min_members: Annotated[int, Between(1, 10_000), "No round starts with fewer contributions."] = 1
    max_influence: Annotated[
        float, Between(0, 1, above=True), "Largest share of the total weight that one member may have."
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


def _checked(spec: RunSpec) -> RunSpec:
    """What single keys cannot say."""
    model = spec.model
    if model.hidden_size % (2 * model.heads):
        raise TableError(
            f"model.hidden_size: {model.hidden_size} with model.heads = {model.heads}; "
            f"must be a multiple of {2 * model.heads}, for an even width of each head"
        )
    if model.heads % model.kv_heads:
        raise TableError(
            f"model.kv_heads: {model.kv_heads} with model.heads = {model.heads}; must divide model.heads"
        )
    if spec.train.overlap and not spec.train.inner_steps:
        raise TableError(
            "train.overlap: true with train.inner_steps = 0; a mean gradient waits for its round: "
            "set train.inner_steps above 0, or train.overlap = false"
        )
    if spec.round.min_members > spec.limits.max_peers:
        raise TableError(
            f"round.min_members: {spec.round.min_members} with limits.max_peers = {spec.limits.max_peers}; "
            "must not be larger"
        )
    members = min(spec.limits.max_peers, MEMBERS_MAX)
    record_bytes = wire_bytes(members, 2 * members)  # signed by the electorate before as well
    if spec.limits.max_control_frame_bytes < record_bytes:
        raise TableError(
            f"limits.max_control_frame_bytes: {spec.limits.max_control_frame_bytes} with limits.max_peers = "
            f"{spec.limits.max_peers}; must be at least {record_bytes}, for a record with all of them"
        )
    return spec


# ---- declaring keys ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Between:
    """A number from low to high; `above` leaves out low itself."""

    low: float
    high: float
    above: bool = False
    multiple_of: int = 1

    def admits(self, value: float) -> bool:
        inside = self.low <= value <= self.high and not (self.above and value == self.low)
        return inside and not (self.multiple_of > 1 and value % self.multiple_of)

    def __str__(self) -> str:
        low, high = _number(self.low), _number(self.high)
        steps = f", a multiple of {self.multiple_of}" if self.multiple_of > 1 else ""
        return f"above {low}, at most {high}{steps}" if self.above else f"from {low} to {high}{steps}"


@dataclass(frozen=True, slots=True)
class Pattern:
    """A string that the regular expression matches as a whole; `words` say the same."""

    regex: str
    words: str

    def admits(self, value: str) -> bool:
        return re.fullmatch(self.regex, value, re.ASCII) is not None

    def __str__(self) -> str:
        return f"of {self.words}"


Rule = Between | Pattern


@dataclass(frozen=True, slots=True)
class Key:
    """One declared key: its type, its rule, the comment that the template carries."""

    kind: Any  # what typing.get_type_hints gives: int, Literal[...], tuple[float, float], a dataclass, ...
    rule: Rule | None
    comment: str


RUN_NAME = Pattern(
    r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}",
    "1 to 64 letters, digits, blanks and . _ -, the first a letter or a digit",
)


class TableError(ValueError):
    """A table that is not as declared; the message names the key, its value and what is allowed."""


def keys_of(kind: type) -> Iterator[tuple[str, Key]]:
    """The keys that a dataclass declares, in order."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        inner, *notes = get_args(hint)
        rule = next((note for note in notes if isinstance(note, Between | Pattern)), None)
        yield name, Key(inner, rule, notes[-1])


# ---- reading -----------------------------------------------------------------------------------------


def read_toml(path: Path) -> dict[str, Any]:
    """The file's tables; raises UserError that names the file, and the line where TOML says it."""
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
        if len(data) > FILE_BYTES_MAX:
            raise UserError(f"{path}: larger than {FILE_BYTES_MAX} bytes, which is not a configuration file")
        return tomllib.loads(data.decode("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text") from error
    except (ValueError, RecursionError) as error:  # tomllib's own error, or int's on too many digits
        raise UserError(f"{path}: not valid TOML: {error}") from error


def read_table(kind: type[T], table: object, prefix: str = "") -> T:
    """Build the dataclass `kind` from a table; raises TableError. Missing keys take their defaults."""
    if not isinstance(table, Mapping):
        raise TableError(f"{prefix[:-1]}: {shown(table)} is not a table")
    keys = dict(keys_of(kind))
    for name in table:
        if name not in keys:
            _refuse_unknown(str(name), list(keys), prefix)
    values = {
        name: _read_value(key, table.get(name, _MISSING), prefix + name)
        for name, key in keys.items()
        if name in table or is_section(key.kind)
    }
    for required in dataclasses.fields(kind):  # type: ignore[arg-type]  # every kind here is a dataclass
        if required.name not in values and required.default is dataclasses.MISSING:
            raise TableError(f"{prefix}{required.name}: missing")
    return kind(**values)


_MISSING: Mapping[str, object] = types.MappingProxyType({})  # a section that is left out


def is_section(kind: Any) -> bool:
    """Whether a key's type is a table: a dataclass, or several to choose from by their first key."""
    return any(dataclasses.is_dataclass(choice) for choice in _choices(kind))


def _choices(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _read_value(key: Key, value: object, path: str) -> object:
    if is_section(key.kind):
        return _read_section(_choices(key.kind), value, path)
    if get_origin(key.kind) is not tuple:
        return _read_scalar(key.kind, key.rule, value, path)
    element, *rest = get_args(key.kind)
    count = None if rest == [Ellipsis] else 1 + len(rest)
    if not isinstance(value, list) or count not in (None, len(value)):
        what = "a list" if count is None else f"a list of {count}"
        raise TableError(f"{path}: {shown(value)} is not {what}; each {allowed(element, key.rule)}")
    return tuple(_read_scalar(element, key.rule, item, path) for item in value)


def _read_section(kinds: tuple[type, ...], value: object, path: str) -> object:
    """One of several dataclasses: the first key, a Literal, says which; the first of them is the default."""
    if len(kinds) == 1 or not isinstance(value, Mapping):
        return read_table(kinds[0], value, f"{path}.")
    tags = {get_args(tag.kind)[0]: kind for kind in kinds for tag in [next(keys_of(kind))[1]]}
    tag_name = next(keys_of(kinds[0]))[0]
    tag = value.get(tag_name, next(iter(tags)))
    if not isinstance(tag, str) or tag not in tags:
        raise TableError(f"{path}.{tag_name}: {shown(tag)} is not {_one_of(tuple(tags))}")
    known = [name for name, _ in keys_of(tags[tag])]
    elsewhere = {name for kind in kinds for name, _ in keys_of(kind)}
    for name in value:
        if name not in known and name in elsewhere:
            raise TableError(
                f"{path}.{name}: no key of {tag_name} = {shown(tag)}, which takes {', '.join(known[1:])}"
            )
    return read_table(tags[tag], value, f"{path}.")


def _read_scalar(kind: Any, rule: Rule | None, value: object, path: str) -> object:
    """The value as the declared type. An integer will do for a float; true and false are no numbers."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = _as_float(value)
    fits = value in get_args(kind) if get_origin(kind) is Literal else type(value) is kind
    if not fits or (isinstance(value, float) and not math.isfinite(value)):
        raise TableError(f"{path}: {shown(value)} is not {allowed(kind, rule)}")
    if rule is not None and not rule.admits(value):  # type: ignore[arg-type]  # a key's rule fits its type
        raise TableError(f"{path}: {shown(value)} is not {allowed(kind, rule)}")
    return value + 0.0 if isinstance(value, float) else value  # -0.0 becomes 0.0: equal specs, equal bytes


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _refuse_unknown(name: str, known: list[str], prefix: str) -> NoReturn:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    meant = f"did you mean {prefix}{close[0]}?" if close else f"known here: {', '.join(known)}"
    raise TableError(f"{prefix}{_clipped(name)}: unknown key; {meant}")


def _load_json(data: bytes) -> object:
    """JSON as a peer may send it: bounded, no repeated keys, no NaN. Raises TableError."""
    if len(data) > FILE_BYTES_MAX:
        raise TableError(f"{len(data)} bytes, at most {FILE_BYTES_MAX} are allowed")
    try:
        return json.loads(data.decode("ascii"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise TableError(f"not JSON: {error}") from error


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise TableError("a key is there twice")
    return table


def _refuse_constant(name: str) -> NoReturn:
    raise TableError(f"{name} is no number")


# ---- writing -----------------------------------------------------------------------------------------


def commented_toml(table: object) -> str:
    """The dataclass as TOML, every key under its comment, sections last."""
    keys = list(keys_of(type(table)))
    plain = [_commented(name, key, getattr(table, name)) for name, key in keys if not is_section(key.kind)]
    sections = [
        f"{_comment(key.comment)}\n[{name}]\n{commented_toml(getattr(table, name))}"
        for name, key in keys
        if is_section(key.kind)
    ]
    return "\n".join(plain + sections)


def _commented(name: str, key: Key, value: object) -> str:
    element = get_args(key.kind)[0] if get_origin(key.kind) is tuple else key.kind
    self_evident = element is str or len(get_args(element)) == 1  # any text, or one choice
    bounds = f"\n# Allowed: {allowed(element, key.rule)}" if key.rule or not self_evident else ""
    return f"{_comment(key.comment)}{bounds}\n{name} = {toml_value(_plain(value))}\n"


def _comment(text: str) -> str:
    return textwrap.fill(text, 100, initial_indent="# ", subsequent_indent="# ", break_long_words=False)


def toml_value(value: object) -> str:
    """A bool, a number, a string, or a list of them, in TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def allowed(kind: Any, rule: Rule | None) -> str:
    """What a key takes, in words: for the error message and for the comment in the file."""
    if get_origin(kind) is Literal:
        return _one_of(get_args(kind))
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}[kind]
    return f"{words} {rule}" if rule else words


def shown(value: object) -> str:
    """A value in an error message: as TOML writes it, not too long, whatever it is."""
    if isinstance(value, list):
        return _clipped(
            f"[{', '.join('[...]' if isinstance(item, list) else shown(item) for item in value)}]"
        )
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, int) and value.bit_length() > 64:
        return "a number of many digits"
    return _clipped(toml_value(value))


def _clipped(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS_MAX else text[: SHOWN_CHARS_MAX - 3] + "..."


def _one_of(values: tuple[str, ...]) -> str:
    return " or ".join(toml_value(value) for value in values)


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def _plain(value: Any) -> Any:
    """Dataclasses as dicts, tuples as lists."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _side(values: Mapping[str, object], key: str, where: str) -> str:
    return f"{shown(values[key])} {where}" if key in values else f"not {where}"
