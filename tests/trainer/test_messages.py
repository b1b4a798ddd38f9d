"""The frames between node and worker: round trip, and strict."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapestry.node.trainer import messages
from tapestry.node.trainer.messages import (
    HEADER,
    MessageError,
    body_length,
    pack,
    unpack_command,
    unpack_report,
)

HELLO = messages.Hello(("a", "b"), ((2, 3), ()), 100, 5, "cpu", -1, "", ("fr",), ("data fr: 1 files",))
REPORTS = [
    messages.Alive(),
    HELLO,
    messages.Tokenizing(5, 10, 2.5),
    messages.Initialised(),
    messages.Progress(3, 2, 1, 8, 5.5, 128, 1e4),
    messages.Contribution(3, 2, 128, 2.5, 5.5, 128, 8, 0.5, 1.25),
    messages.Validation(3, 5.5, ("fr", "de"), (5.0, 6.0)),
    messages.Saved(3, ""),
    messages.Failed("data", "no such file"),
]
VALIDATION = {"type": "Validation", "epoch": 1, "loss": 2.0, "sets": ["fr"], "losses": [2.0]}
COMMANDS = [
    messages.Configure({"a": [1, {"b": 2.5}], "path": "caf\udce9.txt"}),
    messages.Attach(6),
    messages.Initialise(),
    messages.Begin(3, 2, follows=True, counted=-1, slot=1),
    messages.Close(3),
    messages.GoOn(3),
    messages.Abort(),
    messages.Evaluate(3),
    messages.Save(3),
    messages.Stop(),
]


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: type(report).__name__)
def test_a_report_survives_the_wire(report: messages.Report) -> None:
    frame = pack(report)
    assert body_length(frame[: HEADER.size]) == len(frame) - HEADER.size
    assert unpack_report(frame[HEADER.size :]) == report


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: type(command).__name__)
def test_a_command_survives_the_wire(command: messages.Command) -> None:
    assert unpack_command(pack(command)[HEADER.size :]) == command


def test_a_command_with_a_number_for_yes_is_refused() -> None:
    fields = {"type": "Begin", "epoch": 1, "generation": 1, "follows": 1, "counted": 0, "slot": 0}
    fields |= {"lr": 1.0, "batches": 0, "batch_size": 0, "afresh": False}
    with pytest.raises(MessageError, match=r"Begin\.follows"):
        unpack_command(msgpack.packb(fields))


@given(st.binary(max_size=200))
def test_noise_is_refused_as_a_message_error(body: bytes) -> None:
    with pytest.raises(MessageError):
        unpack_report(body)


@given(st.sampled_from(REPORTS), st.data())
def test_every_truncation_is_refused(report: messages.Report, data: st.DataObject) -> None:
    body = pack(report)[HEADER.size :]
    with pytest.raises(MessageError):
        unpack_report(body[: data.draw(st.integers(0, len(body) - 1))])


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "Validation", "epoch": 1},
        VALIDATION | {"more": 1},
        VALIDATION | {"epoch": "1"},
        VALIDATION | {"epoch": True},
        VALIDATION | {"epoch": -2},
        VALIDATION | {"loss": float("nan")},
        VALIDATION | {"loss": 2},
        VALIDATION | {"losses": [2]},
        VALIDATION | {"sets": "fr"},
        {"type": "Begin", "epoch": 1, "generation": 1, "follows": True, "counted": 0},
        {"type": "Saved", "epoch": 1, "error": "x" * 5000},
        {"type": ["Saved"]},
        {"epoch": 1},
        [1, 2],
    ],
)
def test_a_report_that_is_not_exactly_right_is_refused(fields: object) -> None:
    with pytest.raises(MessageError):
        unpack_report(msgpack.packb(fields))


@pytest.mark.parametrize("length", [0, messages.FRAME_BYTES_MAX + 1, 2**32 - 1])
def test_a_length_that_no_frame_has_is_refused_before_reading(length: int) -> None:
    with pytest.raises(MessageError):
        body_length(HEADER.pack(length))
