"""Why something was refused: one exception family, each with a short machine-readable reason.

The reason is a single word that can label a counter (`tapestry_refused_total{reason}`); the detail is for
the person who reads the log. A refusal is a verdict on an input, never a bug of ours.
"""


class Refused(ValueError):
    """An input that cannot be used. `reason` is one short word, `detail` a sentence."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class RefusedCodec(Refused):
    """No codec has this name."""


class RefusedVector(Refused):
    """A vector that cannot be encoded, or a mean that f32 cannot hold."""


class RefusedPayload(Refused):
    """Bytes that are no payload, or no frame, of the codec and length that were expected."""


class RefusedWeights(Refused):
    """Weights that define no mean."""


class RefusedLayout(Refused):
    """Tensors, names or shapes that do not fit the layout, or bounds that make no shards."""
