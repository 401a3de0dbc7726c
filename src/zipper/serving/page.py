"""The page at `/`, for people: three files that load nothing from elsewhere, and what they tell of
the model.
"""

import asyncio
import mimetypes
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI
from starlette.responses import JSONResponse, Response

from zipper.inspection import made_of
from zipper.model import Zipper
from zipper.serving.refusals import Refused
from zipper.serving.service import Service

HERE = Path(__file__).parent / "web"
#: By route: the page, its looks, its program, and the part of that which hears the microphone.
FILES = {
    "/": "index.html",
    "/page.css": "page.css",
    "/page.js": "page.js",
    "/drawing.js": "drawing.js",
    "/sound.js": "sound.js",
    "/recorder.js": "recorder.js",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data: blob:; media-src blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def add(app: FastAPI, service: Service) -> None:
    """Adds the routes."""
    for route, name in FILES.items():
        app.add_api_route(route, _sends(HERE / name), include_in_schema=False)
    found = _About(service)

    async def model(name: str) -> Response:
        if name != service.name:
            raise Refused(404, "no_such_model", f"{service.name!r} is served here, not {name!r}.")
        return JSONResponse(await found.told())

    app.add_api_route(
        "/v1/models/{name:path}",
        model,
        summary="What the model is: towers, links, gates, what is frozen and its proof.",
    )


def _sends(path: Path) -> Callable[[], Awaitable[Response]]:
    """A route that sends a file; it is read once."""
    content, media = path.read_bytes(), mimetypes.types_map[path.suffix]

    async def send() -> Response:
        return Response(content, media_type=media, headers=HEADERS)

    return send


class _About:
    """What is told of the model; hashing its towers takes time, so it is done once."""

    def __init__(self, service: Service) -> None:
        self._service, self._lock = service, asyncio.Lock()
        self._told: dict[str, Any] = {}

    async def told(self) -> dict[str, Any]:
        async with self._lock:
            if not self._told:
                self._told = await self._service.apart(self._look)
        return self._told

    def _look(self) -> dict[str, Any]:
        pipeline, kinds = self._service.pipeline, self._service.kinds
        about, model = made_of(pipeline), pipeline.model
        for name, tower in about["towers"].items():
            del tower["source"]  # a place on this machine
            tower |= {"suffix": kinds[name].suffix, "like": kinds[name].like}
            tower["prefixes"] = dict(kinds[name].prefixes)
            frozen = isinstance(model, Zipper) and not tower["trained"]
            # What it is now, by the same hash: that nothing has changed it is seen, not believed.
            dtype = getattr(torch, model.config.towers[name].dtype) if frozen else None
            tower["digest_now"] = model.pin(name, dtype) if frozen else None
        return {**self._service.card, **about}
