"""Members that lie, as real processes: one file each, and a line of registry.py.

A file has a docstring (what the member does, and the promise that must hold all the same), `lie()`, which
changes the product in the liar's own process (tests/e2e/harness.py, Node.lie), and `broken(seen)`, which says
what of its promise does not hold. It may have `RUN`, lines of run.toml that the attack needs, or `strike`,
which makes the hostile node where the member itself is honest. scripts/attack.py runs them.
"""
