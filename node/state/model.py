"""The state of a run in memory: flat f32 parameters, the outer optimizer's buffers, and their digest.

State e becomes state e + 1 by `apply`, in place: decode one piece of the update, take the outer step on it
while it is in the cache, go on to the next. So nothing is needed beyond the state but a piece. In place
means that a step that fails half-way leaves neither state: it is then *torn*, says so to whoever asks for
it, and has to be loaded again. The disk holds checkpoint and updates, which no step touches, so nothing is
lost by that.

Where the numbers lie is not its affair: the node gives it files that are mapped (disk/scratch.py), and a step
touches each page once, in order.

The bytes of a state are those of the parameters and then of the buffers, in the order of their names, f32
little-endian. Checkpoints, transfers and the digest all speak of these bytes. The digest is made of one for
each vector: whoever has the parameters alone, and the digests of the buffers, can make it too
(docs/decisions/013-digest-of-vectors.md). It does not cover the epoch: it identifies the numbers, and the
record that carries it says whose they are.

Must not import: anything that does I/O; asyncio; hivemind.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from blake3 import blake3
from torch import Tensor

from tapestry.compression.blocks import thread_scratch
from tapestry.compression.codecs import Codec, get_codec
from tapestry.compression.shards import Shard, shard_bounds
from tapestry.node.protocol.agreement import lengthening
from tapestry.node.protocol.canon import canonical
from tapestry.node.protocol.record import Body, Record
from tapestry.node.protocol.settings import Settings, number_of
from tapestry.node.spec.run import NesterovSpec, OuterSpec, RunSpec
from tapestry.node.state.outer import Outer, f32, make_outer

HASH_BYTES = 4 << 20  # per call, each without the GIL; Guess
FLOAT_BYTES = 4


class TornState(RuntimeError):
    """A step, a load or a transfer ended half-way: these numbers are of no state. Load it again."""


class DigestMismatch(Exception):
    """The numbers are not those that were announced."""


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How an encoded update becomes the next state: everything that the run spec says about it."""

    shards: tuple[Shard, ...]
    codec: Codec
    outer: Outer
    lengthens: bool = False  # the mean is made as long as contributions are on average, before the outer step
    outer_spec: OuterSpec | None = None  # of `outer`

    @classmethod
    def of(cls, spec: RunSpec, n: int) -> Arithmetic:
        """For a flat vector of n parameters."""
        shards = shard_bounds(n, spec.compression.shard_elements)
        lengthens = isinstance(spec.outer, NesterovSpec) and spec.outer.norm == "members"
        return cls(shards, get_codec(spec.compression.codec), make_outer(spec.outer), lengthens, spec.outer)

    def outer_at(self, settings: Settings) -> Outer:
        """The outer optimizer under what records have changed."""
        if "outer.lr" not in settings or self.outer_spec is None:
            return self.outer
        return make_outer(replace(self.outer_spec, lr=number_of(settings, "outer.lr", 0.0)))

    def divisor(self, body: Body) -> float:
        """What the mean of this record is divided by, an f32: from the record alone, so the same for all."""
        if not self.lengthens:
            return 1.0
        return f32(lengthening(body.agreement, sum(member.weight > 0 for member in body.members)))

    @property
    def payload_sizes(self) -> tuple[int, ...]:
        """Bytes of each shard's payload."""
        return tuple(self.codec.payload_size(shard.n) for shard in self.shards)


