"""`POST /v1/chat/completions`: parts of messages in, text, sound and other modalities out.

Zipped models know no roles: the parts of all messages are read in their order, as `zipper run`
would.
"""

import base64
import json
import secrets
import time
from bisect import bisect_left
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Literal

from fastapi import FastAPI, Request
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, Response

from zipper.audio.sound import Audio
from zipper.generation import Written
from zipper.serving import bodies, sounds
from zipper.serving.answers import events, peeked, piece, told
from zipper.serving.refusals import Refused, refusal
from zipper.serving.saying import voice
from zipper.serving.service import Part as Made
from zipper.serving.service import Service
from zipper.serving.worker import Ticket
from zipper.strand import Segment

RAW = "pcm16"  # as clients of chat call samples of 16 bits
MOST_STOPS = 4


class Sound(BaseModel):
    """A sound in base64; its format is seen in its content."""

    data: str
    format: str = ""


class Picture(BaseModel):
    """A picture as the URL `data:image/png;base64,...`; no other URL is opened."""

    url: str
    detail: str = ""


class Whole(BaseModel):
    """A segment of any modality; content as in `/v1/run`: a file in base64, a value or ids."""

    tower: str
    content: str | list[Any] | dict[str, Any]


class Part(BaseModel):
    """A piece of a message: text, sound, a picture, or a segment of any modality."""

    type: Literal["text", "input_audio", "image_url", "segment"]
    text: str = ""
    input_audio: Sound | None = None
    image_url: Picture | None = None
    segment: Whole | None = None


class Message(BaseModel):
    """A message; who says it is not told to the model."""

    role: str
    content: str | list[Part] | None = None


class Spoken(BaseModel):
    """How sound is to be answered."""

    voice: str | dict[str, Any] = ""
    format: str = "wav"


#: What changes an answer where it is sent, and is done by none of these models; and the values,
#: beside none, 0 and what is empty, that change nothing.
UNKNOWN: dict[str, tuple[Any, ...]] = dict.fromkeys(
    "tools functions logit_bias presence_penalty frequency_penalty min_p limits prediction".split(),
    (),
) | {
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "repetition_penalty": (1,),
    "guidance": (1,),
    "best_of": (1,),
    "top_k": (-1,),
}


