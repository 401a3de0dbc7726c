"""`/v1/realtime`: sound in as it is spoken, words and sound out as they are made, over a WebSocket,
in the events that clients of realtime services send and read.

A conversation is a row of items; a response reads those that came since the last one, for zipped
models know no roles and have room for little more. What was committed is encoded as a whole, so
that it is heard as a file of it would be.
"""

import asyncio
import base64
import json
import secrets
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Annotated, Any, Literal, final

import numpy as np
from fastapi import FastAPI
from pydantic import BaseModel, Field, ValidationError
from starlette.websockets import WebSocket, WebSocketDisconnect

from zipper.audio.sound import Audio
from zipper.environment import extra
from zipper.serving import bodies, sounds
from zipper.serving.refusals import Refused, refusal
from zipper.serving.saying import voice
from zipper.serving.service import Service
from zipper.strand import Segment

RATE_HZ: Literal[24_000] = 24_000  # of samples in and out: what these clients send and play
AT_ONCE = 4  # transcriptions of one client that run
Event = dict[str, Any]


class Format(BaseModel):
    """Of samples: the one that is spoken here."""

    type: Literal["audio/pcm"] = "audio/pcm"
    rate: Literal[24_000] = RATE_HZ


class Input(BaseModel):
    """How sound comes. transcription: anything, to have it written down. turn_detection: none."""

    format: Format = Format()
    transcription: dict[str, Any] | None = None
    turn_detection: None = None


class Output(BaseModel):
    """How sound goes."""

    format: Format = Format()
    voice: str | dict[str, Any] = ""


class Sound(BaseModel):
    """Both."""

    input: Input = Input()
    output: Output = Output()


class Session(BaseModel):
    """What a client may set."""

    type: Literal["realtime", "transcription"] = "realtime"
    output_modalities: list[Literal["text", "audio"]] = Field(
        default=["audio"], min_length=1, max_length=1
    )
    audio: Sound = Sound()
    max_output_tokens: Annotated[int, Field(ge=1)] | Literal["inf"] = "inf"


class Response(BaseModel):
    """What a client may ask of one response; what it leaves out is the session's."""

    output_modalities: list[Literal["text", "audio"]] | None = Field(None, max_length=1)
    audio: Sound | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | Literal["inf"] | None = None
    metadata: dict[str, str] | None = None


class Said(BaseModel):
    """A piece of an item."""

    type: Literal["input_text", "input_audio"]
    text: str = ""
    audio: str = ""


class Item(BaseModel):
    """An item that a client adds."""

    type: Literal["message"] = "message"
    role: str = "user"
    id: str = ""
    content: list[Said] = Field(min_length=1, max_length=16)


def add(app: FastAPI, service: Service) -> None:
    """Adds the route."""

    async def realtime(socket: WebSocket) -> None:
        await socket.accept("realtime" if "realtime" in socket.scope["subprotocols"] else None)
        with suppress(WebSocketDisconnect, TimeoutError):
            await _Talk(service, socket).run()
        with suppress(RuntimeError):  # it is closed already
            await socket.close()

    app.add_api_websocket_route("/v1/realtime", realtime)


@dataclass
class _Line:
    """Somebody at the other end, as `service.left` asks for it."""

    over: asyncio.Event = field(default_factory=asyncio.Event)

    async def receive(self) -> dict[str, str]:
        await self.over.wait()
        return {"type": "http.disconnect"}


