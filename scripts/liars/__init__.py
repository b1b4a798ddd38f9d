"""Members that lie, as real processes: one file each, and a line of registry.py.

A file has a docstring (what the member does, and the promise that must hold all the same), `lie()`, which
changes the product in the liar's own process, and `broken(seen)`, which says what of its promise does not
hold. It may have `RUN`, lines of run.toml that the attack needs. scripts/attack.py runs them.
"""
