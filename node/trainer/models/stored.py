"""The safetensors files of a Hugging Face directory: found, checked by their headers, read one tensor at a
time.

The format (huggingface/safetensors, README "Format"): a length as u64, so many bytes of JSON that name dtype,
shape and byte range of every tensor, then the bytes. Several files have an index,
`model.safetensors.index.json`, that says which file holds which tensor. Headers are read strictly, and
compared with the files' lengths, before anything is allocated: a directory may be half downloaded, or come
from a peer.

Pickled weights (.bin, .pt, .pth) are never opened: to read a pickle is to run it.
"""

from __future__ import annotations

import functools
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tapestry.node.trainer.models.folder import INDEX, SINGLE, read_index, weight_files
from tapestry.node.trainer.models.refusal import ModelError

HEADER_BYTES_MAX = 100_000_000  # what the safetensors package itself accepts
DIMENSIONS_MAX = 64  # torch's own limit
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
OTHERS = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8}  # only for buffers


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor by its header."""

    path: Path
    dtype: str  # as safetensors writes it: "BF16"
    shape: tuple[int, ...]

    @property
    def n(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.n * _item_bytes(self.dtype)


class StoredWeights:
    """The tensors of one directory by name, in no particular order. Make one with `find`."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self.tensors = dict(tensors)

    @classmethod
    def find(cls, folder: Path) -> StoredWeights:
        """Read all headers. Raises ModelError for what is missing, torn, pickled or quantized."""
        files = [folder / name for name in weight_files(folder) if name != INDEX]
        tensors: dict[str, StoredTensor] = {}
        for path in files:
            for name, tensor in weights_of(path).items():
                if name in tensors:
                    raise ModelError(f"{path} holds {name}, as {tensors[name].path.name} does")
                tensors[name] = tensor
        if not tensors:
            raise ModelError(f"{folder} holds no weights at all")
        _require_indexed(folder, tensors)
        return cls(tensors)

    @property
    def size_bytes(self) -> int:
        return sum(tensor.size_bytes for tensor in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """The one in which most elements are stored."""
        counts: dict[str, int] = {}
        for tensor in self.tensors.values():
            if tensor.dtype in FLOATS:
                counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.n
        return FLOATS[max(sorted(counts), key=lambda name: counts[name])] if counts else torch.float32

    def read(self, name: str) -> Tensor:  # in its own dtype
        """One tensor; nothing of it is kept. Raises ModelError if the file changed or cannot be read."""
        stored = self.tensors[name]
        try:
            with safe_open(str(stored.path), "pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot read {name} from {stored.path}: {error}") from error
        return tensor


def _require_indexed(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    if (folder / SINGLE).is_file():
        return
    for name, file in read_index(folder).items():
        if name not in tensors or tensors[name].path.name != file:
            raise ModelError(f"{folder / file} does not hold {name}, as {INDEX} says", "download it again")


# --- one file's header ------------------------------------------------------------------------------


def weights_of(path: Path) -> dict[str, StoredTensor]:
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else HEADER_BYTES_MAX + 1
            if length > HEADER_BYTES_MAX:
                raise ModelError(
                    f"{path} is no safetensors file", _GIT_LFS if start[:7] == b"version" else ""
                )
            text = file.read(length)
            file_bytes = file.seek(0, 2)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    try:
        table = json.loads(text)
        tensors = {
            name: _stored(path, name, entry) for name, entry in table.items() if name != "__metadata__"
        }
        data_bytes = max((end for _, end in tensors.values()), default=0)
    except ModelError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} is no safetensors file: its header does not read") from error
    if file_bytes != 8 + length + data_bytes:
        raise ModelError(
            f"{path} has {file_bytes} bytes, its header says {8 + length + data_bytes}",
            "download it again: the copy is not complete",
        )
    return {name: tensor for name, (tensor, _) in tensors.items()}


_GIT_LFS = "it is a pointer of Git LFS: fetch the file itself with `git lfs pull`"


def _stored(path: Path, name: str, entry: Mapping[str, Any]) -> tuple[StoredTensor, int]:
    """The tensor, and where its bytes end."""
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in FLOATS and dtype not in OTHERS:
        raise ModelError(
            f"{path} stores {name} as {str(dtype)[:20]}: quantized weights cannot be trained",
            "use the revision in bfloat16, float16 or float32",
        )
    if not isinstance(shape, list) or len(shape) > DIMENSIONS_MAX or not all(map(_is_size, shape)):
        raise ValueError("shape")  # before it is multiplied: numbers of thousands of digits take hours
    tensor = StoredTensor(path, dtype, tuple(shape))
    if not _is_size(start) or not _is_size(end) or end - start != tensor.size_bytes:
        raise ValueError("data_offsets")
    return tensor, end


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _item_bytes(dtype: str) -> int:
    return FLOATS[dtype].itemsize if dtype in FLOATS else OTHERS[dtype]


# --- writing ----------------------------------------------------------------------------------------

_NAMES = {dtype: name for name, dtype in FLOATS.items()}


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor to be written: what it is called, how large it is, and how to get it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype  # in which it is written
    load: Callable[[], Tensor]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(path: Path, sources: Sequence[Source], wrote: Callable[[int], None] | None = None) -> None:
    """One safetensors file; one tensor is in memory at a time. `wrote` is told of bytes. Raises OSError.

    The safetensors package would need all of them at once.
    """
    header = _header((s.name, _NAMES[s.dtype], s.shape, s.size_bytes) for s in sources)
    with path.open("xb") as file:
        file.write(header)
        for source in sources:
            flat = source.load().detach().reshape(-1)
            for start in range(0, flat.numel(), _PIECE):
                piece = flat[start : start + _PIECE].to("cpu", source.dtype).contiguous().view(torch.uint8)
                file.write(memoryview(piece.numpy()))  # type: ignore[arg-type]
                if wrote is not None:
                    wrote(piece.numel())
        file.flush()
        os.fsync(file.fileno())


_PIECE = 1 << 22  # elements that are converted at once


def _header(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """Of name, dtype as safetensors writes it, shape and bytes of each, in the order of their bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape, size_bytes in tensors:
        start, end = end, end + size_bytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8, as the format asks
    return struct.pack("<Q", len(text)) + text


def is_as_written(path: Path) -> bool:
    """Whether a file's header is the one that `write_weights` writes of its tensors. Raises ModelError,
    OSError."""
    tensors = weights_of(path).items()
    header = _header((name, one.dtype, one.shape, one.size_bytes) for name, one in tensors)
    with path.open("rb") as file:
        return file.read(len(header)) == header


def index_of(tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """The index of several files, which names the file of each tensor."""
    total = sum(tensor.size_bytes for tensor in tensors.values())
    places = {name: tensor.path.name for name, tensor in tensors.items()}
    return {"metadata": {"total_size": total}, "weight_map": places}


def join_files(folder: Path, out: Path, wrote: Callable[[int], None] | None = None) -> None:
    """The weights of a folder, however they are cut, as one file: names in order, so equal bytes everywhere.

    For LoRA, whose members all hold the frozen base. Raises ModelError, OSError.
    """
    stored = StoredWeights.find(folder)
    sources = [
        Source(name, tensor.shape, FLOATS[tensor.dtype], functools.partial(stored.read, name))
        for name, tensor in sorted(stored.tensors.items())
        if tensor.dtype in FLOATS
    ]
    write_weights(out, sources, wrote)
