"""What a run's spec means in parameters, memory, disk and messages: by arithmetic, before anything is built.

A spec comes from a peer. One that means 10^12 parameters, or claims 1,000 and means billions, must be refused
while it is still numbers. What a base's own config.json means is counted when that file is there
(trainer/models/pretrained.py); here its claim is judged.

Pure: what the machine has is given. Must not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from tapestry.node.protocol.pace import EXCHANGE_SIZED_S
from tapestry.node.spec.run import RunSpec
from tapestry.node.spec.training import LlamaSpec

FLOAT_BYTES = 4
STATE_BYTES = 8  # of a parameter on disk: parameters and outer state
BYTE_VOCABULARY = 259  # trainer/tokenizers/byte.py
MBIT_S_MIN = 10.0  # the slowest line that the default of exchange_max_s allows for
PAYLOAD_BYTES = 1.02  # of a parameter: int8-block, a scale for 256


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is for a run."""

    memory_bytes: int
    disk_bytes: int
    params_max: int | None  # --max-params


def parameters_of(spec: RunSpec) -> int:
    """Of the whole model; of a base, what the spec claims."""
    model = spec.model
    return llama_parameters(model) if isinstance(model, LlamaSpec) else model.parameters


def llama_parameters(spec: LlamaSpec) -> int:
    head_size = spec.hidden_size // spec.heads
    attention = 2 * spec.hidden_size * head_size * (spec.heads + spec.kv_heads)
    mlp = 3 * spec.hidden_size * spec.intermediate_size
    norms = 2 * spec.hidden_size
    embeddings = BYTE_VOCABULARY * spec.hidden_size * (1 if spec.tie_embeddings else 2)
    return spec.layers * (attention + mlp + norms) + embeddings + spec.hidden_size


def size_fault(spec: RunSpec, trained: int, machine: Machine) -> str:
    """Why this run cannot be joined by this machine, in one line; "" if it can.

    `trained` is the length of the flat vector as the genesis has it.
    """
    n = parameters_of(spec)
    if isinstance(spec.model, LlamaSpec) and trained != n:
        return f"its genesis claims {trained:,} parameters, its run spec means {n:,}"
    if trained > n and not getattr(spec.model, "lora_rank", 0):
        return f"its genesis claims {trained:,} parameters, its run spec {n:,}"
    if machine.params_max is not None and max(n, trained) > machine.params_max:
        return f"it has {max(n, trained):,} parameters, --max-params is {machine.params_max:,}"
    memory, disk = FLOAT_BYTES * max(n, trained), STATE_BYTES * trained
    if memory > machine.memory_bytes:
        has = _gib(machine.memory_bytes)
        return f"its {n:,} parameters need {_gib(memory)} of memory at least, {has} are free"
    if disk > machine.disk_bytes:
        return f"its state needs {_gib(disk)} of disk, {_gib(machine.disk_bytes)} are free"
    return ""


def size_lines(spec: RunSpec, trained: int) -> list[str]:
    """What joining asks of a machine, for a person who is to agree to it."""
    n, limits = parameters_of(spec), spec.limits
    longest = spec.round.exchange_max_s
    exchange_s = max(EXCHANGE_SIZED_S, exchange_sized_s(trained)) if longest == "auto" else longest
    return [
        f"{n:,} parameters, {trained:,} of them trained",
        f"memory {_gib(FLOAT_BYTES * n)} at least, disk {_gib(STATE_BYTES * trained)} and up to "
        f"{_gib(limits.updates_kept_bytes)} of updates",
        f"each round sends and receives about {_gib(int(2 * PAYLOAD_BYTES * trained))}, for at most "
        f"{exchange_s:g} s; up to {limits.max_peers} peers",
    ]


def exchange_sized_s(trained: int) -> float:
    """What a round's exchange of so many parameters takes on the slowest line that is allowed for."""
    return 2 * PAYLOAD_BYTES * trained * 8 / (MBIT_S_MIN * 1e6)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**27 else f"{count / 2**20:.1f} MiB"
