"""POST /admit {"peer": ID, "name": NAME}: what the page's button sends to let an applicant in.

It takes the home's token (token.py), on loopback too: what another web page makes a browser send has no such
header, and what another user of this machine sends has no token. The change itself is asked of the node, as
by `tapestry admit`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web

from tapestry.node.errors import printable
from tapestry.node.protocol import strict
from tapestry.node.protocol.canon import peer_field
from tapestry.node.protocol.members import NAME_CHARS_MAX
from tapestry.node.surface.token import Token


@dataclass(frozen=True, slots=True)
class Admit:
    token: Token
    admit: Callable[[str, str], str]  # peer and name -> what is wrong, or ""; Malformed: it is no peer id

    async def serve(self, request: web.Request) -> web.Response:
        """The handler. The body is at most http.REQUEST_BYTES_MAX."""
        if not self.token.is_in(request.headers.get("Authorization", "")):
            return web.Response(
                status=403, text=f"the token is in {self.token.path.name} in the node's home\n"
            )
        try:
            fields = strict.table(json.loads(await request.text()), ("peer", "name"), "an admission")
            peer = peer_field(fields["peer"], "peer")
            name = strict.text(fields["name"], NAME_CHARS_MAX, "name")
            fault = printable(self.admit(peer, name))
        except (ValueError, RecursionError) as error:  # Malformed is a ValueError
            return web.Response(status=400, text=f"{printable(str(error))}\n")
        return web.Response(status=409, text=f"{fault}\n") if fault else web.Response(text="asked for\n")