@final
class _Talk:
    """One client. Events are answered in their order; what takes time runs beside."""

    def __init__(self, service: Service, socket: WebSocket) -> None:
        self._service, self._socket = service, socket
        self._share = socket.scope[bodies.SHARE]
        self._sending = asyncio.Lock()
        self._session, self._id = Session(), _id("sess")
        self._heard: list[bytes] = []
        self._items: list[Segment] = []  # those that no response has read
        self._tasks: dict[asyncio.Task[None], list[Segment]] = {}  # and what each reads
        self._response: asyncio.Task[None] | None = None
        self._line = _Line()
        self._answers = {
            "session.update": self._update,
            "input_audio_buffer.append": self._append,
            "input_audio_buffer.clear": self._clear,
            "input_audio_buffer.commit": self._commit,
            "conversation.item.create": self._create,
            "response.create": self._respond,
            "response.cancel": self._cancel,
        }

    async def run(self) -> None:
        """Until the client leaves, or says nothing for too long while nothing is made for it."""
        await self._send("session.created", session=self._told())
        try:
            while True:
                try:
                    async with asyncio.timeout(self._service.caps.idle_s):
                        text = await self._socket.receive_text()
                except TimeoutError:
                    if self._tasks:
                        continue
                    raise
                await self._answer(text)
        except KeyError:  # bytes came instead of text
            await self._socket.close(1003)
        finally:
            self._line.over.set()
            for task in [*self._tasks]:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _answer(self, text: str) -> None:
        event: Any = None
        try:
            event = _read(text)
            answer = self._answers.get(event["type"])
            if answer is None:
                known = ", ".join(self._answers)
                raise Refused(
                    400, "unknown_event", f"{event['type']!r:.80} is not known here; {known} are."
                )
            await answer(event)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False, include_context=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            await self._tell(Refused(422, "bad_request", f"{where}: {first['msg']}."), event)
        except (WebSocketDisconnect, TimeoutError):
            raise
        except Exception as error:
            await self._tell(error, event)

    # --- what a client may say

    async def _update(self, event: Event) -> None:
        wanted = _merged(self._session.model_dump(), event.get("session"))
        session = Session.model_validate(wanted)
        if "audio" in session.output_modalities:  # a voice that is not there is refused now
            voice(self._service, session.audio.output.voice)
        self._session = session
        await self._send("session.updated", session=self._told())

    async def _append(self, event: Event) -> None:
        content = bodies.decoded(_text(event, "audio"), "audio")
        most = self._service.caps.seconds * RATE_HZ * 2
        if sum(map(len, self._heard)) + len(content) > most:
            raise Refused(
                413,
                "too_long",
                f"More than {self._service.caps.seconds:g} s of sound lie here. Commit or clear.",
            )
        self._share.take(len(content))
        self._heard.append(content)

    async def _clear(self, event: Event) -> None:
        self._heard.clear()
        self._account()
        await self._send("input_audio_buffer.cleared")

    async def _commit(self, event: Event) -> None:
        content = b"".join(self._heard)
        if len(content) < 2:
            raise Refused(
                400, "input_audio_buffer_commit_empty", "There is no sound to commit. Append some."
            )
        sound, item = _sound(content), _id("item")
        transcribed = self._session.audio.input.transcription is not None
        if transcribed and len(self._tasks) >= AT_ONCE:
            raise Refused(429, "busy", "Wait until what you committed before is written down.")
        if self._session.type == "realtime":
            self._note(Segment("speech", sound))
        self._heard.clear()
        self._account()
        await self._send("input_audio_buffer.committed", item_id=item, previous_item_id=None)
        await self._added(item, "user", {"type": "input_audio", "transcript": None})
        if transcribed:
            self._begin(self._transcribe(item, sound), [Segment("speech", sound)])

    async def _create(self, event: Event) -> None:
        item = Item.model_validate(event.get("item"))
        found = []
        for part in item.content:
            if part.type == "input_text":
                found.append(Segment("text", part.text))
            else:
                found.append(Segment("speech", _sound(bodies.decoded(part.audio, "audio"))))
        self._note(*found)
        content = [{"type": part.type, "text": part.text} for part in item.content]
        await self._added(item.id or _id("item"), item.role, *content)

    async def _respond(self, event: Event) -> None:
        if self._response is not None and not self._response.done():
            raise Refused(
                409,
                "conversation_already_has_active_response",
                "A response is being made. Wait for response.done, or cancel it.",
            )
        wanted = Response.model_validate(event.get("response") or {})
        if not self._items:
            raise Refused(400, "empty", "Nothing was said since the last response. Say something.")
        given, self._items = self._items, []
        self._response = self._begin(self._make(wanted, given), given)
        await asyncio.sleep(0)  # it has begun, and can tell that it was cancelled

    async def _cancel(self, event: Event) -> None:
        if self._response is None or self._response.done():
            raise Refused(400, "response_cancel_not_active", "No response is being made.")
        self._response.cancel()

    # --- what takes time

    async def _transcribe(self, item: str, sound: Audio) -> None:
        place = {"item_id": item, "content_index": 0}
        name, whole = "conversation.item.input_audio_transcription", ""
        try:
            ticket = await self._service.begin([Segment("speech", sound)], ["text"], streams=True)
            async for part in self._service.parts(self._line, ticket):
                whole += part.raw
                await self._send(f"{name}.delta", **place, delta=part.raw)
            usage = {"type": "duration", "seconds": round(ticket.seconds, 3)}
            await self._send(f"{name}.completed", **place, transcript=whole, usage=usage)
        except Exception as error:
            await self._send(f"{name}.failed", **place, error=refusal(error).shape["error"])

    async def _make(self, wanted: Response, given: list[Segment]) -> None:
        """One response, with all the events around it."""
        session = self._session
        (modality,) = wanted.output_modalities or session.output_modalities
        most = wanted.max_output_tokens or session.max_output_tokens
        told: Event = {
            "id": _id("resp"),
            "object": "realtime.response",
            "status": "in_progress",
            "output": [],
            "output_modalities": [modality],
            "metadata": wanted.metadata,
        }
        item: Event = {"id": _id("item"), "object": "realtime.item", "type": "message"}
        item |= {"role": "assistant", "status": "in_progress", "content": []}
        place = {"response_id": told["id"], "item_id": item["id"]}
        place |= {"output_index": 0, "content_index": 0}
        ticket = None
        try:
            await self._send("response.created", response=told)
            own = wanted.model_dump(include={"audio"}, exclude_unset=True).get("audio") or {}
            audio = Sound.model_validate(_merged(session.audio.model_dump(), own))
            spoken = modality == "audio"
            output = voice(self._service, audio.output.voice) if spoken else "text"
            limits = None if most == "inf" else {"speech" if spoken else "text": int(most)}
            ticket = await self._service.begin(given, [output], limits=limits, streams=True)
            await self._send(
                "response.output_item.added",
                response_id=told["id"],
                output_index=0,
                item=item,
            )
            part = {"type": "audio", "transcript": ""} if spoken else {"type": "text", "text": ""}
            await self._send("response.content_part.added", **place, part=part)
            name = f"response.output_{modality}"
            async for content in self._contents(ticket, spoken):
                await self._send(f"{name}.delta", **place, delta=content)
                part |= {} if spoken else {"text": part["text"] + content}
            await self._send(f"{name}.done", **place, **({} if spoken else {"text": part["text"]}))
            await self._send("response.content_part.done", **place, part=part)
            item |= {"status": "completed", "content": [_kept(part)]}
            await self._send(
                "response.output_item.done", response_id=told["id"], output_index=0, item=item
            )
            (written,) = ticket.done.result()
            read = sum(len(one.content) for one in ticket.request.segments)
            tokens = {"input_tokens": read, "output_tokens": len(written.ids)}
            tokens["total_tokens"] = sum(tokens.values())
            ended: Event = {"status": "completed" if written.stop == "end" else "incomplete"}
            told |= {**ended, "output": [item], "usage": tokens}
        except asyncio.CancelledError:
            if self._line.over.is_set():
                raise
            told |= {"status": "cancelled", "status_details": {"type": "cancelled"}}
        except Exception as error:
            if ticket is None:  # nothing was made of it: it may be asked for again
                self._items = [*given, *self._items]
            details = {"type": "failed", "error": refusal(error).shape["error"]}
            told |= {"status": "failed", "status_details": details}
        finally:
            if ticket is not None:
                ticket.cancel()
        await self._send("response.done", response=told)

    async def _contents(self, ticket: Any, spoken: bool) -> AsyncIterator[str]:
        """Text, or samples in base64 at the clients' rate."""
        stream: Any = None
        async for part in self._service.parts(self._line, ticket):
            if not spoken:
                yield part.raw
                continue
            if stream is None:
                stream = extra("soxr").ResampleStream(part.raw.rate_hz, RATE_HZ, 1, "float32")
            yield _packed(stream.resample_chunk(part.raw.samples))
        if stream is not None:
            yield _packed(stream.resample_chunk(np.zeros(0, np.float32), last=True))

    # --- small things

    def _begin(self, work: Any, read: list[Segment]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks[task] = read
        self._account()
        task.add_done_callback(self._end)
        return task

    def _end(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        self._account()

    def _note(self, *segments: Segment) -> None:
        """All of them or none wait for a response."""
        caps, waiting = self._service.caps, len(self._items)
        if waiting + len(segments) > caps.segments:
            raise Refused(
                422,
                "too_many_segments",
                f"{waiting} items wait for a response and {len(segments)} more came; at most "
                f"{caps.segments} are taken. Ask for one.",
            )
        if sum(sound.seconds for sound in _sounds([*self._items, *segments])) > caps.seconds:
            raise Refused(
                413,
                "too_long",
                f"More than {caps.seconds:g} s of sound would wait for a response. Ask for one.",
            )
        self._share.take(sum(sound.samples.nbytes for sound in _sounds(segments)))
        self._items += segments

    def _account(self) -> None:
        """Holds of the server's memory what lies here and no more."""
        kept = _sounds([*self._items, *chain.from_iterable(self._tasks.values())])
        self._share.keep(sum(map(len, self._heard)) + sum(sound.samples.nbytes for sound in kept))

    async def _added(self, item: str, role: str, *content: Event) -> None:
        told = {"id": item, "object": "realtime.item", "type": "message", "status": "completed"}
        await self._send("conversation.item.added", item=told | {"role": role, "content": content})
        await self._send("conversation.item.done", item=told | {"role": role, "content": content})

    def _told(self) -> Event:
        told = {"id": self._id, "object": "realtime.session", "model": self._service.name}
        return told | self._session.model_dump()

    async def _tell(self, error: Exception, event: Any) -> None:
        shape = refusal(error).shape["error"]
        named = event.get("event_id") if isinstance(event, dict) else None
        await self._send("error", error={**shape, "event_id": named})

    async def _send(self, kind: str, **more: Any) -> None:
        """Raises TimeoutError where the client does not read."""
        event = {"type": kind, "event_id": _id("event"), **more}
        async with self._sending, asyncio.timeout(self._service.caps.stalled_s):
            await self._socket.send_text(json.dumps(event))


def _id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(10)}"


def _read(text: str) -> Event:
    try:
        event = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "bad_json", "An event is no JSON.") from error
    if not isinstance(event, dict) or not isinstance(event.get("type"), str):
        raise Refused(400, "bad_request", "An event is an object with a type.")
    return event


def _text(event: Event, key: str) -> str:
    if not isinstance(event.get(key), str):
        raise Refused(422, "bad_request", f"{key} is no string.")
    return str(event[key])


def _merged(old: Any, new: Any) -> Any:
    """New settings over old ones; of an object only what is named changes."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return old | {key: _merged(old.get(key), value) for key, value in new.items()}


def _sounds(segments: Iterable[Segment]) -> list[Audio]:
    """Those among them, each once."""
    found = {id(one.content): one.content for one in segments if isinstance(one.content, Audio)}
    return [*found.values()]


def _sound(content: bytes) -> Audio:
    whole = content[: len(content) // 2 * 2]
    return Audio(np.frombuffer(whole, "<i2").astype(np.float32) / np.float32(32768), RATE_HZ)


def _packed(samples: Any) -> str:
    return base64.b64encode(sounds.pcm(Audio(samples, RATE_HZ))).decode()


def _kept(part: Event) -> Event:
    return part | {"type": f"output_{part['type']}"}
