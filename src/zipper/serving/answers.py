"""How what was produced is told, and how answers that come in parts are sent."""

import base64
import mimetypes
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeVar

from starlette.responses import StreamingResponse

from zipper.audio.sound import Audio
from zipper.generation import Written
from zipper.modality.kind import Kind
from zipper.serving import sounds
from zipper.serving.service import Part as Made
from zipper.serving.service import Service

Part = TypeVar("Part")


async def peeked(parts: AsyncIterator[Part]) -> AsyncIterator[Part]:
    """The same parts, the first of which is there: what goes wrong before it is an error with a
    status of its own."""
    missing = object()
    first = await anext(parts, missing)

    async def all_of_them() -> AsyncIterator[Part]:
        if first is not missing:
            yield first  # type: ignore[misc]
            async for part in parts:
                yield part

    return all_of_them()


def events(lines: AsyncIterator[str]) -> StreamingResponse:
    """Server-sent events, an end behind them."""

    async def framed() -> AsyncIterator[str]:
        async for line in lines:
            yield f"data: {line}\n\n"
        yield "data: [DONE]\n\n"

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(framed(), media_type="text/event-stream", headers=headers)


def piece(service: Service, part: Made) -> dict[str, Any]:
    """A part as JSON; sound as samples, for a file is whole."""
    where = {"segment": part.segment, "tower": part.tower}
    if isinstance(part.raw, Audio):
        content = base64.b64encode(sounds.pcm(part.raw)).decode()
        return {**where, "content": content, "media_type": sounds.media("pcm", part.raw.rate_hz)}
    return {**where, **_shown(service.kinds[part.tower], part.raw)}


def told(service: Service, written: Written) -> dict[str, Any]:
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
