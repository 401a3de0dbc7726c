"""The one thread that owns the engine: requests of all clients share its steps. Knows nothing of
the web, nor of what ids stand for.

What comes in is put down under a lock; what goes out is handed to the event loop of whoever waits
(`call_soon_threadsafe`), so that a client who reads slowly keeps nobody waiting. Tokens of a stream
go out some at a time: a fifth of this thread's time went into waking others for each (docs/log.md).
"""

import asyncio
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, final

import torch

from zipper.errors import ZipperError
from zipper.generation import Answer, Engine, Request, Token, Written
from zipper.serving.refusals import Busy, Stopping

EVERY_S = 0.02  # between two wakes of whoever waits for the tokens of a stream, the first at once
ASIDE = 5  # steps of niceness by which the engine's threads come behind the others

#: Told what was made: (tower, tokens).
Counted = Callable[[str, int], None]
#: Told how many seconds a request waited for its first token, and of which tower that is.
Waited = Callable[[str, float], None]


@final
class Ticket:
    """A request that was taken.

    done: what was written, in the end. tokens: as they are made, those of EVERY_S together, None
    behind the last; only where somebody asked for them. beside: of each segment that was begun,
    whether it is made in the steps of the one before. seconds: of sound that were given. clocks:
    when the ids of each given segment are heard, where somebody asked.
    """

    def __init__(self, request: Request, streams: bool) -> None:
        self.request, self.streams = request, streams
        self.loop = asyncio.get_running_loop()
        self.done: asyncio.Future[list[Written]] = self.loop.create_future()
        self.tokens: SimpleQueue[list[Token] | None] = SimpleQueue()
        self.beside: list[bool] = []
        self.since = time.monotonic()
        self.answer: Answer | None = None
        self.gone = False
        self.seconds = 0.0
        self.clocks: list[Any] = []
        self._told: dict[int, int] = {}  # by segment, how many tokens
        self._held: list[Token] = []  # for the next wake, which may come from then on
        self._due = 0.0

    def cancel(self) -> None:
        """Nobody waits for it any more: its row is free at the next step. Any thread may say so,
        also when it is done."""
        self.gone = True
        self.tokens.put(None)

    def fresh(self) -> list[Token]:
        """What was produced since this was asked last."""
        assert self.answer is not None
        found: list[Token] = []
        for number in range(len(self.answer.written)):
            since = self._told.get(number, 0)
            tokens = self.answer.said(number, since)
            found += tokens
            self._told[number] = since + len(tokens)
        return found

    def hand_out(self, fresh: list[Token]) -> None:
        """Puts tokens down for whoever waits, and wakes them where it is time to."""
        self._held += fresh
        if self._held and (now := time.monotonic()) >= self._due:
            self.tokens.put(self._held)
            self._held, self._due = [], now + EVERY_S

    def settle(self, outcome: list[Written] | Exception) -> None:
        """Tells whoever waits, wherever their loop runs."""
        self._due = 0.0
        self.hand_out([])
        self.tokens.put(None)
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self.loop.call_soon_threadsafe(self._settled, outcome)

    def _settled(self, outcome: list[Written] | Exception) -> None:
        if self.done.done():
            return
        if isinstance(outcome, Exception):
            self.done.set_exception(outcome)
            self.done.exception()  # looked at: nobody may be there to do so
        else:
            self.done.set_result(outcome)


