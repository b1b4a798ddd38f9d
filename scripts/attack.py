"""What hostile processes can do to real nodes: strangers at the door, and members that lie.

    .venv/bin/python -P scripts/attack.py NAME... [--members N] [--seconds 20] [--json FILE] [--keep DIR]
        of strangers: [--repeat 2] [--strength 200] [--slower-max 0.10] [--open] [--nice 19]
        of members: [--alone FILE] [--no-alone]
    .venv/bin/python -P scripts/attack.py list

NAME is an attack, `strangers` or `liars` for all of a kind. Members of the model `nano` run on loopback.

**Strangers.** Members (2 unless told otherwise) have their default settings. Who attacks is none, and has no
link to one: what it says on members' streams is refused at the door. With `--open` the run is open, so that
it has a link, and is heard; `list` marks the attacks that are worth trying there too. Quiet times and times
under attack alternate; hostile processes attack the first member. They share this machine's cores, so they
have a low priority, and in the quiet times runs `busy` in their place, a process of the same priority that
reaches nobody: what it takes from a round is no attack's doing. Printed: the median round in either, how
much slower it was, what of a core the member's daemon took (which says what an attack costs it also where
others use the machine; give --nice 0 there, or the attack gets no time), its memory, whom it turned away and
what it refused. Exit 1 if a round was slower than --slower-max, a member ended, its memory grew by more than
MEMORY_MAX, or its log has a traceback.

**Members.** Of four, the last is a real node in whose process scripts/liars changes the product. Each file of
that folder is an attack, and says what it promises. Printed: whether the honest members are at one head and
digest, how much slower a round was than before the lie, the loss beside a run without the liar, what honest
members refused, who was proven to lie and removed. Exit 1 if the promise does not hold, the honest members do
not go on at one head, or one of them is accused, ends, or has a traceback.

A stranger's attack is one function of scripts/strangers (target.py says how it gets its name).
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _liars import attacked_by_member, read_alone, write_alone
from _liars import say as say_seen
from _run import exit_by_signal, work_folder
from _strangers import Outcome, run
from liars.registry import MODULES, what
from liars.seen import Seen
from strangers.registry import ATTACKS


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="attacks, `strangers`, `liars`, or `list`")
    parser.add_argument("--members", type=int, help="2 for strangers, 4 with a liar")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each quiet time and each attack")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--strength", type=int, default=200, help="hostile connections at once")
    parser.add_argument("--nice", type=int, default=19, help="priority of the hostile process")
    parser.add_argument("--slower-max", type=float, default=0.10)
    parser.add_argument("--open", action="store_true", help="an open run: who attacks has a link")
    parser.add_argument("--no-alone", action="store_true", help="no run without the liar, for its loss")
    parser.add_argument("--alone", type=Path, help="keeps the losses without a liar for the next call")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    kinds = {"strangers": list(ATTACKS), "liars": list(MODULES)}
    options.names = [one for name in options.names for one in kinds.get(name, [name])]
    unknown = [name for name in options.names if name not in (*ATTACKS, *MODULES, "list")]
    if unknown or not options.names:
        parser.error(f"no attack {unknown[0]!r}" if unknown else "name an attack")
    return options


def main() -> int:
    options = parsed()
    if options.names == ["list"]:
        for name, (does, _) in ATTACKS.items():
            print(f"{name:14} a stranger: {does}")
        for name in MODULES:
            print(f"{name:14} a member: {what(name)}")
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, exit_by_signal)
    strangers = [name for name in options.names if name in ATTACKS]
    found: list[Outcome | Seen] = []
    with work_folder(options.keep, "tapestry-attack-") as place:
        found += run(strangers, options, place) if strangers else []
        alone = read_alone(options.alone)
        for name in options.names:
            if name in MODULES:
                seen = attacked_by_member(name, options, place, alone)
                say_seen(seen)
                found.append(seen)
                write_alone(options.alone, alone)
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")
    return int(any(one.faults for one in found))


if __name__ == "__main__":
    sys.exit(main())
