"""The server: its addresses, and how it is started."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import sys
import threading
import webbrowser
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool

from ..errors import InputError, Stopped, describe
from ..files import temporary_folder
from .clips import Clips
from .correct_api import correct_routes
from .guard import Guard, is_loopback
from .jobs import FORMATS, VIEWS, Job, Jobs, jpeg

if TYPE_CHECKING:
    from .correct import Labels

STATIC = Path(__file__).parent / "static"
CRF = ("dss", "deeplab")
UNUSED = 5  # clips without a job that are kept
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What `vsod serve` was told.

    models: names, folders or checkpoints to choose from, the default one first.
    token: needed where `host` is not of this machine alone.
    max_mb: of an upload.
    labels: reads the labels to correct; called once, when the page is there.
    """

    models: list[str]
    host: str = "127.0.0.1"
    port: int = 8760
    token: str | None = None
    max_mb: float = 500.0
    device: str = "auto"
    labels: Callable[[], Labels] | None = None
    ready: Callable[[str], object] = field(default=lambda address: None)

    def __post_init__(self) -> None:
        if not is_loopback(self.host) and not self.token:
            raise InputError(
                f"host {self.host} needs a token: everybody who reaches this machine could use "
                "it, read what others upload and change labels"
            )
        if self.token is not None and len(self.token) < 8:
            raise InputError("token has to be at least 8 characters")
        if self.max_mb <= 0:
            raise InputError(f"max_mb must be above 0, got {self.max_mb:g}")


def create_app(settings: Settings) -> FastAPI:
    """The application; its folder lives as long as it runs."""
    folder = temporary_folder("vsod-serve")
    clips = Clips(folder / "clips")
    jobs = Jobs(folder / "jobs", settings.device)
    loading: list[threading.Timer] = []

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            for timer in loading:  # Python cannot end in the middle of an import
                timer.cancel()
                timer.join()
            jobs.close()
            shutil.rmtree(folder, ignore_errors=True)

    # No pages of the documentation: they load scripts from elsewhere.
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.folder, app.state.jobs, app.state.clips = folder, jobs, clips
    app.state.loading = loading
    app.add_middleware(
        Guard, host=settings.host, token=settings.token, limit=round(settings.max_mb * 2**20)
    )

    @app.exception_handler(InputError)
    @app.exception_handler(OSError)
    async def bad_input(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": describe(error)}, 400)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": error.detail}, error.status_code)

    def found(kept: dict[str, T], id: str, what: str) -> T:
        if id not in kept:
            raise HTTPException(404, f"there is no such {what} any more")
        return kept[id]

    def tidy() -> None:
        used = {job.clip.id for job in [*jobs.of.values()]}
        for clip in [clip for clip in [*clips.of.values()] if clip.id not in used][:-UNUSED]:
            clips.remove(clip)

    @app.get("/api/about")
    def about() -> dict[str, Any]:
        if settings.labels is None and not loading:
            loading.append(later(0.2, warm))  # the page is there, and looked at
        return {
            "models": [Path(model).name for model in settings.models],
            "views": VIEWS,
            "crf": CRF,
            "formats": FORMATS,
            "max_mb": settings.max_mb,
            "labels": settings.labels is not None,
        }

    @app.post("/api/clips")
    async def upload(request: Request, name: str = "clip") -> dict[str, Any]:
        path = clips.new_file()
        try:
            with path.open("wb") as file:
                async for part in request.stream():
                    await run_in_threadpool(file.write, part)
        except BaseException:
            shutil.rmtree(path.parent, ignore_errors=True)
            raise
        clip = await run_in_threadpool(clips.add, path, name)
        tidy()
        return clip.about()

    @app.post("/api/example")
    def example() -> dict[str, Any]:
        clip = clips.add_example()
        tidy()
        return clip.about()

    @app.get("/api/clips/{id}/first.jpg")
    def first(id: str) -> Response:
        from ..media.reading import open_source

        clip = found(clips.of, id, "clip")
        return Response(jpeg(next(iter(open_source(clip.path))).picture), media_type="image/jpeg")

    @app.get("/api/jobs")
    def list_jobs() -> dict[str, Any]:
        return {"jobs": [job.about() for job in [*jobs.of.values()]]}

    @app.post("/api/jobs")
    async def add_job(request: Request) -> dict[str, Any]:
        asked = await _json(request)
        clip = found(clips.of, str(asked.get("clip")), "clip")
        model, view, crf = asked.get("model", 0), asked.get("view"), asked.get("crf")
        if type(model) is not int or not 0 <= model < len(settings.models):
            raise InputError(f"model has to be 0 to {len(settings.models) - 1}")
        if view not in VIEWS:
            raise InputError(f"view must be one of {', '.join(VIEWS)}, got {view}")
        if crf not in (None, *CRF):
            raise InputError(f"crf must be one of {', '.join(CRF)}, got {crf}")
        return jobs.add(Job(clip, view, settings.models[model], crf)).about()

    @app.post("/api/jobs/{id}/files")
    async def add_file(id: str, request: Request) -> dict[str, Any]:
        job, asked = found(jobs.of, id, "prediction"), await _json(request)
        view, form = asked.get("view"), asked.get("format")
        if job.of is not None or job.state != "done":
            raise HTTPException(409, "the prediction is not there yet")
        if view not in VIEWS or form not in (*FORMATS, "preview"):
            raise InputError(f"view {view}, format {form}: there is no such file")
        for other in [*jobs.of.values()]:  # asked for before
            if (other.of, other.view, other.format) == (job, view, form) and other.state in (
                "waiting", "running", "done",
            ):  # fmt: skip
                return other.about()
        return jobs.add(Job(job.clip, view, job.model, job.crf, job, form)).about()

    @app.post("/api/jobs/{id}/cancel")
    def cancel(id: str) -> dict[str, Any]:
        job = found(jobs.of, id, "job")
        jobs.cancel(job)
        return job.about()

    @app.delete("/api/jobs/{id}")
    def remove(id: str) -> dict[str, Any]:
        job = found(jobs.of, id, "job")
        jobs.remove(job)
        if job.of is None and not any(other.clip is job.clip for other in jobs.of.values()):
            clips.remove(job.clip)
        return {}

    @app.get("/api/jobs/{id}/latest.jpg")
    def latest(id: str) -> Response:
        picture = found(jobs.of, id, "job").latest
        if picture is None:
            return Response(status_code=204)
        return Response(jpeg(picture), media_type="image/jpeg")

    @app.get("/api/jobs/{id}/file")
    def file(id: str) -> Response:
        job = found(jobs.of, id, "job")
        if job.state != "done" or job.file is None:
            raise HTTPException(409, "the file is not there yet")
        if job.of is None or job.format == "preview":
            return FileResponse(job.file)
        return FileResponse(job.file, filename=job.name)

    if settings.labels is not None:
        app.state.labels = Once(settings.labels)
        app.include_router(correct_routes(app.state.labels, _json))
    app.mount("/", StaticFiles(directory=STATIC, html=True))
    return app