class Chat(BaseModel, extra="allow"):
    """What was said so far and what is wanted. modalities: text, audio, and what the plan of
    `/v1/run` may name: another tower, "text + image", "*". stop: text ends before any of these.
    top_logprobs: only 1, and only of the likeliest words, which are those that are written."""

    messages: list[Message] = Field(min_length=1)
    model: str = ""
    modalities: list[str] = Field(["text"], min_length=1, max_length=16)
    audio: Spoken = Spoken()
    stream: bool = False
    temperature: float = Field(0.0, ge=0, le=10)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = 0
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    n: Literal[1] = 1

    @property
    def stops(self) -> list[str]:
        """Where text ends."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


def add(app: FastAPI, service: Service) -> None:
    """Adds the route."""

    async def chat(request: Request) -> Response:
        wanted = await bodies.sent(request, Chat, service.caps)
        _check(wanted)
        given, outputs = _given(service, wanted), _outputs(service, wanted)
        how = service.sampling(wanted.temperature, wanted.top_p, wanted.seed)
        most = wanted.max_completion_tokens or wanted.max_tokens
        limits = {"text": most} if most else None
        streams = wanted.stream or bool(wanted.stops)
        ticket = await service.begin(given, outputs, how, limits, streams)
        about = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": service.name,
        }
        if wanted.stream:
            parts = await peeked(_parts(service, wanted, request, ticket))
            return events(_chunks(service, wanted, parts, about, ticket))
        if wanted.stops:
            async for _ in _parts(service, wanted, request, ticket):
                pass  # until it stops
        written = _ended(service, wanted, await service.written(request, ticket))
        answer = await service.apart(lambda: _answer(service, wanted, written))
        tokens = sum(len(one.ids) for one in written)
        read = sum(len(one.content) for one in ticket.request.segments)
        usage = {"prompt_tokens": read, "completion_tokens": tokens, "total_tokens": read + tokens}
        choice = {
            "index": 0,
            "message": answer,
            "finish_reason": _reason(written),
            "logprobs": _logprobs(service, wanted, written),
        }
        return JSONResponse(
            {**about, "object": "chat.completion", "choices": [choice], "usage": usage}
        )

    app.add_api_route(
        "/v1/chat/completions",
        chat,
        methods=["POST"],
        summary="Parts of messages of any modality in, text, sound and others out.",
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": Chat.model_json_schema()}},
            }
        },
    )


def _check(wanted: Chat) -> None:
    """Raises Refused for what does not go together, or cannot be done."""
    for name, plain in UNKNOWN.items():
        value = (wanted.model_extra or {}).get(name)
        if value and value not in plain:
            raise Refused(400, "unsupported", f"{name} is not known to this model; leave it out.")
    if wanted.stops and (
        wanted.modalities != ["text"] or len(wanted.stops) > MOST_STOPS or "" in wanted.stops
    ):
        raise Refused(
            400,
            "unsupported",
            f'stop takes up to {MOST_STOPS} strings that are not empty, with modalities ["text"]: '
            "what else is made would go on from the text behind them.",
        )
    if wanted.top_logprobs and (
        not wanted.logprobs or wanted.top_logprobs > 1 or wanted.temperature
    ):
        raise Refused(
            400,
            "unsupported",
            "The log-probability of what was written is told, not of what might have been. Send "
            "logprobs true, temperature 0 and top_logprobs 0 or 1.",
        )
    if "audio" in wanted.modalities:
        name = wanted.audio.format
        if not wanted.stream and name != RAW:
            sounds.check_format(name)
        elif name != RAW and wanted.stream:
            raise Refused(
                400, "unsupported_format", f'Sound is streamed as {RAW}: send audio.format "{RAW}".'
            )


def _given(service: Service, wanted: Chat) -> list[Segment]:
    found = []
    for message in wanted.messages:
        content = message.content or []
        parts = [Part(type="text", text=content)] if isinstance(content, str) else content
        found += [_segment(service, part) for part in parts]
    if not found:
        raise Refused(422, "empty", "The messages hold nothing. Send a text or a sound.")
    return found


def _segment(service: Service, part: Part) -> Segment:
    if part.type == "text":
        return Segment("text", part.text)
    if part.input_audio is not None and part.type == "input_audio":
        return service.segment("speech", part.input_audio.data, "input_audio.data")
    if part.image_url is not None and part.type == "image_url":
        tower = next(
            (name for name, kind in service.kinds.items() if kind.name == "image"), "image"
        )
        head, _, content = part.image_url.url.partition(";base64,")
        if not head.startswith("data:image/"):
            raise Refused(
                422,
                "bad_request",
                "image_url.url is no data:image/...;base64,... URL; no other is opened.",
            )
        return service.segment(tower, content, "image_url.url")
    if part.segment is not None and part.type == "segment":
        return service.segment(part.segment.tower, part.segment.content, "segment.content")
    raise Refused(422, "bad_request", f"A part of {part.type} has no {part.type}.")


def _outputs(service: Service, wanted: Chat) -> list[str | Segment]:
    """In their order; of text and sound alone the text first, as the paper has it."""
    names = wanted.modalities
    names = sorted(names, key="audio".__eq__) if _plain(wanted) else names
    return [voice(service, wanted.audio.voice) if name == "audio" else name for name in names]


def _plain(wanted: Chat) -> bool:
    """Whether all that is wanted has a place of its own in a message."""
    names = wanted.modalities
    return {*names} <= {"text", "audio"} and len({*names}) == len(names)


def _answer(service: Service, wanted: Chat, written: list[Written]) -> dict[str, Any]:
    """The message: as clients know it, what is said in a sound stands beside it, not for itself.
    Where other modalities are wanted, all that was produced are `segments`, as `/v1/run` has it."""
    answer: dict[str, Any] = {"role": "assistant", "refusal": None, "content": None}
    if not _plain(wanted):
        return {**answer, "segments": [told(service, one) for one in written]}
    text: str | None = None
    for one in written:
        raw = service.kinds[one.tower].decode(one.ids)
        if one.tower == "text":
            text = _cut(raw, wanted.stops)
        else:
            name = "pcm" if wanted.audio.format == RAW else wanted.audio.format
            content = sounds.content(raw, name) if len(raw.samples) else b""
            answer["audio"] = _sound(content, text or "")
    return {**answer, "content": None if "audio" in answer else text}


def _sound(content: bytes, transcript: str) -> dict[str, Any]:
    return {
        "id": f"audio-{secrets.token_hex(12)}",
        "data": base64.b64encode(content).decode(),
        "transcript": transcript,
        "expires_at": int(time.time()),
    }


def _reason(written: list[Written]) -> str:
    return "stop" if all(one.stop == "end" for one in written) else "length"


# --- stop strings


def _cut(text: str, stops: Sequence[str]) -> str:
    """Text before the first stop."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def _held(text: str, stops: Sequence[str]) -> int:
    """How much at its end may be the beginning of a stop."""
    most = min(len(text), max(map(len, stops), default=1) - 1)
    ends = (n for n in range(most, 0, -1) if any(stop.startswith(text[-n:]) for stop in stops))
    return next(ends, 0)


