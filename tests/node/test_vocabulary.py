"""Messages on the wire: what we write is read back; anything else is refused with a reason, never a crash."""

import dataclasses

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapestry.node.net.links import HEADER_BYTES_MAX
from tapestry.node.net.vocabulary import Reader, encode_message
from tapestry.node.net.wire import RemoteProtocolError
from tapestry.node.protocol import members, messages
from tapestry.node.protocol.agreement import COUNT_MAX, SUM_MAX, Agreement, ShardSums
from tapestry.node.protocol.canon import EPOCH_MAX, MEMBERS_MAX, WEIGHT_MAX, canonical
from tapestry.node.protocol.record import (
    BALLOT_MAX,
    Behind,
    Body,
    Member,
    Record,
    head_of,
    record_bytes,
    wire_bytes,
)

HEAD = "ab" * 32
TOKEN = "cd" * 32
LIFE = "cd" * 16


class FakeCrypto:
    def digest(self, data: bytes) -> str:
        return f"{len(data):064x}"

    def sign(self, message: bytes) -> str:
        return "signature"

    def verify(self, peer: str, signature: str, message: bytes) -> bool:
        return True


CRYPTO = FakeCrypto()
PEER = f"12D3KooW{7:044}"
READER = Reader(CRYPTO)
SUMS = ShardSums((4.0, 0.5), 1.0, (2.0, 0.25), (-1.0, 1e-9), 0.5, 7, 2)
MEMBERS = (Member("a", 5, TOKEN, "", 7), Member("b", 0, "", LIFE, seat="ef" * 64))
CHANGE = members.Change("admit", "c", "Carla", 70, "cd" * 16, (("a", "00"),))
BEHIND = Behind(1, (("a", "00"),))
BODY = Body(HEAD, 7, HEAD, HEAD, MEMBERS, HEAD, changes=(CHANGE,), behind=BEHIND)
RECORD = Record(BODY, head_of(BODY, CRYPTO), 3, (("a", "00"), ("b", "11")), None, (("a", "22"), ("b", "33")))
RECEIPT = messages.Receipt("a", 5, HEAD, 2, LIFE, HEAD, "ef" * 64)

CONTROL = [
    messages.Status(6, HEAD, 6, "training", messages.Stage.READY, 2, 9, ("a", "b")),
    messages.Call(6, HEAD, 2, True),
    messages.Ready(6, HEAD, 2, False, HEAD, TOKEN, 12, 1.5, 1, BODY),
    messages.Ready(6, HEAD, 2, False, HEAD, "", 0, 0.0, -1, None, LIFE, seat="ef" * 64),
    messages.Ready(6, HEAD, 2, False, HEAD, "", 0, 0.0, -1, None, LIFE, receipts=(RECEIPT,) * 4),
    messages.Closing(6, HEAD, 2),
    messages.Roster(6, HEAD, 2, False, HEAD, MEMBERS, (0, 1, 1), (CHANGE,), BEHIND, "ef" * 64),
    messages.Propose(6, HEAD, 2, BODY, ("a",)),
    messages.Accept(6, HEAD, 2, HEAD, HEAD, Agreement(-5, 6, 7), "aa", "bb"),
    messages.Refuse(6, HEAD, 2, HEAD, 0.25),
    messages.Leave(6, HEAD, "ef" * 64),
    messages.Seat(6, HEAD, "cd" * 16, "ef" * 64),
    messages.Commit(RECORD),
    messages.Need(6, HEAD, 2, "", (0, 3)),
    messages.GetRecords(((6, HEAD), (0, HEAD))),
    messages.Records(6, (RECORD,)),
    messages.Changes((CHANGE,)),
]
DATA = [
    messages.Shard(6, TOKEN, 2, "blob", (HEAD, HEAD)),
    messages.Result(6, HEAD, 1, 2, "digest", "blob", SUMS, "aa"),
]


@pytest.mark.parametrize("message", CONTROL, ids=lambda m: type(m).__name__)
def test_control_messages_survive_the_wire(message):
    assert READER.control(encode_message(message)) == message


@pytest.mark.parametrize("message", DATA, ids=lambda m: type(m).__name__)
def test_data_messages_survive_the_wire_without_their_payload(message):
    assert READER.data(encode_message(message), "blob", "digest") == message


def test_every_message_of_the_protocol_is_covered():
    here = [c for c in vars(messages).values() if dataclasses.is_dataclass(c)]
    kinds = {c for c in here if c.__module__ == messages.__name__}
    assert kinds - {messages.Receipt} == {type(m) for m in CONTROL + DATA}, "a receipt is a part of READY"


