"""One question to the node of a home, at its own endpoint: with its token, and over TLS if it has that."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from http import HTTPStatus
from typing import Any

from tapestry.node.home import Home
from tapestry.node.surface.tls import client_context
from tapestry.node.surface.token import bearer

TIMEOUT_S = 5.0
AGAIN_S = (0.5, 1.0)
BYTES_MAX = 4 * 2**20  # Guess: /peers with 10,000 peers has 3 MB.


def ask(home: Home, url: str, path: str) -> Any:
    """The JSON at `url` + `path`; asked again where others have asked too much just now. Raises OSError,
    ValueError, http.client.HTTPException."""
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]  # the node is local
    if url.startswith("https:"):
        handlers.append(urllib.request.HTTPSHandler(context=client_context(home.http_cert)))
    request = urllib.request.Request(url.rstrip("/") + path, headers=bearer(home.http_token))
    opener = urllib.request.build_opener(*handlers)
    for pause_s in (*AGAIN_S, None):
        try:
            with opener.open(request, timeout=TIMEOUT_S) as response:
                data = response.read(BYTES_MAX + 1)
            break
        except urllib.error.HTTPError as error:
            if error.code != HTTPStatus.SERVICE_UNAVAILABLE or pause_s is None:
                raise
            time.sleep(pause_s)
    if len(data) > BYTES_MAX:
        raise ValueError(f"the answer is longer than {BYTES_MAX} bytes")
    return json.loads(data)
