"""Who may ask the operators' port what: names of this host against DNS rebinding, a token for changes."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Collection
from ipaddress import ip_address
from urllib.parse import urlsplit

from aiohttp import web

from qdeploy.serve.logs import complain

GUESSES = 5.0  # wrong tokens in one go
GUESSES_PER_S = 0.2


def host_allowed(host: str | None, names: Collection[str]) -> bool:
    """True when a Host header names an address, localhost or one of `names`.

    A page of another site reaches this port only under that site's own name (DNS rebinding), never under an address.
    """
    try:
        name = (urlsplit(f"//{host}").hostname or "") if host else ""
    except ValueError:
        return False
    if name == "localhost" or name in names:
        return True
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def same_origin(request: web.BaseRequest) -> bool:
    """True when no browser says that another page sent the request."""
    origin = request.headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("Host"):
        return False
    return request.headers.get("Sec-Fetch-Site", "same-origin") in ("same-origin", "none")


class Gate:
    """Compares tokens in constant time, and few wrong ones: after GUESSES in a row nobody gets in for a while."""

    def __init__(self, token: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._authorization = f"Bearer {token}".encode()
        self._clock = clock
        self._left, self._at = GUESSES, clock()

    def refusal(self, request: web.BaseRequest) -> web.Response | None:
        """The answer to a request without the right token; None for who has it."""
        now = self._clock()
        self._left = min(GUESSES, self._left + (now - self._at) * GUESSES_PER_S)
        self._at = now
        if self._left < 1:
            return web.Response(status=429, text="too many wrong tokens: wait\n", headers={"Retry-After": "5"})
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if hmac.compare_digest(given, self._authorization):
            return None
        self._left -= 1
        complain(f"a wrong or missing control token from {request.remote}")
        return web.Response(
            status=401, text="the token is wrong or missing\n", headers={"WWW-Authenticate": 'Bearer realm="qdeploy"'}
        )
