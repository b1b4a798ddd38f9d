#!/usr/bin/env python3
"""Fetches what the page uses of other people's work into node/surface/page/vendor/, checked by its digest.

    scripts/vendor_page.py             takes the package below from the npm registry (needs npm)
    scripts/vendor_page.py --check     compares what lies there with vendor.json; needs no network

vendor.json beside the files says name, version, licence, the registry's digest of the package and ours of
each file. A new version is a change of VERSION and INTEGRITY here: `npm view uplot dist.integrity`.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "node" / "surface" / "page" / "vendor"
PACKAGE, VERSION, LICENCE = "uplot", "1.6.32", "MIT"
INTEGRITY = "sha512-KIMVnG68zvu5XXUbC4LQEPnhwOxBuLyW1AHtpm6IKTXImkbLgkMy+jabjLgSLMasNuGGzQm/ep3tOkyTxpiQIw=="
FILES = {
    "package/dist/uPlot.iife.min.js": "uplot.js",
    "package/dist/uPlot.min.css": "uplot.css",
    "package/LICENSE": "uplot.LICENSE",
}
MANIFEST = "vendor.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, and change nothing")
    if not parser.parse_args().check:
        fetch()
    faults = faults_of(FOLDER)
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if faults:
        print("hint: scripts/vendor_page.py fetches them again", file=sys.stderr)
    return 1 if faults else 0


def fetch() -> None:
    """Put the files and their manifest into FOLDER."""
    with tempfile.TemporaryDirectory() as temporary:
        command = ["npm", "pack", "--silent", f"{PACKAGE}@{VERSION}", "--pack-destination", temporary]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        package = Path(temporary, f"{PACKAGE}-{VERSION}.tgz")
        digest = "sha512-" + base64.b64encode(hashlib.sha512(package.read_bytes()).digest()).decode()
        if digest != INTEGRITY:
            sys.exit(f"error: the registry gave a package with the digest {digest}, not {INTEGRITY}")
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tarfile.open(package) as archive:
            for inside, name in FILES.items():
                file = archive.extractfile(inside)
                assert file is not None, inside
                (FOLDER / name).write_bytes(file.read())
    manifest = {
        "package": PACKAGE,
        "version": VERSION,
        "licence": LICENCE,
        "integrity": INTEGRITY,
        "sha256": {name: sha256(FOLDER / name) for name in sorted(FILES.values())},
    }
    (FOLDER / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def faults_of(folder: Path) -> list[str]:
    """What is not as the manifest says, and what the manifest does not know."""
    manifest = json.loads((folder / MANIFEST).read_text())
    if (manifest["version"], manifest["integrity"]) != (VERSION, INTEGRITY):
        return [f"{MANIFEST} is of another version than {PACKAGE} {VERSION}"]
    there = {path.name for path in folder.iterdir()} - {MANIFEST}
    faults = [f"{name} is missing" for name in sorted(set(manifest["sha256"]) - there)]
    faults += [f"{name} is not in {MANIFEST}" for name in sorted(there - set(manifest["sha256"]))]
    return faults + [
        f"{name} is not the file that was fetched"
        for name, digest in manifest["sha256"].items()
        if name in there and sha256(folder / name) != digest
    ]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
