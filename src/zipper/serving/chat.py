"""`POST /v1/chat/completions`: parts of messages in, text and sound out.

Zipped models know no roles: the parts of all messages are read in their order, as `zipper run`
would.
"""

import base64
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import FastAPI, Request
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, Response

from zipper.generation import Written
from zipper.serving import bodies, sounds
from zipper.serving.answers import events, peeked
from zipper.serving.refusals import Refused, refusal
from zipper.serving.saying import voice
from zipper.serving.service import Part as Made
from zipper.serving.service import Service
from zipper.serving.worker import Ticket
from zipper.strand import Segment


class Sound(BaseModel):
    """A sound in base64; its format is seen in its content."""

    data: str
    format: str = ""


class Part(BaseModel):
    """A piece of a message: text or sound."""

    type: Literal["text", "input_audio"]
    text: str = ""
    input_audio: Sound | None = None


class Message(BaseModel):
    """A message; who says it is not told to the model."""

    role: str
    content: str | list[Part] | None = None


class Spoken(BaseModel):
    """How sound is to be answered."""

    voice: str | dict[str, Any] = ""
    format: str = "wav"


class Chat(BaseModel):
    """What was said so far and what is wanted."""

    messages: list[Message] = Field(min_length=1)
    model: str = ""
    modalities: list[Literal["text", "audio"]] = Field(["text"], min_length=1, max_length=2)
    audio: Spoken = Spoken()
    stream: bool = False
    temperature: float = Field(0.0, ge=0, le=10)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = 0
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: Literal[1] = 1


def add(app: FastAPI, service: Service) -> None:
    """Adds the route."""

    async def chat(request: Request) -> Response:
        wanted = await bodies.sent(request, Chat, service.caps)
        if wanted.stream and wanted.modalities != ["text"]:
            raise Refused(
                400, "unsupported", 'Only text is streamed here. Send modalities ["text"].'
            )
        given, outputs = _given(service, wanted), _outputs(service, wanted)
        how = service.sampling(wanted.temperature, wanted.top_p, wanted.seed)
        most = wanted.max_completion_tokens or wanted.max_tokens
        limits = {"text": most} if most else None
        ticket = await service.begin(given, outputs, how, limits, wanted.stream)
        about = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": service.name,
        }
        if wanted.stream:
            parts = await peeked(service.parts(request, ticket))
            return events(_chunks(parts, about, ticket))
        written = await service.written(request, ticket)
        answer = await service.apart(lambda: _answer(service, wanted, written))
        tokens = sum(len(one.ids) for one in written)
        read = sum(len(one.content) for one in ticket.request.segments)
        usage = {"prompt_tokens": read, "completion_tokens": tokens, "total_tokens": read + tokens}
        choice = {
            "index": 0,
            "message": answer,
            "finish_reason": _reason(written),
            "logprobs": None,
        }
        return JSONResponse(
            {**about, "object": "chat.completion", "choices": [choice], "usage": usage}
        )

    app.add_api_route(
        "/v1/chat/completions",
        chat,
        methods=["POST"],
        summary="Text and sound in, text and sound out.",
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": Chat.model_json_schema()}},
            }
        },
    )


def _given(service: Service, wanted: Chat) -> list[Segment]:
    found = []
    for message in wanted.messages:
        content = message.content or []
        parts = [Part(type="text", text=content)] if isinstance(content, str) else content
        for part in parts:
            if part.type == "text":
                found.append(Segment("text", part.text))
            elif part.input_audio is None:
                raise Refused(422, "bad_request", "A part of input_audio has no input_audio.")
            else:
                found.append(service.segment("speech", part.input_audio.data, "input_audio.data"))
    if not found:
        raise Refused(422, "empty", "The messages hold nothing. Send a text or a sound.")
    return found


def _outputs(service: Service, wanted: Chat) -> list[str | Segment]:
    """Text before sound, as the paper has it."""
    outputs: list[str | Segment] = ["text"] if "text" in wanted.modalities else []
    if "audio" in wanted.modalities:
        sounds.check_format(wanted.audio.format)
        outputs.append(voice(service, wanted.audio.voice))
    return outputs


def _answer(service: Service, wanted: Chat, written: list[Written]) -> dict[str, Any]:
    """The message: as clients know it, what is said in a sound stands beside it, not for itself."""
    text: str | None = None
    answer: dict[str, Any] = {"role": "assistant", "refusal": None}
    for one in written:
        raw = service.kinds[one.tower].decode(one.ids)
        if one.tower == "text":
            text = raw
        else:
            content = sounds.content(raw, wanted.audio.format) if len(raw.samples) else b""
            answer["audio"] = {
                "id": f"audio-{secrets.token_hex(12)}",
                "data": base64.b64encode(content).decode(),
                "transcript": text or "",
                "expires_at": int(time.time()),
            }
    return {**answer, "content": None if "audio" in answer else text}


def _reason(written: list[Written]) -> str:
    return "stop" if all(one.stop == "end" for one in written) else "length"


async def _chunks(
    parts: AsyncIterator[Made], about: dict[str, Any], ticket: Ticket
) -> AsyncIterator[str]:
    def chunk(delta: dict[str, str], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return json.dumps({**about, "object": "chat.completion.chunk", "choices": [choice]})

    try:
        yield chunk({"role": "assistant", "content": ""})
        async for part in parts:
            yield chunk({"content": part.raw})
        yield chunk({}, _reason(await ticket.done))
    except Exception as error:  # the status is sent already
        yield json.dumps(refusal(error).shape)
