"""A step that ran out of memory: how it is known, and what would fit.

Half as many windows at a time first, down to one; then activation checkpointing, which keeps a layer's input
alone and computes the rest again. Both leave the gradients as they are, to float error, so each member may
choose for itself.

Pure, but for torch's class of the error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# How torch's allocator of the CPU, and CUDA's libraries, say it: plain RuntimeErrors.
_WORDS = ("can't allocate memory", "out of memory", "ALLOC_FAILED")


class OutOfMemory(MemoryError):
    """A step does not fit; one line that says what would."""


@dataclass(frozen=True, slots=True)
class Footing:
    """How much of a batch is worked on at a time."""

    micro_batch: int  # windows in one forward pass
    checkpointing: bool

    def smaller(self, can_checkpoint: bool) -> Footing | None:
        """The next that needs less memory, if there is one."""
        if self.micro_batch > 1:
            return Footing(self.micro_batch // 2, self.checkpointing)
        if can_checkpoint and not self.checkpointing:
            return Footing(1, checkpointing=True)
        return None

    def __str__(self) -> str:
        return f"micro_batch = {self.micro_batch}, checkpointing = {str(self.checkpointing).lower()}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether that is why torch raised it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def advice(footing: Footing, smaller: Footing | None) -> str:
    """One line for whoever runs this node."""
    tried = f"a training step does not fit in memory with {footing}"
    if smaller is None:
        return f"{tried}, and nothing smaller is left to try: use a device with more memory"
    return (
        f"{tried}: set {smaller} in node.toml under [training], "
        'or on_out_of_memory = "adapt" to have that done by itself'
    )
