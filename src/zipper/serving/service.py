"""One model that is served: from what a client gave to what the engine reads, and back. Knows the
pipeline and the worker, and of the web only whether somebody still listens.
"""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import accumulate, chain, groupby
from operator import itemgetter
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol, TypeVar, final

import torch

from zipper.audio.sound import Audio
from zipper.generation import Limits, Request, Token, Written, planned
from zipper.modality import is_ids, whole
from zipper.modality.kind import Kind
from zipper.modality.speech import SpeechUnits
from zipper.pipeline import Pipeline
from zipper.sampling import Sampling
from zipper.serving.bodies import Caps, decoded
from zipper.serving.looking import Clock, Look, clock, looks
from zipper.serving.refusals import Refused
from zipper.serving.worker import Ticket, Worker
from zipper.strand import Segment
from zipper.tasks import among

READERS = 2  # that turn sound into ids at once: each may hold a whole decoded sound

#: What an object that came in JSON may hold: values, never places.
PLAIN = frozenset({"values", "rate_hz", "channels", "units"})

Found = TypeVar("Found")


class Asked(Protocol):
    """Whoever waits for an answer: a request, or the line that one came by."""

    def receive(self) -> Awaitable[Any]:
        """The next message of ASGI."""


class Part(NamedTuple):
    """A piece of what is produced: of which segment, its tower, raw data."""

    segment: int
    tower: str
    raw: Any


