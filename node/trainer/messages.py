"""What the node and its trainer worker say to each other, and the frames that carry it.

A frame is a 4-byte big-endian length and a msgpack map: `type` and exactly the fields of that message.
`Command`s go to the worker, `Report`s come from it. Both ends run the same code on one machine, yet every
frame is checked in full: a worker that went wrong must not take its node along.

Must not import torch, or anything of ours but protocol/strict.py.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from tapestry.node.protocol import strict

FRAME_BYTES_MAX = 4 << 20  # a Hello with a hundred thousand named tensors
TEXT_CHARS_MAX = 4096
PATHS = "surrogateescape"  # as Python has file names that are no text: those of the data go to the trainer
HEADER = struct.Struct(">I")


class MessageError(ValueError):
    """A frame that is not one of ours; one line that says why."""


@dataclass(frozen=True, slots=True)
class Configure:
    """The first message: tables.plain of the WorkerSettings."""

    settings: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Attach:
    """The shared buffers now have room for n parameters and their encoded contribution: map them."""

    n: int


@dataclass(frozen=True, slots=True)
class Initialise:
    """Write a random initial state, f32 (n,), into the buffer for it, which has room only just now."""


@dataclass(frozen=True, slots=True)
class Begin:
    """Train `epoch` from the parameters in shared memory; supersedes what was going on.

    If they follow the base of the last contribution, steps of `epoch` taken since are kept.
    """

    epoch: int
    generation: int  # named in what comes of it: two of one epoch are not the same
    follows: bool
    counted: (
        int  # generation of the contribution that has counted since the last Begin; 0: none; -1: an older
    )
    slot: int  # of the contribution's buffer, to be written to; shared.py
    lr: float = 0.0  # these three: spec.training.Changed
    batches: int = 0
    batch_size: int = 0
    afresh: bool = False  # the run was rolled back: the inner optimizer has seen what is undone


@dataclass(frozen=True, slots=True)
class Close:
    """End the inner steps of `epoch` early, after at least one, and contribute."""

    epoch: int


@dataclass(frozen=True, slots=True)
class GoOn:
    """All have contributed to `epoch`, and exchange: take steps of the next one until its base is there."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Abort:
    """Drop what is going on."""


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Report the validation loss of the parameters in shared memory, which are state `epoch`."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Judge:
    """Report the held-out losses of the parameters in shared memory, state `base`, and of those beside them,
    in the buffer of the initial state, which are what a step makes of it: state `head`."""

    base: str
    head: str


@dataclass(frozen=True, slots=True)
class Save:
    """Write the inner optimizer as of the beginning of `epoch` to disk."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Exit."""


@dataclass(frozen=True, slots=True)
class Hello:
    """The model is built and the data are ready. `inner_epoch` is the saved inner state's, -1 if fresh."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    train_tokens: int
    validation_tokens: int
    device: str  # for people
    inner_epoch: int
    note: str  # why a saved inner state was not used; empty otherwise
    sets: tuple[str, ...] = ()  # names of the validation sets
    summary: tuple[str, ...] = ()  # what was read of the data, left out and doubted; for people


@dataclass(frozen=True, slots=True)
class Tokenizing:
    """Before the Hello: so many bytes of the data's files are tokenized, at this rate since the start."""

    done_bytes: int
    total_bytes: int
    bytes_per_second: float


@dataclass(frozen=True, slots=True)
class Initialised:
    """The initial state lies in its buffer."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Batches done in the epoch so far; `loss` is the last batch's, `tokens` the epoch's.

    With overlap, `epoch` may be the one after that of the latest Begin.
    """

    epoch: int
    generation: int  # of the latest Begin
    step: int
    steps: int
    loss: float | None  # None: a script that does not tell it
    tokens: int
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Contribution:
    """It lies encoded in its buffer. `weight` = `tokens` trained on; `loss` is the epoch's mean."""

    epoch: int
    generation: int
    weight: int
    norm: float
    loss: float | None
    tokens: int
    steps: int
    waited_s: float  # since the last one: had no step to take
    passes: float = 0.0  # over this member's data, so far


@dataclass(frozen=True, slots=True)
class Alive:
    """A step or an evaluation takes long, and gets on."""


@dataclass(frozen=True, slots=True)
class Validation:
    """The losses of the base on this member's sets; `loss` is their mean."""

    epoch: int
    loss: float
    sets: tuple[str, ...] = ()
    losses: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Judged:
    """The held-out loss before the step to state `head`, and after it."""

    head: str
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Saved:
    """The inner optimizer is on disk, or `error` says why not."""

    epoch: int
    error: str