class Once:
    """What a function gives, called once, by whoever comes first; the others wait."""

    def __init__(self, make: Callable[[], Any]):
        self.make, self.lock = make, threading.Lock()
        self.made: list[Any] = []

    def __call__(self) -> Any:
        with self.lock:
            if not self.made:
                self.made.append(self.make())
            return self.made[0]


async def _json(request: Request) -> dict[str, Any]:
    try:
        asked = await request.json()
    except ValueError:
        raise InputError("the request is not JSON") from None
    if not isinstance(asked, dict):
        raise InputError("the request is not a JSON object")
    return asked


class _Server(uvicorn.Server):
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it cuts off who is served
        await super().shutdown(sockets)


def serve(settings: Settings, *, open_browser: bool = True) -> None:
    """Runs until Ctrl-C or SIGTERM, and then raises Stopped; what was uploaded is gone then.

    Raises InputError where the address cannot be had, or the labels cannot be read.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((settings.host, settings.port))
        listening.listen()  # who comes now waits for the rest
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"host {settings.host}, port {settings.port}: {reason.lower()}") from None
    port = listening.getsockname()[1]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)
    shown = f"[{shown}]" if ":" in shown and "[" not in shown else shown
    address = f"http://{shown}:{port}/" + (f"?token={settings.token}" if settings.token else "")
    settings.ready(address)
    if open_browser and _has_screen():
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
    app = create_app(settings)
    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=2, server_header=False
    )
    server = _Server(config)

    failed: list[Exception] = []

    def read_labels() -> None:
        try:
            app.state.labels()
        except (InputError, OSError) as error:
            failed.append(error)
            server.should_exit = True

    if settings.labels is not None:
        app.state.loading.append(later(0.3, read_labels))  # after the page
    kept = "the list of corrections is whole" if settings.labels else "what was not saved is gone"
    with listening:
        try:
            server.run(sockets=[listening])
        except KeyboardInterrupt:
            raise Stopped(f"stopped: {kept}") from None
    if failed:
        raise failed[0]


def _has_screen() -> bool:
    if sys.platform in ("darwin", "win32"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def warm() -> None:
    """Loads what the first clip needs, while the page is looked at."""
    with contextlib.suppress(ImportError):
        from .. import prediction, zoo  # noqa: F401


def later(seconds: float, what: Callable[[], object]) -> threading.Timer:
    timer = threading.Timer(seconds, what)
    timer.daemon = True
    timer.start()
    return timer
