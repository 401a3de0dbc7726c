"""`POST /v1/run`: any order of modalities in and out, as `zipper run` does."""

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, Field, StrictInt
from starlette.responses import JSONResponse, Response

from zipper.modality.kind import Kind
from zipper.modality.text import Text
from zipper.sampling import Sampling
from zipper.serving import bodies
from zipper.serving.answers import events, peeked, piece, told
from zipper.serving.looking import Look, timed
from zipper.serving.refusals import Refused, refusal
from zipper.serving.service import Part, Service
from zipper.serving.worker import Ticket
from zipper.strand import Segment


class Given(BaseModel, extra="forbid"):
    """A segment. content: text, a file in base64 where the modality is made of files, or ids.
    file: instead of it the name of the part of the form that holds the file."""

    tower: str
    content: str | list[Any] | dict[str, Any] | None = None
    file: str = ""


class Forced(BaseModel, extra="forbid"):
    """A segment to be produced that begins with these ids."""

    tower: str
    content: list[StrictInt] = []


class How(BaseModel, extra="forbid"):
    """How tokens are drawn; at temperature 0 the likeliest is taken."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0


class Run(BaseModel, extra="forbid"):
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


#: Of a form: the field `request` is what would be the body, every other part is a file.
FORM = {
    "type": "object",
    "required": ["request"],
    "properties": {"request": {"type": "string", "contentMediaType": "application/json"}},
    "additionalProperties": {"type": "string", "format": "binary"},
}


def add(app: FastAPI, service: Service) -> None:
    """Adds the route."""

    async def run(request: Request) -> Response:
        files: dict[str, bytes] = {}
        if bodies.media_type(request) == "multipart/form-data":
            wanted, files = await bodies.filled(request, Run, service.caps)
        else:
            wanted = await bodies.sent(request, Run, service.caps)
        given = _given(service, wanted, files)
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
                "content": {
                    "application/json": {"schema": Run.model_json_schema()},
                    "multipart/form-data": {"schema": FORM},
                },
            }
        },
    )


def _given(service: Service, wanted: Run, files: dict[str, bytes]) -> list[Segment]:
    """What is given, files from the parts of the form; each part is for one segment."""
    found, left = [], dict(files)
    for number, one in enumerate(wanted.given):
        where = f"given.{number}"
        if (one.content is None) != bool(one.file):
            raise Refused(
                422, "bad_request", f"{where} needs content, or else a file; one of them."
            )
        if one.file and one.file not in left:
            raise Refused(
                422,
                "no_file",
                f"{where} names the part {one.file!r:.40}: there is no such part in the form, or "
                "another segment has it. Nothing else is opened.",
            )
        content = left.pop(one.file) if one.file else one.content
        found.append(service.segment(one.tower, content, f"{where}.content"))
    if left:
        raise Refused(
            422, "bad_form", f"No segment names the part {next(iter(left))!r:.40}. Leave it out."
        )
    return found


async def _events(
    service: Service, ticket: Ticket, parts: AsyncIterator[Part], explain: bool
) -> AsyncIterator[str]:
    """Parts as they are made, and in the end what is told without a stream."""
    try:
        async for part in parts:
            shown = await service.apart(lambda part=part: piece(service, part))  # type: ignore[misc]
            yield json.dumps({"type": "part", **shown})
        yield json.dumps({"type": "done", **await _done(service, ticket, explain)})
    except Exception as error:  # the status is sent already
        yield json.dumps(refusal(error).shape)


async def _done(service: Service, ticket: Ticket, explain: bool) -> dict[str, Any]:
    """What is told of all that was produced."""
    written = ticket.done.result()
    produced = await service.apart(lambda: [told(service, one) for one in written])
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
            words = timed(kind, one, found, len(given) + number, ticket.clocks)
            produced[number]["words"] = words
    ids = [*((one.tower, one.content) for one in given), *((one.tower, one.ids) for one in written)]
    return {
        "looks": [look.packed for look in found],
        "labels": [_labels(service.kinds[tower], content) for tower, content in ids],
        "clocks": ticket.clocks,
    }


def _labels(kind: Kind, ids: list[int]) -> list[str] | None:
    """What each id stands for, where that can be told in a line."""
    return None if kind.suffix else [str(kind.told(kind.decode([id]))) for id in ids]
