"""Two nodes of different versions: the other's is shown, and what it lacks is warned of."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from e2e.harness import Node, init, tapestry

pytestmark = pytest.mark.e2e

# A sitecustomize.py that makes a node one of a later version, whose links have another protocol.
OTHER_LINKS = """
import os
if os.environ.get("OTHER_LINKS"):
    from tapestry.node.net.links import Links
    Links._protocol = lambda self, name: f"/tapestry/{self._run_id}/{name}/9"
"""


def later_version(folder: Path, *, links: bool) -> dict[str, str]:
    """The environment in which a node is of version 9.9.9."""
    info = folder / "tapestry_node-9.9.9.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tapestry-node\nVersion: 9.9.9\n")
    (folder / "sitecustomize.py").write_text(OTHER_LINKS)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    return {"PYTHONPATH": path, "OTHER_LINKS": "1" if links else ""}


def test_a_member_of_another_version_is_shown_and_what_it_lacks_is_warned_of(tmp_path: Path) -> None:
    first = Node(init(tmp_path / "first", min_members="1"))
    first.environment = later_version(tmp_path / "later", links=False)
    with first.start().wait_ready():
        first.wait_epoch(1)
        with Node(tmp_path / "second", "--peer", first.invitation(), data="stdlib:2/3") as second:
            second.wait_ready()

            def seen(node: Node) -> list[tuple[str, bool | None]]:
                peers = json.loads(node.get("/peers"))
                return [(one["version"], one["same_version"]) for one in peers]

            second.wait("the first one's version", lambda: seen(second) == [("9.9.9", False)])
            first.wait("the second one's version", lambda: seen(first) == [("0.1.0", False)])
            told = tapestry("peers", "--home", second.home)
            assert "version" in told.stdout and "9.9.9" in told.stdout, told.stdout
            assert "version=lacks" not in second.log.read_text()

            assert first.stop() == 0
            first.environment = later_version(tmp_path / "later", links=True)
            first.start().wait_ready()
            end = first.status()["peer_id"][-6:]
            lacks = f"version=lacks peer={end} theirs=9.9.9 ours=0.1.0 protocol=control/2"
            second.wait("the warning", lambda: lacks in second.log.read_text())
