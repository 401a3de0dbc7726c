"""`POST /v1/run`: any order of modalities in and out, as `zipper run` does."""

import base64
import json
import mimetypes
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, Field, StrictInt
from starlette.responses import JSONResponse, Response

from zipper.audio.sound import Audio
from zipper.generation import Written
from zipper.modality.kind import Kind
from zipper.modality.text import Text
from zipper.sampling import Sampling
from zipper.serving import bodies, sounds
from zipper.serving.answers import events, peeked
from zipper.serving.looking import Look, timed
from zipper.serving.refusals import refusal
from zipper.serving.service import Part, Service
from zipper.serving.worker import Ticket
from zipper.strand import Segment


class Given(BaseModel):
    """A segment. content: text, a file in base64 where the modality is made of files, or ids."""

    tower: str
    content: str | list[Any] | dict[str, Any]


class Forced(BaseModel):
    """A segment to be produced that begins with these ids."""

    tower: str
    content: list[StrictInt] = []


class How(BaseModel):
    """How tokens are drawn; at temperature 0 the likeliest is taken."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0


class Run(BaseModel):
    """What is given and what is to be produced, in order: "text + speech" is both at once. limits:
    most tokens by tower. stream: server-sent events, parts while they are made. explain: what each
    produced segment was read from, and the times of words."""

    given: list[Given] = []
    outputs: list[str | Forced] = Field(min_length=1)
    sampling: How = How()
    limits: dict[str, StrictInt] = {}
    seed: int = 0
    stream: bool = False
    explain: bool = False


def add(app: FastAPI, service: Service) -> None:
    """Adds the route."""

    async def run(request: Request) -> Response:
        wanted = await bodies.sent(request, Run, service.caps)
        given = [
            service.segment(one.tower, one.content, f"given.{number}.content")
            for number, one in enumerate(wanted.given)
        ]
        outputs = [
            one if isinstance(one, str) else Segment(one.tower, list(one.content))
            for one in wanted.outputs
        ]
        how = Sampling(**wanted.sampling.model_dump(), seed=wanted.seed)
        ticket = await service.begin(
            given, outputs, how, wanted.limits or None, wanted.stream, wanted.explain
        )
        if wanted.stream:
            parts = await peeked(service.parts(request, ticket))
            return events(_events(service, ticket, parts, wanted.explain))
        await service.written(request, ticket)
        return JSONResponse(await _done(service, ticket, wanted.explain))

    app.add_api_route(
        "/v1/run",
        run,
        methods=["POST"],
        summary="Any order of modalities in and out.",
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": Run.model_json_schema()}},
            }
        },
    )


async def _events(
    service: Service, ticket: Ticket, parts: AsyncIterator[Part], explain: bool
) -> AsyncIterator[str]:
    """Parts as they are made, and in the end what is told without a stream."""
    try:
        async for part in parts:
            told = await service.apart(lambda part=part: _piece(service, part))  # type: ignore[misc]
            yield json.dumps({"type": "part", "segment": part.segment, "tower": part.tower, **told})
        yield json.dumps({"type": "done", **await _done(service, ticket, explain)})
    except Exception as error:  # the status is sent already
        yield json.dumps(refusal(error).shape)


async def _done(service: Service, ticket: Ticket, explain: bool) -> dict[str, Any]:
    """What is told of all that was produced."""
    written = ticket.done.result()
    produced = await service.apart(lambda: [_told(service, one) for one in written])
    if not explain:
        return {"model": service.name, "produced": produced}
    found = await service.looks(ticket)
    explained = await service.apart(lambda: _explained(service, ticket, found, produced))
    return {"model": service.name, "produced": produced, **explained}


def _explained(
    service: Service, ticket: Ticket, found: list[Look], produced: list[dict[str, Any]]
) -> dict[str, Any]:
    """What was read from what: looks, what ids stand for and when those given were heard, of all
    given segments and then all produced ones. Adds its words to each produced text."""
    given, written = ticket.request.segments, ticket.done.result()
    for number, one in enumerate(written):
        kind: Any = service.kinds[one.tower]
        if isinstance(kind, Text):
            told = timed(kind, one, found, len(given) + number, ticket.clocks)
            produced[number]["words"] = told
    ids = [*((one.tower, one.content) for one in given), *((one.tower, one.ids) for one in written)]
    return {
        "looks": [look.packed for look in found],
        "labels": [_labels(service.kinds[tower], content) for tower, content in ids],
        "clocks": ticket.clocks,
    }


def _labels(kind: Kind, ids: list[int]) -> list[str] | None:
    """What each id stands for, where that can be told in a line."""
    return None if kind.suffix else [str(kind.told(kind.decode([id]))) for id in ids]


def _piece(service: Service, part: Part) -> dict[str, Any]:
    """A part as JSON; sound as samples, for a file is whole."""
    if isinstance(part.raw, Audio):
        content = base64.b64encode(sounds.pcm(part.raw)).decode()
        return {"content": content, "media_type": sounds.media("pcm", part.raw.rate_hz)}
    return _shown(service.kinds[part.tower], part.raw)


def _told(service: Service, written: Written) -> dict[str, Any]:
    """A produced segment."""
    kind, segment = service.kinds[written.tower], written.segment
    return {
        "tower": written.tower,
        "ids": segment.content,
        "ended": segment.ended,
        "score": segment.score,
        **_shown(kind, kind.decode(segment.content)),
    }


def _shown(kind: Kind, raw: Any) -> dict[str, Any]:
    """Raw data: a file as base64 with its media type, anything else as JSON."""
    if not kind.suffix:
        return {"content": kind.told(raw)}
    if not kind.there(raw):
        return {"content": None}
    with tempfile.TemporaryDirectory() as folder:
        kind.write(raw, path := Path(folder) / f"made{kind.suffix}")
        content = path.read_bytes()
    media = mimetypes.types_map.get(kind.suffix, "application/octet-stream")
    return {
        "content": base64.b64encode(content).decode(),
        "media_type": "audio/wav" if kind.suffix == ".wav" else media,
        "seconds": kind.seconds(raw),
    }