@final
class Worker:
    """Runs requests on a thread of its own, `rows` at once and `queue` more that wait."""

    def __init__(
        self,
        engine: Callable[[], Engine],
        rows: int = 8,
        queue: int = 64,
        counted: Counted | None = None,
        waited: Waited | None = None,
    ) -> None:
        """engine: makes one for `rows` requests; called on the thread, and again where a step
        fails as a whole."""
        if rows < 1 or queue < 0:
            raise ZipperError(
                f"{rows} rows and a queue of {queue} were given. Give at least 1 row, and a queue "
                "from 0."
            )
        self.rows, self.queue, self.steps = rows, queue, 0
        self.stopping = False
        self._engine = engine
        self._counted, self._waited = counted, waited
        self._threads = torch.get_num_threads()  # of whoever made it: its own, whatever others take
        self._changed = threading.Condition()
        self._taken = 0  # all that hold a place, from `enter` until they are done
        self._new: list[Ticket] = []
        self._live: list[Ticket] = []
        self._lost: Exception | None = None  # why there is no engine any more
        self._thread = threading.Thread(target=self._work, name="zipper-engine", daemon=True)

    def start(self) -> None:
        """Begins to work."""
        self._thread.start()

    def stop(self) -> None:
        """Takes no new requests; those that were taken end. Returns at once."""
        with self._changed:
            self.stopping = True
            self._changed.notify()

    def join(self, seconds: float | None = None) -> bool:
        """Waits until all has ended; whether it has."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def running(self) -> bool:
        """Whether it works and takes requests."""
        return self._thread.is_alive() and not self.stopping

    @property
    def load(self) -> tuple[int, int]:
        """Rows in use, and requests that wait for one."""
        used = min(self.rows, self._taken)
        return used, self._taken - used

    def check(self) -> None:
        """Raises Busy where no place is free, Stopping where none will be."""
        if not self.running:
            raise Stopping("This server is stopping and takes no new requests. Ask another one.")
        if self._taken >= self.rows + self.queue:
            raise Busy(
                f"{self._taken} requests run or wait here, and no more are taken. Come again later."
            )

    def enter(self) -> None:
        """Takes a place, for `submit` or `leave`. Raises what `check` raises."""
        with self._changed:
            self.check()
            self._taken += 1

    def leave(self) -> None:
        """Gives back a place that was taken by `enter`."""
        with self._changed:
            self._taken -= 1
            self._changed.notify()

    def submit(self, request: Request, streams: bool = False) -> Ticket:
        """Runs a request on the place that was taken; called on the loop that waits for it."""
        ticket = Ticket(request, streams)
        with self._changed:
            self._new.append(ticket)
            self._changed.notify()
            lost = self._lost
        if lost is not None:
            self._abandon(lost)
        return ticket

    def _work(self) -> None:
        torch.set_num_threads(self._threads)
        _step_aside()
        try:
            self._run()
        except Exception as error:  # no engine can be made: nobody waits for one
            with self._changed:
                self._lost = error
            self._abandon(error)
            raise

    def _abandon(self, error: Exception) -> None:
        """Ends what was taken, where there is no engine any more."""
        with self._changed:
            new, self._new = self._new, []
        for ticket in new:
            self._end(ticket, error)

    def _run(self) -> None:
        engine = self._engine()
        while True:
            with self._changed:
                while not self._new and not self._live:
                    if self.stopping and not self._taken:
                        return
                    self._changed.wait()
                new, self._new = self._new, []
            for ticket in new:
                self._begin(engine, ticket)
            for ticket in self._live:
                if ticket.gone and ticket.answer is not None:
                    ticket.answer.cancel()
            try:
                engine.step()
            except Exception as error:  # of no request's own: all that run are lost
                for ticket in self._live:
                    self._end(ticket, error)
                self._live = []
                engine = self._engine()
            self.steps += 1
            for ticket in self._live:
                self._tell(ticket)
            self._live = [ticket for ticket in self._live if ticket.answer is not None]

    def _begin(self, engine: Engine, ticket: Ticket) -> None:
        try:
            ticket.answer = engine.submit(ticket.request)
        except Exception as error:  # the request's own
            self._end(ticket, error)
        else:
            self._live.append(ticket)

    def _tell(self, ticket: Ticket) -> None:
        """Hands out what is new of a request."""
        answer, first = ticket.answer, not any(ticket._told.values())
        if answer is None:
            return
        if fresh := ticket.fresh():
            if first and self._waited is not None:
                self._waited(fresh[0].tower, time.monotonic() - ticket.since)
            if self._counted is not None:
                for tower, tokens in Counter(token.tower for token in fresh).items():
                    self._counted(tower, tokens)
        if ticket.streams:
            ticket.beside = [one.beside for one in answer.written]
            ticket.hand_out(fresh)
        if answer.done:
            self._end(ticket, answer.error or answer.written)

    def _end(self, ticket: Ticket, outcome: Any) -> None:
        ticket.answer = None
        self.leave()
        ticket.settle(outcome)


def _step_aside() -> None:
    """This thread and those that it begins come behind the others of the process: a server that
    computes with all cores still answers, and refuses what is too much. Linux alone knows the
    priorities of threads."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        now = os.getpriority(os.PRIO_PROCESS, thread)
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, min(19, now + ASIDE))
