"""Real daemons whose machine loses its power: what was not synced is gone, and the home starts all the same.

    sudo .venv/bin/python -P scripts/power_cut.py [--nodes 3] [--cuts 20] [--homes one|all] [--json FILE]

SIGKILL leaves what was written in the kernel's hands, so it loses nothing that was not synced. Here the homes
lie on an ext4 file system of their own, in a file, which is shut down at a random moment as by a power cut
(EXT4_IOC_SHUTDOWN without flushing its journal): what the disk does not have by then is lost. The nodes are
killed, the file system is mounted anew, its journal is replayed, and the nodes are started.

    one    the home of one node; the others go on meanwhile
    all    all homes at once, as when one building loses its power

Checked after each cut, before the start: `tapestry verify HOME` holds. And after it: the node comes to the
run's head and contributes again, under its old key; no epoch is ever shown with two state digests, before
and after; nobody is accused of having voted twice. Told for each cut, of the first home:

    shown      the newest epoch that the node had told in /status before the cut
    on disk    records that its disk has then, and in brackets the epoch that its state can be made of
    back       seconds from its start to the next record that has its contribution

Exit 1 if something does not hold. Needs Linux, root, mkfs.ext4 and loop devices.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import psutil
from _chains import ChainRecord, chain_record
from _run import exit_by_signal, work_folder
from e2e.harness import Digests, Node, init, tapestry

EXT4_IOC_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32), linux/fs/ext4/ext4.h
NO_LOG_FLUSH = 2  # what lies in the journal's buffers is lost as well
DISK_BYTES = 1 << 30
BETWEEN_S = (3.0, 12.0)  # from a node's next contribution to the next cut
BACK_S = 120.0


class Disk:
    """An ext4 file system in a file, mounted at `folder`."""

    def __init__(self, image: Path, folder: Path) -> None:
        self._image, self.folder, self._mounted = image, folder, False
        with image.open("xb") as file:
            file.truncate(DISK_BYTES)
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
        folder.mkdir()
        self._mount()

    def cut(self) -> None:
        """From now on the device gets nothing more; each call on the file system fails."""
        fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, EXT4_IOC_SHUTDOWN, NO_LOG_FLUSH.to_bytes(4, sys.byteorder))
        finally:
            os.close(fd)

    def restore(self) -> None:
        """The power is back: mounted anew, the journal replayed. Nobody may have a file of it open."""
        self.close()
        self._mount()

    def close(self) -> None:
        """Unmounted, if need be as soon as the last one lets its files go."""
        if self._mounted:
            self._mounted = False
            if subprocess.run(["umount", self.folder], check=False).returncode:
                subprocess.run(["umount", "--lazy", self.folder], check=True)

    def _mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", self._image, self.folder], check=True)
        self._mounted = True


@dataclass(frozen=True, slots=True)
class Cut:
    """One cut, of the first home."""

    shown: int  # newest epoch in /status before
    records: int  # on the disk after
    state: int  # epoch that verify could replay to
    back_s: float


class Power:
    """The nodes and the disk on which some of their homes lie."""

    def __init__(self, folder: Path, disk: Disk, options: argparse.Namespace) -> None:
        self.disk = disk
        on_disk = options.nodes if options.homes == "all" else 1
        places = [self.disk.folder if i < on_disk else folder for i in range(options.nodes)]
        count = options.nodes
        self.nodes = [Node(place / f"n{i}", data=f"stdlib:{i + 1}/{count}") for i, place in enumerate(places)]
        for node in self.nodes:
            node.log = folder / f"{node.home.name}.log"  # not on the disk that goes
        self.victims = self.nodes[:on_disk]
        self.digests = Digests(*self.nodes)
        self.rng = random.Random(options.seed)

    def begin(self) -> None:
        """A founder, whoever it is, and the others; until all have contributed."""
        init(self.nodes[-1].home)
        self.nodes[-1].start().wait_ready()
        for node in self.nodes[:-1]:
            node.home.mkdir()
            (node.home / "node.toml").write_text("threads = 1\n")
            node.start("--peer", self.nodes[-1].invitation()).wait_ready()
        for node in self.nodes:
            self._wait_contribution(node, 0)

    def cut(self) -> tuple[Cut, list[str]]:
        """One cut, and all back; what does not hold."""
        first = self.victims[0]
        self._watch(self.rng.uniform(*BETWEEN_S))
        shown = first.status()["epoch"]
        families = [node.children() for node in self.victims]
        self.disk.cut()
        for node, children in zip(self.victims, families, strict=True):
            _kill(node, children)
        self.disk.restore()
        faults, state = self._verified(shown)
        records = len(_chain(first))
        peers = [node.address for node in self.nodes if node not in self.victims]
        began_at = time.monotonic()
        for node in self.victims:
            node.start(*(["--peer", peers[0]] if peers else []))
        for node in self.victims:
            node.wait_ready()
            self._wait_contribution(node, shown)
        return Cut(shown, records, state, round(time.monotonic() - began_at, 1)), faults

    def _verified(self, shown: int) -> tuple[list[str], int]:
        """What verify finds wrong in the homes as the cut left them; how far the first one's state goes."""
        faults, states = [], []
        for node in self.victims:
            done = tapestry("verify", node.home)
            if done.returncode:
                faults.append(
                    f"{node.home.name}, cut at {shown}: {done.stdout.strip()} {done.stderr.strip()}"
                )
            found = re.search(r"replayed.* to (?:epoch )?(\d+)", done.stdout)
            states.append(int(found[1]) if found else -1)
        return faults, states[0]

    def _watch(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.digests.poll()
            time.sleep(0.05)

    def _wait_contribution(self, node: Node, after: int) -> None:
        peer = node.json()["peer_id"]
        self.digests.wait(
            f"contribution of {node.home.name} after epoch {after}",
            lambda: any(peer in r.contributors for r in _chain(node)[after:]),
            BACK_S,
        )

    def end(self) -> list[str]:
        """An orderly end, and what does not hold then."""
        faults = []
        for node in self.nodes:
            code = node.stop()
            if code:
                faults.append(f"{node.home.name} ended with {code}")
        for node in self.nodes:
            done = tapestry("verify", node.home)
            if done.returncode:
                faults.append(f"{node.home.name}: {done.stdout.strip()} {done.stderr.strip()}")
            faults += [f"{node.home.name} holds {one.name}" for one in node.home.glob("accusations/*")]
        return faults


def _kill(node: Node, children: list[psutil.Process]) -> None:
    """It may have ended by itself already: a disk that cannot be written ends a node."""
    assert node.process is not None
    if node.process.poll() is None:
        node.process.send_signal(signal.SIGKILL)
        node.process.wait()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive, f"left behind: {alive}"


def _chain(node: Node) -> list[ChainRecord]:
    return [chain_record(line) for line in (node.home / "chain.jsonl").read_bytes().split(b"\n")[:-1]]


@contextlib.contextmanager
def opened(options: argparse.Namespace) -> Iterator[Power]:
    with work_folder(options.keep, "tapestry-power-") as folder:
        disk = Disk(folder / "disk.img", folder / "disk")
        nodes: list[Node] = []
        try:
            power = Power(folder, disk, options)
            nodes += power.nodes
            yield power
        finally:
            for node in nodes:
                if node.process is not None and node.process.poll() is None:
                    node.kill()
            disk.close()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--cuts", type=int, default=20)
    parser.add_argument("--homes", choices=["one", "all"], default="one")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, exit_by_signal)
    faults: list[str] = []
    cuts: list[Cut] = []
    try:
        with opened(options) as power:
            power.begin()
            for number in range(options.cuts):
                cut, found = power.cut()
                cuts.append(cut)
                faults += found
                print(
                    f"cut {number + 1}: shown={cut.shown} on_disk={cut.records} ({cut.state}) "
                    f"back={cut.back_s}s",
                    *found,
                    flush=True,
                )
            faults += power.end()
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        faults.append(str(error))
    lost = [cut.shown - cut.state for cut in cuts] or [0]
    backs = [cut.back_s for cut in cuts] or [0.0]
    print(f"cuts {len(cuts)}")
    print(f"epochs behind what was shown: {statistics.median(lost)} in the median, {max(lost)} at most")
    print(f"back after: {statistics.median(backs)} s in the median, {max(backs)} s at most")
    if options.json:
        options.json.write_text(json.dumps([asdict(cut) for cut in cuts], indent=1) + "\n")
    for fault in faults:
        print(f"does not hold: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
