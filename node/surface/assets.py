"""The files of the page in page/, which are package data: read once, served from memory.

The page needs nothing from elsewhere. Its policy says so to the browser: scripts, styles and connections of
this endpoint only, nothing inline, no frames around it. page/vendor/ is other people's work, put there by
scripts/vendor_page.py with its licence and digests.
"""

from __future__ import annotations

from functools import cache
from importlib import resources

from aiohttp import web

INDEX = "index.html"
PREFIX = "/page/"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}


@cache
def assets() -> dict[str, tuple[str, bytes]]:
    """Path below page/ -> content type and bytes, of what a browser asks for."""
    root = resources.files("tapestry.node.surface").joinpath("page")
    found = {}
    for folder in ("", "vendor/"):
        for file in sorted(root.joinpath(folder).iterdir(), key=lambda f: f.name):
            kind = _TYPES.get(f".{file.name.rpartition('.')[2]}")
            if kind is not None and file.is_file():
                found[folder + file.name] = kind, file.read_bytes()
    return found


async def get_page(_: web.Request) -> web.Response:
    """The handler of /."""
    return _answer(INDEX)


async def get_asset(request: web.Request) -> web.Response:
    """The handler of /page/{path}."""
    return _answer(request.match_info["path"])


def _answer(path: str) -> web.Response:
    kind, body = assets().get(path, ("", b""))
    if not kind:
        return web.Response(text="there is no such file\n", status=404)
    return web.Response(body=body, content_type=kind, charset="utf-8", headers=_HEADERS)