@final
class Service:
    """A pipeline, the worker that runs it, and what a request may cost. name: of the model, for
    clients. sounded: told how many seconds each stream waited for its first sound."""

    def __init__(
        self,
        pipeline: Pipeline,
        worker: Worker,
        caps: Caps,
        name: str,
        sounded: Callable[[float], None] | None = None,
    ) -> None:
        self.pipeline, self.worker, self.caps, self.name = pipeline, worker, caps, name
        self._sounded = sounded
        self.since = int(time.time())
        self.kinds = {name: whole(modality) for name, modality in pipeline.modalities.items()}
        # One processor each: what they do is small, and threads of threads wait for each other.
        alone = partial(torch.set_num_threads, 1)
        self._readers = ThreadPoolExecutor(READERS, "zipper-reader", alone)
        if self.voices:
            pipeline.units.decode([])  # what its codes sound like is found before anybody waits

    async def apart(self, work: Callable[[], Found]) -> Found:
        """What `work` returns, made on another thread, while others are answered."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, work)

    @property
    def card(self) -> dict[str, Any]:
        """The model, as clients list it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.since,
            "owned_by": "zipper",
            "modalities": {name: kind.name for name, kind in self.kinds.items()},
            "voices": list(self.voices),
        }

    @property
    def voices(self) -> Sequence[str]:
        """Names of voices, of a model that speaks."""
        speech: Any = self.pipeline.modalities.get("speech")
        return speech.voices if isinstance(speech, SpeechUnits) else ()

    def sampling(self, temperature: float, top_p: float, seed: int) -> Sampling:
        """How tokens are drawn; at temperature 0 none are, and the rest says nothing."""
        return Sampling(temperature, 0, top_p, seed) if temperature else Sampling()

    def kind(self, tower: str) -> Kind:
        """The modality of a tower. Raises Refused where there is none."""
        if tower not in self.kinds:
            raise self._unknown(tower)
        return self.kinds[tower]

    def segment(self, tower: str, content: Any, where: str) -> Segment:
        """A segment that came in JSON: a string is the content of a file in base64 where its
        modality is made of files; bytes are one that came beside it. Raises Refused for what names
        a place: none is opened."""
        kind = self.kind(tower)
        if isinstance(content, bytes) and not kind.suffix:
            raise Refused(
                422, "bad_request", f"{where} is a file, and {tower} is not made of files."
            )
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
        explained: bool = False,
    ) -> Ticket:
        """Has a request run. given: raw, sound as the bytes of a file. explained: `looks` will be
        asked for. Raises Refused for more than it may cost, Busy, Stopping, and a ZipperError for
        what cannot be read."""
        self._check(given, outputs, limits)
        self.worker.enter()
        try:
            asked = await self.apart(
                lambda: self._asked(given, outputs, sampling, limits, explained)
            )
        except BaseException:
            self.worker.leave()
            raise
        if asked.request is None:
            ticket = self._silent(outputs, streams)
        else:
            ticket = self.worker.submit(asked.request, streams)
        ticket.seconds, ticket.clocks = asked.seconds, asked.clocks
        return ticket

    async def looks(self, ticket: Ticket) -> list[Look]:
        """What the segments that were written were read from."""
        written = ticket.done.result()
        return await self.apart(lambda: looks(self.pipeline.model, ticket.request, written))

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

    async def parts(self, request: Asked, ticket: Ticket) -> AsyncGenerator[Part, None]:
        """What is produced, in parts, while it is made; lanes of one group side by side. Raises
        what went wrong."""
        loop, told = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def say(part: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(told.put_nowait, part)

        def speak(segment: int, tower: str, ids: SimpleQueue[list[int] | None]) -> None:
            torch.set_num_threads(1)
            try:
                for raw in self.kinds[tower].stream(chain.from_iterable(iter(ids.get, None))):
                    say(Part(segment, tower, raw))
            except Exception as error:
                say(error)

        def share() -> None:
            """Hands tokens to a thread for each segment: its modality waits for them."""
            live: dict[int, tuple[SimpleQueue[list[int] | None], threading.Thread]] = {}
            ended: list[threading.Thread] = []
            some = chain.from_iterable(map(_by_segment, iter(ticket.tokens.get, None)))
            for segment, tower, fresh in some:
                # As it was begun, for where the model chooses, a plan does not say it.
                group = [*accumulate(int(not beside) for beside in ticket.beside)]
                for number in [n for n in live if group[n] < group[segment]]:
                    live[number][0].put(None)
                    ended.append(live.pop(number)[1])
                if segment not in live:
                    ids: SimpleQueue[list[int] | None] = SimpleQueue()
                    thread = threading.Thread(target=speak, args=(segment, tower, ids), daemon=True)
                    live[segment] = ids, thread
                    thread.start()
                live[segment][0].put(fresh)
            for ids, thread in live.values():
                ids.put(None)
                ended.append(thread)
            for thread in ended:
                thread.join()

        def shared() -> None:
            """`share`, whose end is told however it ends: somebody waits for it."""
            try:
                share()
            except Exception as error:
                say(error)
            finally:
                say(None)

        gone = asyncio.ensure_future(left(request))
        gone.add_done_callback(lambda _: ticket.cancel())
        # threads of their own: they wait for tokens, and a pool that is full of such would stand
        threading.Thread(target=shared, name="zipper-stream", daemon=True).start()
        silent = True
        try:
            while (part := await told.get()) is not None:
                if isinstance(part, Exception):
                    raise part
                if silent and isinstance(part.raw, Audio):
                    silent = False
                    if self._sounded is not None:
                        self._sounded(time.monotonic() - ticket.since)
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
        explained: bool,
    ) -> "_Read":
        read = [Segment(one.tower, self._read(one)) for one in given]
        seconds = sum((one.content.seconds for one in read if isinstance(one.content, Audio)), 0.0)
        if seconds > self.caps.seconds:
            raise Refused(
                413,
                "too_long",
                f"{seconds:.1f} s of sound were given, at most {self.caps.seconds:g} s are heard "
                "at a time.",
            )
        asked = self.pipeline.asked(read, outputs, sampling, limits)
        if asked is not None:
            asked = replace(asked, ceiling=self.caps.tokens)
        clocks: list[Clock | None] = []
        if explained and asked is not None:
            for raw, ids in zip(read, asked.segments, strict=True):
                kind, plain = self.kinds[raw.tower], is_ids(raw.content)
                clocks.append(
                    None if plain else clock(kind, kind.read(raw.content), len(ids.content))
                )
        return _Read(asked, seconds, clocks)

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


def _by_segment(tokens: Sequence[Token]) -> Iterator[tuple[int, str, list[int]]]:
    """Segment, tower, ids; segments in their order, ids in theirs."""
    for (segment, tower), some in groupby(sorted(tokens, key=itemgetter(0)), key=itemgetter(0, 1)):
        yield segment, tower, [token.id for token in some]


class _Read(NamedTuple):
    """A request of ids, None where nothing is said; how much sound was given; see `Ticket`."""

    request: Request | None
    seconds: float
    clocks: list[Clock | None]


async def left(request: Asked) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