@dataclass(frozen=True, slots=True)
class Notice:
    """What whoever runs the node should read in its log: the worker goes on otherwise than it was told."""

    text: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The worker gives up and exits. `reason`: data, disk, model, settings, device, memory, diverged,
    or crashed."""

    reason: str
    text: str


Command = Configure | Attach | Initialise | Begin | Close | GoOn | Abort | Evaluate | Judge | Save | Stop
Report = (
    Alive
    | Hello
    | Tokenizing
    | Initialised
    | Progress
    | Contribution
    | Validation
    | Judged
    | Saved
    | Notice
    | Failed
)


def pack(message: Command | Report) -> bytes:
    """The whole frame."""
    fields = {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}
    body: bytes = msgpack.packb(
        {"type": type(message).__name__, **fields}, use_bin_type=True, unicode_errors=PATHS
    )
    assert len(body) <= FRAME_BYTES_MAX
    return HEADER.pack(len(body)) + body


def body_length(header: bytes) -> int:
    """Raises MessageError for a length that no frame of ours has."""
    (length,) = HEADER.unpack(header)
    if not 0 < length <= FRAME_BYTES_MAX:
        raise MessageError(f"a frame of {length} bytes, the limit is {FRAME_BYTES_MAX}")
    return int(length)


def unpack_command(body: bytes) -> Command:
    """Raises MessageError."""
    command: Command = _unpack(body, _COMMANDS, PATHS)
    return command


def unpack_report(body: bytes) -> Report:
    """Raises MessageError."""
    report: Report = _unpack(body, _REPORTS, "strict")
    return report


def _unpack(body: bytes, known: dict[str, Any], unicode_errors: str) -> Any:
    try:
        fields = msgpack.unpackb(body, raw=False, strict_map_key=True, unicode_errors=unicode_errors)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise MessageError(f"not msgpack: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("type"), str):
        raise MessageError("not a map with a type")
    cls = known.get(fields.pop("type"))
    if cls is None:
        raise MessageError("unknown type of message")
    expected = dataclasses.fields(cls)
    if set(fields) != {field.name for field in expected}:
        raise MessageError(f"{cls.__name__} with wrong fields")
    return cls(**{field.name: _checked(cls, field, fields[field.name]) for field in expected})


def _checked(cls: type, field: dataclasses.Field[Any], value: Any) -> Any:
    what = f"{cls.__name__}.{field.name}"
    try:
        return _FIELDS[str(field.type)](value, what)
    except strict.Malformed as error:
        raise MessageError(f"not a valid {field.type}: {error}") from None


def _integer(value: Any, what: str) -> int:
    return strict.integer(value, -1, (1 << 63) - 1, what)


def _text(value: Any, what: str) -> str:
    return strict.text(value, TEXT_CHARS_MAX, what)


def _list(value: Any, what: str) -> Sequence[Any]:
    return strict.sequence(value, FRAME_BYTES_MAX, what)  # the frame has bounded it


def _maybe_finite(value: Any, what: str) -> float | None:
    return None if value is None else strict.finite(value, what)


def _names(value: Any, what: str) -> tuple[str, ...]:
    return tuple([_text(name, what) for name in _list(value, what)])


def _floats(value: Any, what: str) -> tuple[float, ...]:
    return tuple([strict.finite(one, what) for one in _list(value, what)])


def _shapes(value: Any, what: str) -> tuple[tuple[int, ...], ...]:
    return tuple([_shape(shape, what) for shape in _list(value, what)])


def _shape(value: Any, what: str) -> tuple[int, ...]:
    return tuple([strict.integer(size, 0, (1 << 63) - 1, what) for size in strict.sequence(value, 8, what)])


def _dict(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise strict.Malformed(f"{what} must be a map")
    return value


_FIELDS: dict[str, Callable[[Any, str], Any]] = {
    "int": _integer,
    "float": strict.finite,
    "float | None": _maybe_finite,
    "bool": strict.boolean,
    "str": _text,
    "tuple[str, ...]": _names,
    "tuple[float, ...]": _floats,
    "tuple[tuple[int, ...], ...]": _shapes,
    "dict[str, Any]": _dict,
}
_COMMANDS = {cls.__name__: cls for cls in Command.__args__}
_REPORTS = {cls.__name__: cls for cls in Report.__args__}
