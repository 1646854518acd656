"""The labelling page over HTTP: one page, one script, and the steps of a person as JSON."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.staticfiles import StaticFiles

from lit_rlhf.apps.label.queue import Labelling
from lit_rlhf.errors import UserError

# Answers are text from strangers: nothing but this server's own script and style runs, and nothing is asked elsewhere.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Step(BaseModel):
    """What a person did with an item."""

    annotator: str
    item: str
    again: bool
    verdict: Any = None
    note: str = ""
    seconds: float = 0.0


class Undo(BaseModel):
    """That a person takes back step number ``turn``."""

    annotator: str
    turn: int


def make_app(labelling: Labelling, about: dict[str, Any], host: str = "127.0.0.1") -> FastAPI:
    """The page of ``labelling``; ``about``: what it says that is the same for everyone."""
    app = FastAPI(title="lit-rlhf labelling", docs_url=None, redoc_url=None, openapi_url=None)
    if host in ("127.0.0.1", "localhost", "::1"):
        # A name of another site that was made to point here (DNS rebinding) is none of ours.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])

    @app.middleware("http")
    async def headers(request: Request, call_next: Callable[[Request], Any]) -> Response:
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Cache-Control"] = "no-store"  # a page of yesterday's server would speak another language
        return response

    @app.exception_handler(ValueError)
    async def refused(request: Request, error: ValueError) -> JSONResponse:
        reason = "the text holds half a character (of an emoji)" if isinstance(error, UnicodeError) else str(error)
        return JSONResponse({"detail": reason}, 507 if isinstance(error, UserError) else 422)

    @app.get("/api/about")
    def get_about() -> dict[str, Any]:
        return {**about, "annotators": labelling.annotators}

    @app.get("/api/state")
    def get_state(annotator: str) -> dict[str, Any]:
        return labelling.state(annotator)

    @app.post("/api/judge")
    def judge(step: Step) -> dict[str, Any]:
        return labelling.judge(step.annotator, step.item, step.again, step.verdict, step.note, step.seconds)

    @app.post("/api/skip")
    def skip(step: Step) -> dict[str, Any]:
        return labelling.skip(step.annotator, step.item, step.again, step.note, step.seconds)

    @app.post("/api/undo")
    def undo(step: Undo) -> dict[str, Any]:
        return labelling.undo(step.annotator, step.turn)

    app.mount("/", StaticFiles(directory=Path(__file__).parent / "static", html=True))
    return app


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Serve on an open socket until Ctrl-C or SIGTERM; in a notebook, until the cell is interrupted."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3))
    with contextlib.suppress(KeyboardInterrupt):  # which uvicorn passes on when it has ended in good order
        if _in_event_loop():  # a notebook's, which runs the cell; there can be only one per thread
            _serve_aside(server, listener)
        else:
            server.run(sockets=[listener])


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
