"""`POST /v1/audio/speech`: a text in, sound out, while it is made where the format allows it."""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, Field
from starlette.responses import Response, StreamingResponse

from zipper.serving import bodies, sounds
from zipper.serving.answers import peeked
from zipper.serving.refusals import Refused
from zipper.serving.service import Part, Service
from zipper.strand import Segment

#: Names of a voice that leave it to the model.
ANY = ("", "any", "auto", "default")


class Speech(BaseModel):
    """What is to be said, how."""

    input: str
    model: str = ""
    voice: str | dict[str, Any] = ""
    response_format: str = "mp3"
    speed: float = 1.0
    instructions: str = ""
    stream_format: str = "audio"
    temperature: float = Field(0.0, ge=0, le=10)
    seed: int = 0


def add(app: FastAPI, service: Service) -> None:
    """Adds the route."""

    async def speak(request: Request) -> Response:
        wanted = await bodies.sent(request, Speech, service.caps)
        sounds.check_format(wanted.response_format)
        if service.kind("text").says_nothing(wanted.input):
            raise Refused(422, "empty", "The input is empty. Send a text to say.")
        for name, plain in ("speed", 1.0), ("instructions", ""), ("stream_format", "audio"):
            if getattr(wanted, name) != plain:
                raise Refused(
                    400, "unsupported", f"{name} is not known to this model; leave it out."
                )
        given, outputs = [Segment("text", wanted.input)], [voice(service, wanted.voice)]
        how = service.sampling(wanted.temperature, 1.0, wanted.seed)
        streams = wanted.response_format in sounds.STREAMED
        ticket = await service.begin(given, outputs, how, streams=streams)
        if not streams:
            (written,) = await service.written(request, ticket)
            units = service.pipeline.units

            def made() -> tuple[bytes, int]:
                sound = units.decode(written.ids)
                return sounds.content(sound, wanted.response_format), sound.rate_hz

            content, rate_hz = await service.apart(made)
            return Response(content, media_type=sounds.media(wanted.response_format, rate_hz))
        parts = await peeked(service.parts(request, ticket))
        rate_hz = service.pipeline.units.config.mel.rate_hz
        return StreamingResponse(
            _bytes(parts, wanted.response_format, rate_hz),
            media_type=sounds.media(wanted.response_format, rate_hz),
        )

    app.add_api_route(
        "/v1/audio/speech",
        speak,
        methods=["POST"],
        summary="A text as sound.",
        response_class=Response,
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": Speech.model_json_schema()}},
            }
        },
    )


def voice(service: Service, name: str | dict[str, Any]) -> str | Segment:
    """The output for a voice. Raises Refused for one that this model has not."""
    known = service.pipeline.units.voices
    name = str(name.get("id", "")) if isinstance(name, dict) else name
    if name not in known and name not in ANY:
        raise Refused(
            400,
            "no_such_voice",
            f"This model has no voice {name!r:.40}. Take one of {', '.join([*known, 'default'])}.",
        )
    return service.pipeline.voice(None if name in ANY else name)


async def _bytes(parts: AsyncIterator[Part], name: str, rate_hz: int) -> AsyncIterator[bytes]:
    if name != "pcm":
        yield sounds.header(rate_hz)
    async for part in parts:
        yield sounds.pcm(part.raw)
