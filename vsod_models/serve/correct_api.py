"""The addresses of the Correct page."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from ..errors import InputError

if TYPE_CHECKING:
    from .correct import Labels

SHOWN_AS_THEY_ARE = (".jpg", ".jpeg", ".png", ".webp")
Read = Callable[[Request], Any]


def correct_routes(labels: Callable[[], Labels], read: Read) -> APIRouter:
    """labels: gives them, once they are read.  read: the JSON object of a request."""
    routes = APIRouter(prefix="/api/labels")

    @routes.get("")
    def summary() -> dict[str, Any]:
        return labels().summary()

    @routes.get("/frames")
    def frames(sequence: str) -> list[dict[str, Any]]:
        labels().record(sequence, 0)
        return labels().frames(sequence)

    @routes.get("/image")
    def image(sequence: str, index: int) -> Response:
        from pathlib import Path

        from ..media.writing import encode_png

        record = labels().record(sequence, index)
        path = record.image
        if isinstance(path, Path) and path.suffix.lower() in SHOWN_AS_THEY_ARE:
            return FileResponse(path)
        return Response(encode_png(record.read_image()), media_type="image/png")

    @routes.get("/regions.png")
    def regions(sequence: str, index: int) -> Response:
        return Response(labels().regions(sequence, index), media_type="image/png")

    def act(asked: dict[str, Any]) -> Response:
        from .correct import Conflict

        what, of = labels(), asked.get("act")
        version = str(asked.get("version"))
        answer: dict[str, Any] = {}
        try:
            if of in ("undo", "redo"):
                changed = getattr(what, of)(version)
            else:
                sequence, index = str(asked.get("sequence")), asked.get("index")
                if type(index) is not int:
                    raise InputError("index has to be a whole number")
                if of == "edit" and isinstance(asked.get("entry"), dict):
                    changed = what.edit(sequence, index, asked["entry"], version)
                elif of == "carry":
                    changed, reached, ended = what.carry(sequence, index, version)
                    answer = {"reached": reached, "ended": ended}
                elif of == "stop":
                    changed = what.stop(sequence, index, version)
                else:
                    raise InputError("act has to be edit, carry, stop, undo or redo")
        except Conflict as conflict:
            return JSONResponse({"error": str(conflict), "conflict": True}, 409)
        answer["changed"] = [
            {"sequence": what.of[name][0], **what.state(name)} for name in sorted(changed)
        ]
        answer |= {"version": what.version, "undo": bool(what.entries), "redo": bool(what.undone)}
        return JSONResponse(answer)

    @routes.post("")
    async def acted(request: Request) -> Response:
        return await run_in_threadpool(act, await read(request))

    return routes