class ModelState:
    """State `epoch` of the run, the one that `head` names. One user at a time; any thread."""

    def __init__(
        self,
        params: Tensor,  # f32 (n,), contiguous, on the CPU; shared with the trainer
        schema: str,  # Layout.schema_hash
        arithmetic: Arithmetic,
        epoch: int,
        head: str,
        buffers: Mapping[str, Tensor] | None = None,  # as params, for each name of the outer; None: zeros
    ) -> None:
        assert sys.byteorder == "little", "a state's bytes are its memory"
        assert params.dtype == torch.float32 and params.dim() == 1 and params.is_contiguous()
        self.params = params
        self.schema = schema
        self.arithmetic = arithmetic
        names = arithmetic.outer.buffer_names
        made = {name: torch.zeros_like(params) for name in names} if buffers is None else buffers
        self.buffers = {name: made[name] for name in names}  # in the order of their bytes
        assert all(buffer.shape == params.shape for buffer in self.buffers.values())
        self.epoch = epoch
        self.head = head
        self.torn = False

    @property
    def n(self) -> int:
        """Parameters."""
        return self.params.numel()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the vectors, in the order of their bytes."""
        return ("params", *self.arithmetic.outer.buffer_names)

    @property
    def size_bytes(self) -> int:
        """Of parameters and buffers together."""
        return FLOAT_BYTES * self.n * len(self.names)

    def digest(self) -> str:
        """Of what the numbers are (schema, length, names) and of their bytes. Raises TornState."""
        self._require_whole()
        return self._hash()

    def vector_digests(self) -> dict[str, str]:
        """blake3 of each vector's bytes, by its name. Raises TornState."""
        self._require_whole()
        return dict(zip(self.names, map(_digest_of, self.vectors()), strict=True))

    def apply(
        self,
        payloads: Sequence[Tensor],  # uint8 (codec.payload_size(shard.n),) for each shard
        record: Record,  # of the state that this makes
        settings: Settings = MappingProxyType({}),  # of the roll before it
    ) -> None:
        """Go from one state to the next. Raises TornState, or what the codec refuses.

        After any exception the state is torn.
        """
        epoch, outer = record.body.epoch, self.arithmetic.outer_at(settings)
        self._require_whole()
        assert epoch == self.epoch + 1
        self.torn = True
        for start, stop, mean in self._means(payloads, record.body):
            outer.step(self.params, self.buffers, mean, start, stop, epoch)
        self.epoch, self.head, self.torn = epoch, record.head, False

    def aside(
        self,
        payloads: Sequence[Tensor],  # as of `apply`
        body: Body,
        settings: Settings,
        out: Tensor,  # f32 (n,)
    ) -> None:
        """The parameters that `apply` would make, to the bit, into `out`: the state stays as it is.

        Raises TornState, or what the codec refuses.
        """
        self._require_whole()
        outer = self.arithmetic.outer_at(settings)
        for start, stop, mean in self._means(payloads, body):
            piece = out[start:stop].copy_(self.params[start:stop])
            buffers = {name: buffer[start:stop].clone() for name, buffer in self.buffers.items()}
            outer.step(piece, buffers, mean, 0, stop - start, body.epoch)

    def _means(
        self, payloads: Sequence[Tensor], body: Body
    ) -> Iterator[tuple[int, int, Tensor]]:  # start, stop, f32 (stop - start,), good until the next
        """The mean that the outer step takes, piece by piece."""
        shards, codec = self.arithmetic.shards, self.arithmetic.codec
        assert len(payloads) == len(shards)
        divisor = self.arithmetic.divisor(body)
        for shard, payload in zip(shards, payloads, strict=True):
            opened = codec.open(payload, shard.n)
            for index, (start, stop) in enumerate(codec.pieces(shard.n)):
                mean = thread_scratch("mean", stop - start)
                opened.decode_piece(index, mean)
                if divisor != 1.0:
                    mean.div_(divisor)
                yield shard.start + start, shard.start + stop, mean

    def vectors(self) -> list[memoryview]:
        """The bytes of parameters and buffers, without a copy. Whoever writes says `overwrite` first."""
        tensors = (self.params, *self.buffers.values())
        return [memoryview(tensor.numpy()).cast("B") for tensor in tensors]  # type: ignore[arg-type]

    def overwrite(self) -> list[memoryview]:
        """The bytes, to be written over; the state is torn until `adopt`."""
        self.torn = True
        return self.vectors()

    def adopt(self, epoch: int, head: str, digest: str) -> None:
        """The bytes are now those of state `epoch`. If not: raises DigestMismatch, and stays torn."""
        found = self._hash()
        if found != digest:
            raise DigestMismatch(f"state {epoch} has the digest {found[:12]}, not {digest[:12]}")
        self.epoch, self.head, self.torn = epoch, head, False

    def rename(self, epoch: int, head: str) -> None:
        """The same numbers are state `epoch`: its record rolled the run back to them. Raises TornState."""
        self._require_whole()
        self.epoch, self.head = epoch, head

    def _hash(self) -> str:
        digests = dict(zip(self.names, map(_digest_of, self.vectors()), strict=True))
        return state_digest_of(self.schema, self.n, digests)

    def _require_whole(self) -> None:
        if self.torn:
            raise TornState("the state was left half-written; it has to be loaded again")


def state_digest_of(schema: str, n: int, vectors: Mapping[str, str]) -> str:
    """A state's digest from those of its vectors, by name in the order of their bytes."""
    pairs = [[name, digest] for name, digest in vectors.items()]
    return blake3(canonical(["tapestry state 2", schema, n, pairs])).hexdigest()


def _digest_of(vector: memoryview) -> str:
    hasher = blake3()
    for start in range(0, len(vector), HASH_BYTES):
        hasher.update(vector[start : start + HASH_BYTES])
    return hasher.hexdigest()


def spans(vectors: Sequence[memoryview], start: int, stop: int) -> Iterator[memoryview]:
    """The parts of the vectors that hold the bytes from start to stop of their concatenation."""
    for vector in vectors:
        size = len(vector)
        if start < size and stop > 0:
            yield vector[max(start, 0) : min(stop, size)]
        start, stop = start - size, stop - size
