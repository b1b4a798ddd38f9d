"""A node that lies: the command `tapestry` with what scripts/liars/NAME.py changes in its process.

    .venv/bin/python -P scripts/_liar.py NAME start --home DIR ...

It lies while the file exists that the environment names in LIE_WHILE; without that variable, always.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from liars.registry import load


def main() -> None:
    load(sys.argv.pop(1)).lie()
    runpy.run_module("tapestry.node.cli", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
