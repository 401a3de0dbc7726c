"""`POST /v1/run`: any order of modalities in and out, as `zipper run` does."""

import base64
import mimetypes
import tempfile
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, Field, StrictInt
from starlette.responses import JSONResponse, Response

from zipper.generation import Written
from zipper.sampling import Sampling
from zipper.serving import bodies
from zipper.serving.service import Service
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
    """What is given and what is to be produced, in order. limits: most tokens by tower."""

    given: list[Given] = []
    outputs: list[str | Forced] = Field(min_length=1)
    sampling: How = How()
    limits: dict[str, StrictInt] = {}
    seed: int = 0


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
        ticket = await service.begin(given, outputs, how, wanted.limits or None)
        written = await service.written(request, ticket)
        produced = await service.apart(lambda: [_told(service, one) for one in written])
        return JSONResponse({"model": service.name, "produced": produced})

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


def _told(service: Service, written: Written) -> dict[str, Any]:
    """A produced segment: a file as base64 with its media type, anything else as JSON."""
    kind, segment = service.kinds[written.tower], written.segment
    raw = kind.decode(segment.content)
    told = {
        "tower": written.tower,
        "ids": segment.content,
        "ended": segment.ended,
        "score": segment.score,
    }
    if not kind.suffix:
        return {**told, "content": kind.told(raw)}
    if not kind.there(raw):
        return {**told, "content": None}
    with tempfile.TemporaryDirectory() as folder:
        kind.write(raw, path := Path(folder) / f"made{kind.suffix}")
        content = path.read_bytes()
    media = mimetypes.types_map.get(kind.suffix, "application/octet-stream")
    return {
        **told,
        "content": base64.b64encode(content).decode(),
        "media_type": "audio/wav" if kind.suffix == ".wav" else media,
        "seconds": kind.seconds(raw),
    }
