"""The server of the pages that people sit in front of: where it listens, and which requests reach a page."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import socket
import threading
import time
import webbrowser
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import uvicorn
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import JSONResponse, RedirectResponse, Response

from lit_rlhf.errors import UserError, first_line, say

FIRST_PORT, PORTS = 7860, 100
LARGEST = 2**20  # bytes of a request: a note, an answer, a conversation
TOKEN = "LIT_RLHF_TOKEN"

# Prompts and answers are text of strangers: nothing but a page's own scripts and styles runs, and nothing is asked
# elsewhere.
POLICY = (
    "default-src 'none'; script-src 'self'{scripts}; style-src 'self'{styles}; connect-src 'self'; font-src 'self'; "
    "img-src 'self' data:; manifest-src 'self'; base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",  # a page of yesterday's server would speak another language
}
INLINE = re.compile(rb"<script(?![^>]*\ssrc=)[^>]*>(.*?)</script>", re.DOTALL)

Receive = Callable[[], Any]
Send = Callable[[dict[str, Any]], Any]


class PageServer:
    """An HTTP server on an open port.

    Args:
        command: whose settings ``host``, ``port`` and ``token`` are; it stands in messages.
        host: address to listen on.
        port: 0 takes any free one, None the first free one from 7860 on.
        token: whether only those who have the printed address get in: it ends in a token, drawn anew or taken from the
            environment (``LIT_RLHF_TOKEN``), so that it outlives the server.
    """

    def __init__(self, command: str, host: str = "127.0.0.1", port: int | None = 0, token: bool = False) -> None:
        self.command, self.host = command, host
        self.token = (os.environ.get(TOKEN) or secrets.token_urlsafe(24)) if token else ""
        if token and not re.fullmatch(r"[\w-]{12,200}", self.token, re.ASCII):
            raise UserError(f"{command}.token: {TOKEN} is not of 12 or more letters, digits, - and _")
        self.local = host in ("127.0.0.1", "localhost", "::1")  # only this machine can reach it
        mine = () if self.local else (host.lower(), socket.gethostname().lower(), socket.getfqdn().lower())
        self.names = ("localhost", *mine)
        self.listener = self._listen(port)
        self.port = self.listener.getsockname()[1]

    @property
    def address(self) -> str:
        """The URL to open."""
        host = socket.gethostname() if self.host in ("0.0.0.0", "::") else self.host
        host = f"[{host}]" if ":" in host else host
        return f"http://{host}:{self.port}" + (f"/?token={self.token}" if self.token else "")

    def serve(self, app: Any, open_browser: bool = False) -> None:
        """Serve until Ctrl-C or SIGTERM; in a notebook, until the cell is interrupted.

        ``app`` is an ASGI application behind a ``Guard``."""
        if not self.local and not self.token:
            say(f"{self.command}: whoever reaches this machine gets in; {self.command}.token=true asks for a token")
        server = self.server(app)
        if open_browser:
            threading.Thread(target=_open_when_started, args=(server, self.address), daemon=True).start()
        with contextlib.suppress(KeyboardInterrupt):  # which uvicorn passes on when it has ended in good order
            if _in_event_loop():  # a notebook's, which runs the cell; there can be only one per thread
                _serve_aside(server, self.listener)
            else:
                server.run(sockets=[self.listener])

    def server(self, app: Any) -> uvicorn.Server:
        """Uvicorn's server, which ``run(sockets=[listener])`` starts."""
        quiet = {"log_level": "critical", "access_log": False, "server_header": False, "proxy_headers": False}
        return uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=2, ws="none", **quiet))

    def named(self, host: str) -> bool:
        """Whether a Host is this server's, and not a name of another site that was made to point here."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self.names:
            return True
        try:
            number = ipaddress.ip_address(name)
        except ValueError:
            return False
        return number.is_loopback or not self.local

    def _listen(self, port: int | None) -> socket.socket:
        ports = range(FIRST_PORT, FIRST_PORT + PORTS) if port is None else [port]
        for each in ports:
            try:
                family = socket.getaddrinfo(self.host, each, type=socket.SOCK_STREAM)[0][0]
                return socket.create_server((self.host, each), family=family)  # can be started again at once, not twice
            except OSError as error:
                reason = str(error.strerror).partition(" (while")[0]
        tried = f"{FIRST_PORT} to {FIRST_PORT + PORTS - 1}" if port is None else port
        raise UserError(
            f"{self.command}.port={tried}: cannot listen on {self.host} ({reason}); another program may have it. Give "
            f"another one by {self.command}.port="
        )


class Guard:
    """An ASGI application behind checks of Host, Origin, token and size, with headers for browsers.

    Args:
        app: what is guarded.
        server: where it is served.
        paths: pattern of what may be asked for; anything else is not there.
        styles: further sources of styles.
    """

    def __init__(self, app: Any, server: PageServer, paths: str = ".*", styles: str = "") -> None:
        self.app, self.server, self.paths = app, server, re.compile(paths)
        self.styles = f" {styles}" if styles else ""

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # "lifespan": uvicorn knows of no websockets here
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        send = _Guarded(send, self.styles)
        refusal = self._stranger(scope, headers)
        body = b"" if refusal else await _read(receive)
        if body is None:
            refusal = _refuse(413, f"a request of more than {LARGEST:,} bytes is refused; send less")
        elif body and headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            refusal = _refuse(415, "a body in JSON was expected")
        if refusal:
            await refusal(scope, receive, send)
            return
        # Uncompressed: what is inline in a page is looked for.
        kept = [pair for pair in scope["headers"] if pair[0] != b"accept-encoding"]
        try:
            await self.app({**scope, "headers": kept}, _again(body, receive), send)
        except Exception as error:
            if os.environ.get("LIT_RLHF_DEBUG"):
                raise
            say(f"{self.server.command}: {scope['path']} failed ({type(error).__name__}: {first_line(error)})")

    def _stranger(self, scope: dict[str, Any], headers: Headers) -> Response | None:
        """The answer to a request that another site makes, or one without the token; None where all is well."""
        host, origin = headers.getlist("host"), headers.get("origin")
        if len(host) != 1 or not self.server.named(host[0]):
            return _refuse(400, "this is not the server of that name (Host)")
        elsewhere = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if (origin is not None and origin.partition("://")[2].lower() != host[0].lower()) or (
            elsewhere and not (scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate")
        ):
            return _refuse(403, "a request of another site (Origin) is refused")
        if self.server.token and (answer := self._without_token(scope, headers)):
            return answer
        return None if self.paths.fullmatch(scope["path"]) else _refuse(404, "not there")

    def _without_token(self, scope: dict[str, Any], headers: Headers) -> Response | None:
        name = f"lit-rlhf-{self.server.port}"  # cookies are shared by all ports
        asked = parse_qs(scope["query_string"].decode("latin-1"))
        if self._right(asked.pop("token", [""])[0]):  # from then on in a cookie: an address is shown, and remembered
            query = f"?{urlencode(asked, doseq=True)}" if asked else ""
            answer = RedirectResponse(f"/{scope['path'].lstrip('/')}{query}", 303)
            answer.set_cookie(name, self.server.token, httponly=True, samesite="lax")
            return answer
        if self._right(cookie_parser(headers.get("cookie", "")).get(name, "")):
            return None
        return _refuse(401, f"open the address with its token, as {self.server.command} printed it")

    def _right(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(), self.server.token.encode())


class _Guarded:
    """Sends a response with headers for browsers, in which the inline scripts of a page have their digests."""

    def __init__(self, send: Send, styles: str) -> None:
        self.send, self.styles = send, styles
        self.start: dict[str, Any] | None = None  # of a page, while its body comes
        self.page = b""

    async def __call__(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.start = message
            if not Headers(raw=message["headers"]).get("content-type", "").startswith("text/html"):
                await self._begin()
        elif self.start is None:
            await self.send(message)
        else:
            self.page += message.get("body", b"")
            if not message.get("more_body"):
                await self._begin()
                await self.send({**message, "body": self.page})

    async def _begin(self) -> None:
        digests = (base64.b64encode(hashlib.sha256(script).digest()).decode() for script in INLINE.findall(self.page))
        scripts = "".join(f" 'sha256-{digest}'" for digest in digests)
        start, self.start = {**(self.start or {})}, None
        headers = MutableHeaders(raw=list(start["headers"]))
        headers.update({**HEADERS, "Content-Security-Policy": POLICY.format(scripts=scripts, styles=self.styles)})
        await self.send({**start, "headers": headers.raw})


async def _read(receive: Receive) -> bytes | None:
    """The body of a request; None where it is larger than ``LARGEST``, after hearing out what still comes: a browser
    that is cut off tells its page of no answer."""
    body, size, more = bytearray(), 0, True
    while more and size <= 100 * LARGEST:
        message = await receive()
        part = message.get("body", b"")
        size += len(part)
        more = message["type"] == "http.request" and message.get("more_body", False)
        if size <= LARGEST:
            body += part
    return bytes(body) if size <= LARGEST else None


def _again(body: bytes, receive: Receive) -> Receive:
    """``receive`` for a body that was read."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Any:
        return waiting.pop() if waiting else await receive()

    return again


def _refuse(status: int, reason: str) -> Response:
    return JSONResponse({"detail": reason}, status)


def _open_when_started(server: uvicorn.Server, address: str) -> None:
    while not server.started and not server.should_exit:
        time.sleep(0.05)
    webbrowser.open(address)


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _serve_aside(server: uvicorn.Server, listener: socket.socket) -> None:
    ended = threading.Event()

    def wait() -> None:
        # By looking now and then: an interrupt while join or Event.wait hold their lock leaves it locked (Python 3.11).
        while not ended.is_set():
            time.sleep(0.05)

    def run() -> None:
        try:
            server.run(sockets=[listener])
        finally:
            ended.set()

    threading.Thread(target=run, daemon=True).start()
    try:
        wait()
    finally:
        server.should_exit = True
        wait()
