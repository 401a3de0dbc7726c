"""How answers that come in parts are sent."""

from collections.abc import AsyncIterator
from typing import TypeVar

from starlette.responses import StreamingResponse

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