async def _parts(
    service: Service, wanted: Chat, request: Request, ticket: Ticket
) -> AsyncGenerator[Made, None]:
    """What is produced, in parts, up to a stop: then its row is free."""
    text, sent = "", 0
    async with aclosing(service.parts(request, ticket)) as parts:
        async for part in parts:
            if not wanted.stops:
                yield part
                continue
            text += part.raw
            whole = _cut(text, wanted.stops)
            over = len(whole) < len(text)
            safe = len(whole) if over else len(text) - _held(text, wanted.stops)
            if safe > sent:
                yield part._replace(raw=text[sent:safe])
                sent = safe
            if over:
                ticket.cancel()
                return
        if len(text) > sent:
            yield part._replace(raw=text[sent:])


def _ended(service: Service, wanted: Chat, written: list[Written]) -> list[Written]:
    """What was written as far as it counts: up to the token that made a stop whole, wherever the
    engine was when that was seen."""
    if not wanted.stops or not written:
        return written
    (one,) = written
    modality = service.kinds[one.tower]
    if _cut(text := modality.decode(one.ids), wanted.stops) == text:
        return written
    # Tokens only add to a text, so the first that is enough can be halved for.
    count = bisect_left(
        range(len(one.ids)),
        True,
        key=lambda n: _cut(said := modality.decode(one.ids[:n]), wanted.stops) != said,
    )
    return [replace(one, ids=one.ids[:count], logprobs=one.logprobs[:count], stop="end")]


def _logprobs(service: Service, wanted: Chat, written: list[Written]) -> dict[str, Any] | None:
    """Log-probabilities of the tokens of text that were written."""
    if not wanted.logprobs:
        return None
    found = []
    for one in written:
        for id, logprob in zip(one.ids[one.forced :], one.logprobs, strict=False):
            if one.tower == "text":
                token = service.kinds[one.tower].decode([id])
                entry = {"token": token, "logprob": logprob, "bytes": [*token.encode()]}
                best = [entry] if wanted.top_logprobs else []
                found.append({**entry, "top_logprobs": best})
    return {"content": found, "refusal": None}


async def _chunks(
    service: Service,
    wanted: Chat,
    parts: AsyncIterator[Made],
    about: dict[str, Any],
    ticket: Ticket,
) -> AsyncIterator[str]:
    """Log-probabilities come with the last of them, which says why it ended."""
    named = f"audio-{secrets.token_hex(12)}"

    def chunk(delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
        return json.dumps({**about, "object": "chat.completion.chunk", "choices": [choice]})

    def delta(part: Made) -> dict[str, Any]:
        if not _plain(wanted):
            return {"segments": [piece(service, part)]}
        if isinstance(part.raw, Audio):
            data = base64.b64encode(sounds.pcm(part.raw)).decode()
            return {"audio": {"id": named, "data": data}}
        if "audio" in wanted.modalities:
            return {"audio": {"id": named, "transcript": part.raw}}
        return {"content": part.raw}

    try:
        yield chunk({"role": "assistant", "content": ""})
        async for part in parts:
            yield chunk(await service.apart(lambda part=part: delta(part)))  # type: ignore[misc]
        written = _ended(service, wanted, await ticket.done)
        yield chunk({}, _reason(written), _logprobs(service, wanted, written))
    except Exception as error:  # the status is sent already
        yield json.dumps(refusal(error).shape)
