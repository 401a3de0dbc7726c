"""One model that is served: from what a client gave to what the engine reads, and back. Knows the
pipeline and the worker, and of the web only whether somebody still listens.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, final

from fastapi import Request as Asked

from zipper.audio.sound import Audio
from zipper.generation import Limits, Request, Written, planned
from zipper.modality import whole
from zipper.modality.speech import SpeechUnits
from zipper.pipeline import Pipeline
from zipper.sampling import Sampling
from zipper.serving.bodies import Caps, decoded
from zipper.serving.refusals import Refused
from zipper.serving.worker import Ticket, Worker
from zipper.strand import Segment
from zipper.tasks import among

READERS = 2  # that turn sound into ids at once: each may hold a whole decoded sound

#: What an object that came in JSON may hold: values, never places.
PLAIN = frozenset({"values", "rate_hz", "channels", "units"})

Found = TypeVar("Found")


@final
class Service:
    """A pipeline, the worker that runs it, and what a request may cost. name: of the model, for
    clients."""

    def __init__(self, pipeline: Pipeline, worker: Worker, caps: Caps, name: str) -> None:
        self.pipeline, self.worker, self.caps, self.name = pipeline, worker, caps, name
        self.kinds = {name: whole(modality) for name, modality in pipeline.modalities.items()}
        self._readers = ThreadPoolExecutor(READERS, "zipper-reader")

    async def apart(self, work: Callable[[], Found]) -> Found:
        """What `work` returns, made on another thread, while others are answered."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, work)

    @property
    def voices(self) -> Sequence[str]:
        """Names of voices, of a model that speaks."""
        speech: Any = self.pipeline.modalities.get("speech")
        return speech.voices if isinstance(speech, SpeechUnits) else ()

    def sampling(self, temperature: float, top_p: float, seed: int) -> Sampling:
        """How tokens are drawn; at temperature 0 none are, and the rest says nothing."""
        return Sampling(temperature, 0, top_p, seed) if temperature else Sampling()

    def segment(self, tower: str, content: Any, where: str) -> Segment:
        """A segment that came in JSON: a string is the content of a file in base64 where its
        modality is made of files. Raises Refused for what names a place: none is opened."""
        kind = self.kinds.get(tower)
        if kind is None:
            raise self._unknown(tower)
        if kind.suffix and isinstance(content, str):
            return Segment(tower, decoded(content, where))
        if isinstance(content, Mapping) and not content.keys() <= PLAIN:
            raise Refused(
                422,
                "bad_request",
                f"{where} holds {sorted(content.keys() - PLAIN)!s:.80}; of an object only "
                f"{', '.join(sorted(PLAIN))} are read, nothing is opened.",
            )
        return Segment(tower, content)

    async def begin(
        self,
        given: Sequence[Segment],
        outputs: Sequence[str | Segment],
        sampling: Sampling | None = None,
        limits: Limits | None = None,
        streams: bool = False,
    ) -> Ticket:
        """Has a request run. given: raw, sound as the bytes of a file. Raises Refused for more than
        it may cost, Busy, Stopping, and a ZipperError for what cannot be read."""
        self._check(given, outputs, limits)
        self.worker.enter()
        try:
            asked, seconds = await self.apart(lambda: self._asked(given, outputs, sampling, limits))
        except BaseException:
            self.worker.leave()
            raise
        ticket = (
            self._silent(outputs, streams) if asked is None else self.worker.submit(asked, streams)
        )
        ticket.seconds = seconds
        return ticket

    async def written(self, request: Asked, ticket: Ticket) -> list[Written]:
        """What was written in the end. Where the client leaves before, its row is free at once."""
        gone = asyncio.ensure_future(left(request))
        both: set[asyncio.Future[Any]] = {ticket.done, gone}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not ticket.done.done():
                raise Refused(499, "gone", "The client has left.")
            return ticket.done.result()
        finally:
            gone.cancel()
            ticket.cancel()

    async def parts(self, request: Asked, ticket: Ticket) -> AsyncIterator[Any]:
        """The first segment that is produced, raw and in parts, while it is made. Raises what went
        wrong."""
        loop, told = asyncio.get_running_loop(), asyncio.Queue[Any]()
        kind = self.kinds[planned(ticket.request.outputs)[0].tower]

        def say(part: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(told.put_nowait, part)

        def speak() -> None:
            tokens = iter(ticket.tokens.get, None)
            try:
                for part in kind.stream(token.id for token in tokens if token.segment == 0):
                    say(part)
            except Exception as error:
                say(error)
            say(None)

        gone = asyncio.ensure_future(left(request))
        gone.add_done_callback(lambda _: ticket.cancel())
        # a thread of its own: it waits for tokens, and a pool that is full of such would stand
        threading.Thread(target=speak, name="zipper-stream", daemon=True).start()
        try:
            while (part := await told.get()) is not None:
                if isinstance(part, Exception):
                    raise part
                yield part
            if not ticket.gone:
                await ticket.done
        finally:
            ticket.cancel()
            gone.cancel()

    def _check(
        self,
        given: Sequence[Segment],
        outputs: Sequence[str | Segment],
        limits: Limits | None,
    ) -> None:
        plan = planned(outputs)
        if limits and max(limits.values()) > self.caps.tokens:
            raise Refused(
                422,
                "too_many_tokens",
                f"A limit of {max(limits.values()):,} tokens was given; at most "
                f"{self.caps.tokens:,} are produced a segment.",
            )
        if max(len(given), len(plan)) > self.caps.segments:
            raise Refused(
                422,
                "too_many_segments",
                f"{len(given)} segments were given and {len(plan)} asked for; at most "
                f"{self.caps.segments} of each are taken.",
            )
        for segment in [*given, *plan]:
            for tower in among(segment.tower) or (segment.tower,):
                if tower not in self.kinds and tower != "*":
                    raise self._unknown(tower)
            if isinstance(segment.content, str) and len(segment.content) > self.caps.letters:
                raise Refused(
                    413,
                    "too_long",
                    f"{len(segment.content):,} letters were given, at most {self.caps.letters:,} "
                    "are read at a time.",
                )

    def _asked(
        self,
        given: Sequence[Segment],
        outputs: Sequence[str | Segment],
        sampling: Sampling | None,
        limits: Limits | None,
    ) -> tuple[Request | None, float]:
        """The request of ids, None where nothing is said; and how much sound was given."""
        read = [Segment(one.tower, self._read(one)) for one in given]
        seconds = sum((one.content.seconds for one in read if isinstance(one.content, Audio)), 0.0)
        if seconds > self.caps.seconds:
            raise Refused(
                413,
                "too_long",
                f"{seconds:.1f} s of sound were given, at most {self.caps.seconds:g} s are heard "
                "at a time.",
            )
        return self.pipeline.asked(read, outputs, sampling, limits), seconds

    def _unknown(self, tower: str) -> Refused:
        known = ", ".join(self.kinds)
        return Refused(
            422, "no_such_modality", f"This model has no modality {tower!r:.80}; it has {known}."
        )

    def _read(self, segment: Segment) -> Any:
        content = segment.content
        if isinstance(content, str | Path) and self.kinds[segment.tower].suffix:
            raise Refused(422, "bad_request", "A path was given; nothing is opened here.")
        return self.kinds[segment.tower].read(content) if isinstance(content, bytes) else content

    def _silent(self, outputs: Sequence[str | Segment], streams: bool) -> Ticket:
        """The answer where nothing was said: nothing."""
        self.worker.leave()
        ticket = Ticket(Request([], outputs), streams)
        ticket.settle(
            [
                Written(one.tower, [], 0, stop="end")
                for one in planned(outputs)
                if not among(one.tower)
            ]
        )
        return ticket


async def left(request: Asked) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
