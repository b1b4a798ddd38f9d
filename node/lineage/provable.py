"""Whether an export proves its tensors by itself: `export` says so, and `verify` asks for it."""

from __future__ import annotations

FLOAT32 = "float32"  # as tapestry.json names it


def unprovable(form: str, dtype: str, epoch: int, signed: bool) -> str:
    """Why the members' signatures do not reach the tensors of such an export, and what to do; "" if they do.

    `form` and `dtype` as tapestry.json has them; `signed`: somebody signed the state of that epoch.
    """
    if form == "merged":
        return (
            "adapters were added to the base, which rounds as the machine does; an export of the same epoch "
            "with --adapters can be proven"
        )
    if not signed:
        return (
            f"epoch {epoch} was the head, whose state nobody had signed yet; compare with a home (--against "
            "HOME), or export the epoch below"
        )
    if dtype != FLOAT32:
        return (
            f"they were rounded to {dtype}, and signed is the state in float32; compare with a home, or with "
            "an export of the same epoch in f32 (--against HOME|OUT)"
        )
    return ""
