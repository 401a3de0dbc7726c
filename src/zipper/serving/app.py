"""The web application: who may ask, what is answered, what is told of errors.

Every answer that is none has one shape, whoever refuses. Logs name what happened, never what was
sent.
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import logging
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, final

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.websockets import WebSocket

from zipper.errors import ZipperError
from zipper.pipeline import Pipeline
from zipper.serving import anything, bodies, chat, page, realtime, saying, transcription
from zipper.serving.bodies import SHARE, Caps, Held, Share
from zipper.serving.gauges import MEDIA_TYPE, Gauges
from zipper.serving.refusals import Busy, Refused, refusal
from zipper.serving.service import Service
from zipper.serving.worker import Worker

log = logging.getLogger("zipper.serving")

#: The only place that answers without the key: whether the process lives is no secret.
OPEN = "/health"

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


def serve(
    pipeline: Pipeline,
    rows: int = 8,
    queue: int = 64,
    key: str = "",
    caps: Caps | None = None,
    name: str = "zipper",
) -> "Guard":
    """An application for any ASGI server, with its worker begun. key: without it every route but
    /health is closed; "" closes none. name: of the model, for clients."""
    gauges = Gauges()
    worker = Worker(lambda: pipeline.engine(rows), rows, queue, gauges.made, gauges.waited)
    gauges.watch(worker)
    worker.start()
    service = Service(pipeline, worker, caps or Caps(), name, gauges.sounded)
    app = FastAPI(
        title="Zipper",
        description="One zipped model: any order of its modalities in and out.",
        docs_url=None,  # its page would load scripts from elsewhere; /openapi.json has all of it
        redoc_url=None,
    )
    for part in (transcription, saying, chat, anything, realtime, page):
        part.add(app, service)
    _add_plain(app, service, gauges)
    _add_refusals(app, gauges)
    return Guard(app, service, gauges, key)


@final
class Guard:
    """Stands before the application: the key, a full queue and bodies that say they are too large
    are told before anything is read."""

    def __init__(self, app: FastAPI, service: Service, gauges: Gauges, key: str) -> None:
        self.app, self.service, self.gauges = app, service, gauges
        self.held, self.sockets = Held(service.caps.held_bytes), 0
        self._key = _digest(key.encode()) if key else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await self._talk(scope, receive, send)
            return
        began, share = False, Share(self.held)

        async def heard() -> Any:
            message = await receive()
            share.whole = message["type"] != "http.request" or not message.get("more_body")
            return message

        async def told(message: Any) -> None:
            nonlocal began
            began = True
            async with asyncio.timeout(self.service.caps.stalled_s):
                await send(message)

        scope = {**scope, SHARE: share}
        try:
            self._check(scope)
            await self.app(scope, heard, told)
        except Exception as error:
            refused = refusal(error)
            if refused.status == 500:
                _log(scope, error)
            if not began:
                self.gauges.refused(refused.status, refused.code)
                await bodies.drain(Request(scope, heard))
                await _response(refused)(scope, receive, send)
        finally:
            share.give()

    async def _talk(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A websocket; who is refused gets an answer of HTTP."""
        share = Share(self.held)
        try:
            self._check({**scope, "method": "GET"})
            self.service.worker.check()
            if self.sockets >= self.service.caps.sockets:
                raise Busy(f"{self.sockets} sockets are open, and no more are. Come again later.")
        except ZipperError as error:
            refused = refusal(error)
            self.gauges.refused(refused.status, refused.code)
            await receive()
            response = _response(refused)
            del response.headers["content-length"]  # the server says it too, and clients want one
            await WebSocket(scope, receive, send).send_denial_response(response)
            return
        self.sockets += 1
        try:
            await self.app({**scope, SHARE: share}, receive, send)
        except Exception as error:
            _log({**scope, "method": "WEBSOCKET"}, error)
        finally:
            self.sockets -= 1
            share.give()

    def _check(self, scope: Scope) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self._key and scope["path"] != OPEN:
            given = _given(headers.get(b"authorization", b""))
            if not hmac.compare_digest(_digest(given), self._key):
                raise Refused(
                    401,
                    "no_key",
                    "Send the key: Authorization: Bearer KEY, or as the password of Basic.",
                )
        origin, host = headers.get(b"origin"), headers.get(b"host", b"")
        if origin is not None and origin.partition(b"://")[2] != host:
            raise Refused(403, "foreign_page", "Pages of other places may not ask this server.")
        if scope["method"] == "POST":
            told = {
                name.decode("latin1"): value.decode("latin1") for name, value in headers.items()
            }
            bodies.check_length(told, self.service.caps)
            self.service.worker.check()


def _add_plain(app: FastAPI, service: Service, gauges: Gauges) -> None:
    """The routes that only tell."""

    async def health() -> Response:
        return JSONResponse({"status": "alive"})

    async def ready() -> Response:
        if not service.worker.running:
            raise Refused(503, "stopping", "This server is stopping.")
        return JSONResponse({"status": "ready", "model": service.name})

    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [service.card]})

    async def metrics() -> Response:
        return Response(gauges.text(), media_type=MEDIA_TYPE)

    app.add_api_route(OPEN, health, summary="Whether the process lives.")
    app.add_api_route("/ready", ready, summary="Whether it takes requests.")
    app.add_api_route("/v1/models", models, summary="The model that is served.")
    app.add_api_route("/metrics", metrics, summary="Numbers for Prometheus.")


def _add_refusals(app: FastAPI, gauges: Gauges) -> None:
    """One shape for every error, those of the router too."""

    async def refuse(request: Request, error: Exception) -> Response:
        refused = refusal(error)
        if isinstance(error, HTTPException):
            code = {404: "no_such_route", 405: "method"}.get(error.status_code, "refused")
            refused = Refused(error.status_code, code, f"{request.method}: {error.detail}.")
        gauges.refused(refused.status, refused.code)
        if refused.status != 500:  # then starlette hands over a request that cannot be read
            await bodies.drain(request)
        return _response(refused)

    app.add_exception_handler(HTTPException, refuse)
    app.add_exception_handler(Exception, refuse)  # and then it is raised again, for the guard
    app.add_exception_handler(ValueError, _named(refuse))


def _named(refuse: Callable[[Request, Exception], Awaitable[Response]]) -> Any:
    """ZipperErrors are told; any other ValueError is ours, and goes on to the guard."""

    async def told(request: Request, error: Exception) -> Response:
        if refusal(error).status == 500:
            raise error
        return await refuse(request, error)

    return told


def _response(refused: Refused) -> Response:
    answer = JSONResponse(refused.shape, refused.status)
    for name, value in refused.headers:
        answer.headers.append(name, value)
    return answer


def _given(header: bytes) -> bytes:
    """The key in an Authorization header; browsers send it as a password."""
    kind, _, given = header.partition(b" ")
    if kind.lower() == b"bearer":
        return given.strip()
    if kind.lower() == b"basic":
        with suppress(binascii.Error):
            return base64.b64decode(given.strip(), validate=True).partition(b":")[2]
    return b""


def _digest(key: bytes) -> bytes:
    """Of one length, so that comparing tells nothing of it."""
    return hashlib.sha256(key).digest()


def _log(scope: Scope, error: Exception) -> None:
    """Where something went wrong: no message, it may hold what was sent."""
    places = [
        f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)
    ]
    log.error(
        "%s %s: %s at %s", scope["method"], scope["path"][:80], type(error).__name__, places[-3:]
    )
