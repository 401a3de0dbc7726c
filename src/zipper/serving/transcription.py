"""`POST /v1/audio/transcriptions`: a sound in a form, its words out."""

import json
import math
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from zipper.generation import Written
from zipper.serving import bodies
from zipper.serving.answers import events, peeked
from zipper.serving.refusals import Refused, refusal
from zipper.serving.service import Service
from zipper.serving.worker import Ticket
from zipper.strand import Segment
from zipper.words import words

FORMATS = ("json", "text", "verbose_json", "srt", "vtt")
FIELDS = {
    "file": {"type": "string", "format": "binary"},
    "model": {"type": "string", "description": "any name: one model is served"},
    "response_format": {"type": "string", "enum": list(FORMATS), "default": "json"},
    "stream": {"type": "boolean", "default": False, "description": "server-sent events"},
    "language": {"type": "string", "description": "not looked at"},
    "prompt": {"type": "string", "description": "only an empty one"},
    "temperature": {"type": "number", "description": "only 0: words are not drawn"},
}
SHAPE = {"type": "object", "required": ["file"], "properties": FIELDS}


def add(app: FastAPI, service: Service) -> None:
    """Adds the route."""

    async def transcribe(request: Request) -> Response:
        ticket, shape = await _begin(request, service)
        if ticket.streams:
            return events(_events(await peeked(service.parts(request, ticket))))
        (written,) = await service.written(request, ticket)
        return _answer(service, written, ticket.seconds, shape)

    app.add_api_route(
        "/v1/audio/transcriptions",
        transcribe,
        methods=["POST"],
        summary="The words of a sound file.",
        response_class=JSONResponse,
        openapi_extra={
            "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": SHAPE}}}
        },
    )


async def _begin(request: Request, service: Service) -> tuple[Ticket, str]:
    """Has it run; what was sent is not kept while it does. Returns the format wanted, too."""
    found = await bodies.form(request, service.caps)
    try:
        sound = await bodies.upload(found, "file")
        shape = bodies.field(found, "response_format", "json")
        streams = bodies.flag(found, "stream")
        _check(shape, streams, found)
    finally:
        await found.close()
    ticket = await service.begin([Segment("speech", sound)], ["text"], streams=streams)
    return ticket, shape


def _check(shape: str, streams: bool, found: Any) -> None:
    if shape not in FORMATS:
        raise Refused(
            400,
            "unsupported_format",
            f"response_format {shape!r:.40} is not known. Take one of {', '.join(FORMATS)}.",
        )
    if streams and shape not in ("json", "text"):
        raise Refused(
            400,
            "unsupported_format",
            f"{shape} is made of the whole, it cannot be streamed. Take json.",
        )
    if bodies.field(found, "prompt"):
        raise Refused(
            400, "unsupported", "This model reads no prompt beside a sound. Leave it out."
        )
    try:
        drawn = float(bodies.field(found, "temperature", "0") or 0) != 0
    except ValueError:
        drawn = True
    if drawn:
        raise Refused(
            400, "unsupported", "The likeliest words are written. Send temperature 0 or none."
        )


async def _events(parts: AsyncIterator[str]) -> AsyncIterator[str]:
    whole = ""
    try:
        async for part in parts:
            whole += part
            yield json.dumps({"type": "transcript.text.delta", "delta": part})
        yield json.dumps({"type": "transcript.text.done", "text": whole})
    except Exception as error:  # the status is sent already
        yield json.dumps(refusal(error).shape)


def _answer(service: Service, written: Written, seconds: float, shape: str) -> Response:
    modality: Any = service.kinds["text"]
    text: str = modality.decode(written.ids)
    if shape == "json":
        return JSONResponse({"text": text})
    if shape == "verbose_json":
        return JSONResponse(_verbose(modality, written, text, seconds))
    if shape == "srt":
        cue = f"1\n{_clock(0.0, ',')} --> {_clock(seconds, ',')}\n{text}\n\n" if text else ""
        return PlainTextResponse(cue, media_type="application/x-subrip")
    if shape == "vtt":
        cue = f"{_clock(0.0, '.')} --> {_clock(seconds, '.')}\n{text}\n\n" if text else ""
        return PlainTextResponse(f"WEBVTT\n\n{cue}", media_type="text/vtt")
    return PlainTextResponse(f"{text}\n")


def _verbose(modality: Any, written: Written, text: str, seconds: float) -> dict[str, Any]:
    """All that is known; without word times, which would need the model's attention."""
    said: Sequence[Any] = words(modality, written) if written.ids else ()
    sure = math.exp(sum(written.logprobs) / max(1, len(written.logprobs)))
    segment = {
        "id": 0,
        "seek": 0,
        "start": 0.0,
        "end": seconds,
        "text": text,
        "tokens": list(written.ids),
        "temperature": 0.0,
        "avg_logprob": sum(written.logprobs) / max(1, len(written.logprobs)),
        "compression_ratio": 1.0,
        "no_speech_prob": 0.0,
    }
    return {
        "task": "transcribe",
        "language": "unknown",
        "duration": seconds,
        "text": text,
        "confidence": sure,
        "segments": [segment] if text else [],
        "words": [{"word": word.text, "confidence": word.confidence} for word in said],
    }


def _clock(seconds: float, point: str) -> str:
    thousandths = round(seconds * 1000)
    minutes, rest = divmod(thousandths, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{rest // 1000:02}{point}{rest % 1000:03}"