@pytest.mark.parametrize("message", CONTROL, ids=lambda m: type(m).__name__)
def test_every_field_of_a_wrong_type_is_refused(message):
    name, *values = msgpack.unpackb(encode_message(message))
    for index in range(len(values)):
        for wrong in ({"x": 1}, b"bytes", -5, float("nan"), "?" * 500, True):
            if values[index] is True or values[index] is False:
                wrong = "not a boolean"
            header = msgpack.packb([name, *values[:index], wrong, *values[index + 1 :]])
            with pytest.raises(RemoteProtocolError):
                READER.control(header)


@pytest.mark.parametrize("message", CONTROL, ids=lambda m: type(m).__name__)
def test_every_truncation_is_refused(message):
    header = encode_message(message)
    for length in range(len(header)):
        with pytest.raises(RemoteProtocolError):
            READER.control(header[:length])


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_read_but_never_crash(data):
    for read in (READER.control, lambda header: READER.data(header, "blob", "digest")):
        try:
            read(data)
        except RemoteProtocolError as error:
            assert error.reason


@given(st.recursive(st.none() | st.integers() | st.text() | st.floats(), st.lists, max_leaves=8))
def test_random_values_in_a_known_message_never_crash(value):
    for message in CONTROL:
        name, *values = msgpack.unpackb(encode_message(message))
        try:
            header = msgpack.packb([name, *([value] * len(values))])
        except (OverflowError, ValueError):
            return
        try:
            READER.control(header)
        except RemoteProtocolError as error:
            assert error.reason


@pytest.mark.parametrize("seat", ["ef" * 64, ""])
@pytest.mark.parametrize(("count", "signers"), [(1, 1), (4, 3), (64, 64), (64, 128), (1024, 1024)])
def test_no_record_is_longer_on_the_wire_than_is_reckoned(count, signers, seat):
    peers = [f"12D3KooW{i:044}" for i in range(max(count, signers))]
    most = WEIGHT_MAX
    named = tuple(Member(p, most, TOKEN, LIFE, most, seat) for p in peers[:count])
    body = Body(HEAD, EPOCH_MAX, HEAD, HEAD, named, HEAD)
    signatures = tuple((p, "ef" * 64) for p in peers[:signers])
    record = Record(body, HEAD, BALLOT_MAX, signatures, None, signatures)
    header = encode_message(messages.Records(EPOCH_MAX, (record,)))
    reckoned = wire_bytes(count, 2 * signers, 0) if seat else record_bytes(record)
    assert 0.8 * reckoned < len(header) <= reckoned


@pytest.mark.parametrize("signers", [0, 1, 64])
def test_no_change_is_longer_on_the_wire_than_is_reckoned(signers):
    peers = [f"12D3KooW{i:044}" for i in range(signers)]
    pairs = tuple((p, "ef" * 64) for p in peers)
    long = members.Change("admit", PEER, "\u4e2d" * 256, EPOCH_MAX, LIFE, pairs)
    for packed in (
        msgpack.packb(members.change_to_list(long)),
        canonical(members.change_to_list(long)),
    ):
        assert len(packed) <= members.change_bytes(long)


def test_the_sums_of_the_most_contributors_fit_into_a_bulk_header():
    many = (SUM_MAX,) * MEMBERS_MAX
    sums = ShardSums(many, SUM_MAX, many, many, SUM_MAX, COUNT_MAX, COUNT_MAX)
    result = messages.Result(EPOCH_MAX, HEAD, BALLOT_MAX, 2**20 - 1, "digest", "blob", sums, "ef" * 64)
    assert len(encode_message(result)) <= HEADER_BYTES_MAX


def test_a_result_with_sums_that_are_none_is_refused():
    name, *fields, sums, signature = msgpack.unpackb(encode_message(DATA[1]))
    for wrong in ([], [[-1.0], *sums[1:]], [[float("nan")], *sums[1:]], [*sums[:6], -1], None):
        with pytest.raises(RemoteProtocolError):
            READER.data(msgpack.packb([name, *fields, wrong, signature]), "blob", "digest")


def test_unsorted_or_repeated_members_of_a_record_are_refused():
    for named in ((MEMBERS[1], MEMBERS[0]), (MEMBERS[0], MEMBERS[0])):
        record = dataclasses.replace(RECORD, body=dataclasses.replace(BODY, members=named))
        with pytest.raises(RemoteProtocolError, match="sorted"):
            READER.control(encode_message(messages.Commit(record)))


@pytest.mark.parametrize("phase", ["\x1b[2J", "a\nb", "", "\u202egniniart"])
def test_a_phase_that_is_no_word_is_refused(phase):
    status = messages.Status(3, "ab" * 32, 3, phase, messages.Stage.TRAINING, 0, 0, ())
    with pytest.raises(RemoteProtocolError):
        READER.control(encode_message(status))
