"""`POST /v1/audio/transcriptions`: a sound in a form, its words out."""

import json
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from zipper.generation import Written
from zipper.serving import bodies
from zipper.serving.answers import events, peeked
from zipper.serving.looking import timed
from zipper.serving.refusals import Refused, refusal
from zipper.serving.service import Part, Service
from zipper.serving.worker import Ticket
from zipper.strand import Segment

#: Those that tell when words were said.
TIMED = ("verbose_json", "srt", "vtt")
#: Of a line of subtitles, as broadcasters have them: a pause that ends it, its most seconds and
#: letters.
PAUSE_S, LONGEST_S, LETTERS = 0.8, 6.0, 84
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
        modality: Any = service.kinds["text"]
        text: str = modality.decode(written.ids)
        if shape not in TIMED:
            return (
                JSONResponse({"text": text}) if shape == "json" else PlainTextResponse(f"{text}\n")
            )
        found = await service.looks(ticket)
        said = await service.apart(lambda: timed(modality, written, found, 1, ticket.clocks))
        return _timed(shape, written, text, said, ticket.seconds)

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
    explained = shape in TIMED
    given = [Segment("speech", sound)]
    ticket = await service.begin(given, ["text"], streams=streams, explained=explained)
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
    for name in "prompt", "include[]", "chunking_strategy", "known_speaker_names[]":
        if bodies.field(found, name):
            raise Refused(400, "unsupported", f"{name} is not known to this model; leave it out.")
    try:
        drawn = float(bodies.field(found, "temperature", "0") or 0) != 0
    except ValueError:
        drawn = True
    if drawn:
        raise Refused(
            400, "unsupported", "The likeliest words are written. Send temperature 0 or none."
        )


async def _events(parts: AsyncIterator[Part]) -> AsyncIterator[str]:
    whole = ""
    try:
        async for part in parts:
            whole += part.raw
            yield json.dumps({"type": "transcript.text.delta", "delta": part.raw})
        yield json.dumps({"type": "transcript.text.done", "text": whole})
    except Exception as error:  # the status is sent already
        yield json.dumps(refusal(error).shape)


def _timed(
    shape: str, written: Written, text: str, said: list[dict[str, Any]], seconds: float
) -> Response:
    """All that is known, or subtitles."""
    mean = sum(written.logprobs) / max(1, len(written.logprobs))
    lines = cues(said, seconds)
    if shape != "verbose_json":
        point, kind = (",", "application/x-subrip") if shape == "srt" else (".", "text/vtt")
        blocks = [
            f"{number}\n" * (shape == "srt")
            + f"{_clock(cue.start, point)} --> {_clock(cue.end, point)}\n{cue.text}\n\n"
            for number, cue in enumerate(lines, 1)
        ]
        head = "" if shape == "srt" else "WEBVTT\n\n"
        return PlainTextResponse(head + "".join(blocks), media_type=kind)
    segments = [
        {
            "id": number,
            "seek": 0,
            "start": cue.start,
            "end": cue.end,
            "text": cue.text,
            "tokens": list(written.ids) if len(lines) == 1 else [],
            "temperature": 0.0,
            "avg_logprob": mean,
            "compression_ratio": 1.0,
            "no_speech_prob": 0.0,
        }
        for number, cue in enumerate(lines)
    ]
    return JSONResponse(
        {
            "task": "transcribe",
            "language": "unknown",
            "duration": seconds,
            "text": text,
            "confidence": math.exp(mean),
            "segments": segments,
            "words": said,
        }
    )


class Cue(NamedTuple):
    """A line of subtitles; times in seconds."""

    start: float
    end: float
    text: str


def cues(said: Sequence[Mapping[str, Any]], seconds: float) -> list[Cue]:
    """Words as lines of subtitles: a new one behind a pause, and where one would be too long to be
    read. Words without times are one line over the whole sound."""
    if said and "start" not in said[0]:
        return [Cue(0.0, seconds, " ".join(word["word"] for word in said))]
    found: list[Cue] = []
    for word in said:
        end = min(word["end"], seconds)
        last = found[-1] if found else None
        if last is None or (
            word["start"] - last.end > PAUSE_S
            or end - last.start > LONGEST_S
            or len(last.text) + len(word["word"]) >= LETTERS
        ):
            found.append(Cue(word["start"], end, word["word"]))
        else:
            found[-1] = Cue(last.start, end, f"{last.text} {word['word']}")
    return found


def _clock(seconds: float, point: str) -> str:
    thousandths = round(seconds * 1000)
    minutes, rest = divmod(thousandths, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{rest // 1000:02}{point}{rest % 1000:03}"
