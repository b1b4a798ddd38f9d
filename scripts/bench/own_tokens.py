"""How many ids own tokens save in a language that a base hardly knows: those of `derive --own-tokens`.

    .venv/bin/python -P scripts/bench/own_tokens.py FOLDER... --base DIR [--tokens 1000]

Of the .txt files of each FOLDER, in an order that the seed gives, the first --learn are what tokens are
learnt from, and the next --count are what is counted: the base's tokenizer against the same one with the
tokens. docs/learning.md says where to get such texts.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _bench import table

from tapestry.node.sovereign.tokens import learned, tokenizer_of, with_tokens


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--base", required=True, type=Path)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--learn", type=int, default=150, help="files")
    parser.add_argument("--count", type=int, default=50, help="files")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = [_row(folder, options) for folder in options.folders]
    print(table(["text", "learnt from, kB", "tokens", "ids", "with them", "fewer %"], rows))
    return 0


def _row(folder: Path, options: argparse.Namespace) -> list[object]:
    paths = sorted(folder.rglob("*.txt"))
    random.Random(options.seed).shuffle(paths)
    texts = [path.read_text(errors="replace") for path in paths[: options.learn + options.count]]
    mine, others = texts[: options.learn], texts[options.learn :]
    tokens = learned(options.base, lambda: iter(mine), options.tokens)
    base = tokenizer_of(options.base)
    before = sum(len(base.encode(text, add_special_tokens=False)) for text in others)
    extended = with_tokens(base, tokens)
    after = sum(len(extended.encode(text, add_special_tokens=False)) for text in others)
    size = sum(len(text.encode()) for text in mine) // 1000
    return [folder.name, size, len(tokens), before, after, f"{100 * (1 - after / before):.1f}"]


if __name__ == "__main__":
    sys.exit(main())
