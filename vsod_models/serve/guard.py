"""Who may talk to the server: checked before anything else sees a request.

A page on the internet can make a browser send requests to 127.0.0.1, and can give its own name that
address (DNS rebinding); both are turned away by the headers that browsers do not let pages set.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from http.cookies import SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response

UPLOAD = "/api/clips"
SMALL = 2**20  # bytes of any other request

# Everything that a page of ours loads is ours.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; "
    "media-src 'self' blob:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class TooLarge(Exception):
    """More came than a request may hold."""


class Guard:
    """ASGI middleware.

    host: that the server is bound to.  On a loopback address only loopback names are answered;
    else any address, the host's own name and `host`.
    token: that every request has to bring, as a cookie (the page's address `?token=` sets it) or as
    `Authorization: Bearer`; None: none is needed.
    limit: bytes of an upload.
    """

    def __init__(self, app: Any, host: str, token: str | None, limit: int):
        self.app, self.host, self.token, self.limit = app, host, token, limit

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.limit if scope["path"] == UPLOAD else SMALL
        refusal = self.refusal(scope, limit)
        if refusal is not None:
            refusal.headers.update(HEADERS)
            await refusal(scope, receive, send)
            return
        came, started = 0, False

        async def counted() -> Any:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > limit:
                raise TooLarge
            return message

        async def marked(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-cache")
            await send(message)

        try:
            await self.app(scope, counted, marked)
        except TooLarge:
            if not started:
                await self.too_large(limit)(scope, receive, send)

    def refusal(self, scope: Any, limit: int) -> Response | None:
        """The answer to a request that goes no further; None where it may."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self.known(host):
            return PlainTextResponse("Wrong host: open the address that vsod serve printed.", 421)
        safe = scope["method"] in ("GET", "HEAD")
        origin = headers.get("origin")
        if origin is not None and origin != f"{scope['scheme']}://{host}":
            return PlainTextResponse("Another site may not use this server.", 403)
        site = headers.get("sec-fetch-site", "none")
        page = safe and scope["path"] == "/"  # a link to it may lie anywhere
        if site not in ("same-origin", "none") and not page:
            return PlainTextResponse("Another site may not use this server.", 403)
        if self.token is not None and (answer := self.unknown_user(scope, headers)) is not None:
            return answer
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > limit:
            return self.too_large(limit)
        return None

    def known(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if is_loopback(self.host):
            return is_loopback(name)
        if name in (self.host, "localhost", socket.gethostname()):
            return True
        try:  # a number is no name that somebody could point elsewhere
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def unknown_user(self, scope: Any, headers: Headers) -> Response | None:
        assert self.token is not None
        cookie = f"vsod-{(scope.get('server') or ('', 0))[1]}"  # cookies do not tell ports apart
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if scope["path"] == "/" and given and self.right(given):
            answer = RedirectResponse("/", 303)
            answer.set_cookie(cookie, self.token, httponly=True, samesite="lax")
            return answer
        kept = SimpleCookie(headers.get("cookie", "")).get(cookie)
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        if (kept is not None and self.right(kept.value)) or self.right(bearer):
            return None
        return PlainTextResponse("This server needs its token: open its address with ?token=", 401)

    def right(self, given: str) -> bool:
        assert self.token is not None
        return hmac.compare_digest(given.encode(), self.token.encode())

    @staticmethod
    def too_large(limit: int) -> Response:
        return PlainTextResponse(
            f"Too large: this server takes at most {limit / 2**20:.0f} MB.",
            413,
            {"Connection": "close", **HEADERS},
        )
