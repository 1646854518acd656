"""The labelling page over HTTP: one page, one script, and the steps of a person as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.staticfiles import StaticFiles

from lit_rlhf.apps.label.queue import Labelling
from lit_rlhf.errors import UserError


class Step(BaseModel):
    """A person's step: what was done with an item."""

    annotator: str
    item: str
    again: bool
    verdict: Any = None
    note: str = ""
    seconds: float = 0.0


class Undo(BaseModel):
    """A request to take back step number ``turn``."""

    annotator: str
    turn: int


def make_app(labelling: Labelling, about: dict[str, Any]) -> FastAPI:
    """The page of ``labelling``; ``about``: what it says that is the same for everyone."""
    app = FastAPI(title="lit-rlhf labelling", docs_url=None, redoc_url=None, openapi_url=None)

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
