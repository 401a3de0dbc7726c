"""The engine: many requests at once, each at its own place in its own plan, joining and leaving at any step.

A request is written as if it were alone: a generator that says what it wants to read and is given the logits behind it. The engine
collects what all of them want, reads it tower by tower, and hands out the answers (continuous batching: Orca, OSDI 2022). Greedy
tokens, draws and scores are those of `generation.generate`, which is the reference. Nothing here knows how a model reads.
"""

import copy
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Literal, NamedTuple, Protocol, SupportsInt, final, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from zipper.errors import ZipperError
from zipper.files import settle
from zipper.fused import Fused
from zipper.generation import Clock, Limits, Model, check, check_limits, planned
from zipper.model import Zipper
from zipper.sampling import Rules, Sampling, choose
from zipper.sequence import Segment
from zipper.tower import UnsupportedTower

CHUNK = 512  # tokens of a prompt that are read at a time, so that nobody waits long for a neighbour's prompt


@runtime_checkable
class Reader(Protocol):
    """How sequences are read. A session is whatever the reader makes of one."""

    def open(self, towers: Sequence[str], outputs: Sequence[str]) -> Any:
        """An empty sequence for a plan."""

    def fork(self, session: Any) -> Any:
        """A copy that goes on by itself."""

    def read(self, tower: str, pieces: Sequence[tuple[Any, Sequence[int]]]) -> list[Float[Tensor, " vocabulary"] | None]:
        """Every session reads these tokens of a tower: logits behind its last one, None where its plan wants none."""


@final
class Stepwise:
    """Reads by the model's own `step`, one session after another: for every model, and what `Fused` is compared with."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def open(self, towers: Sequence[str], outputs: Sequence[str]) -> "Walk":
        """An empty sequence for a plan."""
        return Walk(self.model.start(towers, outputs), Clock(1, self.model.ends()), frozenset(outputs))

    def fork(self, session: "Walk") -> "Walk":
        """A copy that goes on by itself."""
        return copy.deepcopy(session)

    @torch.inference_mode()
    def read(self, tower: str, pieces: Sequence[tuple["Walk", Sequence[int]]]) -> list[Float[Tensor, " vocabulary"] | None]:
        """See `Reader`."""
        found: list[Tensor | None] = []
        for session, ids in pieces:
            strand = session.clock.say(tower, torch.tensor([list(ids)]), torch.ones(1, dtype=torch.bool))
            hidden, session.state = self.model.step({tower: strand}, session.state)
            speaks = tower in session.outputs
            found.append(self.model.unembed(tower, hidden[tower][:, -1:])[0, 0] if speaks else None)
        return found


@dataclass
class Walk:
    """One sequence that is read step by step."""

    state: Any
    clock: Clock
    outputs: frozenset[str]


@dataclass(frozen=True)
class Search:
    """Beam search instead of sampling, segment by segment.

    width: hypotheses that go on. best: how many are told at the end; the first one is what the segments after it see.
    length_power: a hypothesis of n tokens, its end included, is ranked by log-probability / ((5 + n) / 6) ** length_power (GNMT,
    arXiv:1609.08144, eq. 14); 0 = by log-probability, which favours short ones.
    """

    width: int = 4
    best: int = 1
    length_power: float = 0.6

    def __post_init__(self) -> None:
        settle(self, {"width": (1, 10_000), "best": (1, 10_000), "length_power": (0.0, 100.0)})
        if self.best > self.width:
            raise ZipperError(
                f"A search for the best {self.best} with a width of {self.width} was wanted; it finds no more than its width."
            )

    def score(self, logprob: float, tokens: int) -> float:
        """What hypotheses are ranked by; the more tokens share a log-probability, the higher."""
        return logprob / ((5 + tokens) / 6) ** self.length_power


@dataclass(frozen=True)
class Request:
    """What somebody wants.

    segments: given, contents are ids without begin and end. outputs: towers in order; a Segment instead of a name forces its ids
    as the beginning. sampling: its seed is the request's. limits: {tower: most tokens of a segment}. rules: {tower: Rules}.
    search: None = sample. more: the last given segment is not whole yet, `Answer.feed` brings the rest.
    """

    segments: Sequence[Segment]
    outputs: Sequence[str | Segment]
    sampling: Sampling = field(default_factory=Sampling)
    limits: Limits | None = None
    rules: Mapping[str, Rules] = field(default_factory=dict)
    search: Search | None = None
    more: bool = False


@dataclass(frozen=True)
class Hypothesis:
    """One way to write a segment. logprobs: in nats, of every token that was produced, the end token last if it was."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ended: bool
    score: float


@dataclass
class Written:
    """A segment while it is produced, and after.

    ids: the forced ones first, without begin and end. logprobs: in nats, of every id that was produced and of the end token, by
    the model's own distribution. stop: why it ended: by itself, at its limit, in a loop; "" while it goes on. best: the best
    hypotheses of a search, best first.
    """

    tower: str
    ids: list[int]
    forced: int
    logprobs: list[float] = field(default_factory=list)
    stop: Literal["", "end", "limit", "loop"] = ""
    best: list[Hypothesis] = field(default_factory=list)

    @property
    def segment(self) -> Segment:
        """As `generate` returns it."""
        return Segment(self.tower, list(self.ids), ended=self.stop == "end", score=sum(self.logprobs))


class Token(NamedTuple):
    """A token as it is produced: of which produced segment, its tower, id and log-probability in nats."""

    segment: int
    tower: str
    id: int
    logprob: float


@final
class Answer:
    """What becomes of a request. written: segments so far. done: nothing more will come. error: why it ended early, if it did."""

    def __init__(self, request: Request, model: Model) -> None:
        self.request = request
        self.written: list[Written] = []
        self.done = False
        self.error: Exception | None = None
        self.complete = not request.more
        self.fed: deque[int] = deque()
        self._model, self._given = model, list(request.segments[-1].content) if request.more else []

    def feed(self, ids: Iterable[SupportsInt]) -> None:
        """More of the last given segment: a list, an array or a tensor of ids.

        Raises a ZipperError for ids that the model cannot read.
        """
        if self.complete or self.done:
            raise ZipperError(
                f"This request is {'complete' if self.complete else 'done'}. Make it with more=True to feed it, and feed it before "
                "finish()."
            )
        *before, last = self.request.segments
        (whole,) = _read(self._model, [Segment(last.tower, [*self._given, *ids])], before)
        self.fed.extend(whole.content[len(self._given) :])
        self._given = whole.content

    def finish(self) -> None:
        """The last given segment is whole."""
        self.complete = True

    @property
    def waits(self) -> bool:
        """Whether there is nothing to read before it is fed or finished."""
        return not self.fed and not self.complete

    def cancel(self) -> None:
        """Nobody waits for it any more; the engine forgets it at its next step."""
        self.done = True

    def segments(self) -> list[Segment]:
        """What was produced. Raises what went wrong, and a ZipperError where it is not done."""
        if self.error is not None:
            raise self.error
        if not self.done:
            raise ZipperError("This request is still running. Call Engine.step() until it is done.")
        return [written.segment for written in self.written]


Wish = tuple[Any, str, Sequence[int]]  # a session, and what it is to read
Life = Generator[list[Wish], list[Any], None]  # says its wishes, is sent the logits behind each


@dataclass
class _Row:
    """A request: its generator, whether that was begun, and what it wants to read next."""

    answer: Answer
    life: Life
    turn: int  # how many were submitted before it
    begun: bool = False
    wishes: list[Wish] = field(default_factory=list)
    logits: list[Any] = field(default_factory=list)

    @property
    def ready(self) -> bool:
        """Whether it has something to read; one that is new reads its begin token."""
        return not self.begun or not self.answer.waits


@final
class Engine:
    """Runs requests. Not thread-safe: one thread calls `submit` and `step`.

    A request holds a row while it has something to read. One that waits to be fed (`Request.more`) gives its row to others and
    keeps what it has read; once it is fed, it takes the next row that is free, before all that were submitted after it. So whoever
    does nothing keeps nobody waiting, and nobody waits for ever: what came before reads no more than its towers have room for.
    """

    def __init__(self, model: Model, rows: int = 8, reader: Reader | None = None) -> None:
        """rows: requests that read at once, others wait their turn. reader: how to read; default the fastest that knows the model,
        which takes its weights as they are now."""
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
            raise ZipperError(f"An engine for {rows} requests was asked for; it runs at least 1.")
        self.model, self.rows = model, rows
        self.reader = fastest(model) if reader is None else reader
        self._waiting: list[_Row] = []  # in the order in which they were submitted
        self._running: list[_Row] = []
        self._turns = count()

    @property
    def load(self) -> tuple[int, int]:
        """Requests that hold a row, and all others that are not done: new ones, and those that wait to be fed, which hold in memory
        what they have read."""
        return len(self._running), len(self._waiting)

    def submit(self, request: Request) -> Answer:
        """Takes a request; nothing is read yet. Raises a ZipperError for one that the model cannot read or write."""
        plan = planned(request.outputs)
        if not plan:
            raise ZipperError("A request without outputs; name at least one tower.")
        if request.more and not request.segments:
            raise ZipperError("A request with more=True has no given segment to feed. Give one, its content may be empty.")
        for option in (request.limits or {}), request.rules:
            self.model.check([Segment(tower, []) for tower in option])
        limits = check_limits(request.limits)
        for name, plain in ("guidance", 1.0), ("temperature", 0.0):
            if request.search is not None and getattr(request.sampling, name) != plain:
                raise ZipperError(
                    f"A request with a search and with {name} was made; {name} is for sampling. Leave one of them out."
                )
        # All of it is read later, so that none of it may be the caller's.
        own = _read(self.model, [*request.segments, *plan])
        request = replace(
            request,
            segments=own[: len(request.segments)],
            outputs=own[len(request.segments) :],
            limits=limits,
            rules=dict(request.rules),
        )
        answer = Answer(request, self.model)
        self._waiting.append(_Row(answer, _life(self.model, self.reader, answer), next(self._turns)))
        return answer

    @torch.inference_mode()
    def step(self) -> bool:
        """Every request with a row reads once; those that end, or wait to be fed, make room for others. Returns whether anything
        was read: False while all wait to be fed."""
        self._running = [row for row in self._running if not row.answer.done]
        self._waiting = [row for row in self._waiting if not row.answer.done]
        for row in [row for row in self._waiting if row.ready][: self.rows - len(self._running)]:
            self._waiting.remove(row)
            self._running.append(row)
            self._go_on(row)
        towers: dict[str, list[tuple[_Row, int]]] = {}
        for row in self._running:
            row.logits = [None] * len(row.wishes)
            for index, (_, tower, _) in enumerate(row.wishes):
                towers.setdefault(tower, []).append((row, index))
        for tower, group in towers.items():
            pieces = [(session, ids) for session, _, ids in (row.wishes[index] for row, index in group)]
            for (row, index), logits in zip(group, _here(self.reader.read(tower, pieces)), strict=True):
                row.logits[index] = logits
        for row in self._running:
            if not row.answer.done:
                self._go_on(row)
        parked = [row for row in self._running if not row.answer.done and not row.wishes]
        if parked:
            self._running = [row for row in self._running if row.answer.done or row.wishes]
            self._waiting = sorted([*self._waiting, *parked], key=lambda row: row.turn)
        return bool(towers)

    def run(self, requests: Sequence[Request]) -> list[Answer]:
        """Submits requests and steps until they are done, in good or in bad."""
        answers = [self.submit(request) for request in requests]
        while not all(answer.done for answer in answers) and self.step():
            pass
        return answers

    def generate(
        self,
        prompts: Sequence[Sequence[Segment]],
        outputs: Sequence[str | Segment],
        sampling: Sampling,
        limits: Limits | None = None,
    ) -> list[list[Segment]]:
        """What `generation.generate` returns, by requests: the same tokens, draws and errors."""
        plan = check(self.model, prompts, outputs, limits)
        seeds = (replace(sampling, seed=sampling.seed + row) for row in range(len(prompts)))
        answers = self.run([Request(prompt, outputs, own, limits) for prompt, own in zip(prompts, seeds, strict=True)])
        for answer in answers:
            if answer.error is not None and (not isinstance(answer.error, NoRoom) or all(other.error for other in answers)):
                raise answer.error
        found = []
        for answer in answers:
            written = [part.segment for part in answer.written]
            found.append([*written, *(Segment(segment.tower, [], ended=False) for segment in plan[len(written) :])])
        return found

    def stream(self, answer: Answer) -> Iterator[Token]:
        """Tokens of one request as they are produced, stepping all of them; ends when it is done or waits to be fed. Raises what
        went wrong."""
        told = 0
        while True:
            tokens = [
                Token(number, written.tower, i, logprob)
                for number, written in enumerate(answer.written)
                for i, logprob in zip(written.ids[written.forced :], written.logprobs, strict=False)
            ]
            yield from tokens[told:]
            told = len(tokens)
            if answer.error is not None:
                raise answer.error
            if answer.done or not self.step():
                return

    def _go_on(self, row: _Row) -> None:
        """Hands a request its logits and notes what it wants next. What goes wrong in it is its own affair."""
        begun, row.begun = row.begun, True
        try:
            row.wishes = row.life.send(row.logits) if begun else next(row.life)
        except StopIteration:
            row.answer.done, row.wishes = True, []
        except Exception as error:
            row.answer.done, row.answer.error, row.wishes = True, error, []


def _read(model: Model, segments: Sequence[Segment], before: Sequence[Segment] = ()) -> list[Segment]:
    """Segments with contents of their own, which no one else will change. Raises a ZipperError for what the model cannot
    read behind those before."""
    model.check([*before, *segments])
    return [replace(segment, content=np.asarray(segment.content).tolist()) for segment in segments]


def _here(rows: list[Tensor | None]) -> list[Tensor | None]:
    """Logits on the CPU, in one transfer: what requests do with them is many small things, each of which would wait for a GPU."""
    some = [row for row in rows if row is not None]
    if not some or some[0].device.type == "cpu":
        return rows
    moved = iter(torch.stack(some).cpu())
    return [None if row is None else next(moved) for row in rows]


def fastest(model: Model) -> Reader:
    """The fast path for a zip whose towers are all of a known kind, else the model's own steps."""
    if isinstance(model, Zipper):
        try:
            return Fused(model)
        except UnsupportedTower:
            pass
    return Stepwise(model)


class NoRoom(ZipperError):
    """A tower has no room for another segment."""


def _life(model: Model, reader: Reader, answer: Answer) -> Life:
    """A request from its first token to its last."""
    request, plan, ends = answer.request, planned(answer.request.outputs), model.ends()
    given, produced = [s.tower for s in request.segments], [s.tower for s in plan]
    session = reader.open(tuple(dict.fromkeys(given + produced)), tuple(dict.fromkeys(produced)))
    guided = request.sampling.guidance != 1 and len({*given, *produced}) > 1
    alone = {tower: reader.open((tower,), (tower,)) for tower in {*produced} if guided}  # read their own segments only
    seen: dict[str, int] = {}
    for number, segment in enumerate(request.segments):
        tower, (begin, end) = segment.tower, ends[segment.tower]
        waits = request.more and number == len(request.segments) - 1
        ids = [begin, *segment.content]
        while True:
            whole = not waits or answer.complete  # looked at first: what is fed after it is in the next round
            while answer.fed and waits:
                ids.append(answer.fed.popleft())
            for piece in _pieces([*ids, end] if whole else ids):
                yield [(reading, tower, piece) for reading in _reading(session, alone, tower)]
                seen[tower] = seen.get(tower, 0) + len(piece)
            if whole:
                break
            if not ids:
                yield []
            ids = []
    generator = request.sampling.generators(1)
    for number, forced in enumerate(plan):
        tower, last = forced.tower, number == len(plan) - 1
        try:
            cap = model.limit(tower, seen, (request.limits or {}).get(tower))
        except ZipperError as error:
            raise NoRoom(str(error)) from error
        written = Written(tower, list(forced.content), len(forced.content))
        answer.written.append(written)
        writing = _Writing(written, *ends[tower], cap, request.rules.get(tower, Rules()))
        if request.search is None:
            yield from _sampled(_reading(session, alone, tower), writing, request.sampling, generator, last)
        else:
            yield from _searched(reader, session, writing, request.search, last)
        seen[tower] = seen.get(tower, 0) + len(written.ids) + 2


class _Writing(NamedTuple):
    """What both ways to write a segment go by."""

    written: Written
    begin: int
    end: int
    cap: int
    rules: Rules

    def logprobs(self, logits: Float[Tensor, " vocabulary"]) -> Float[Tensor, " vocabulary"]:
        """Log-probabilities by the model's own distribution; a segment begins once."""
        logits = logits.float()
        if self.begin != self.end:
            logits[self.begin] = -torch.inf
        return logits.log_softmax(-1)


def _reading(session: Any, alone: Mapping[str, Any], tower: str) -> list[Any]:
    """The sessions that read a segment of a tower."""
    return [session, alone[tower]] if tower in alone else [session]


def _sampled(sessions: Sequence[Any], writing: _Writing, sampling: Sampling, generator: list[torch.Generator], last: bool) -> Life:
    """One segment, token by token. sessions: one that sees all, and where guidance is wanted one that sees its own tower only."""
    written, begin, end, cap, rules = writing
    next_ids = [begin, *written.ids]
    while not written.stop:
        logits, *blind = yield [(session, written.tower, next_ids) for session in sessions]
        logprobs = writing.logprobs(logits)
        guided = sampling.guide(logprobs, blind[0].float()) if blind else logprobs
        token = int(choose(rules.weigh(guided, written.ids)[None], sampling, generator)[0])
        if token == end:
            written.logprobs.append(float(logprobs[token]))
            written.stop = "end"
        elif len(written.ids) >= cap:
            written.stop = "limit"  # closed by force: not produced, so not in the score
        else:
            written.ids.append(token)
            written.logprobs.append(float(logprobs[token]))
            if rules.loops(written.ids):
                written.stop = "loop"
        next_ids = [token]
    if not last:
        unread = written.ids[-1:] if written.stop == "loop" else []
        yield [(session, written.tower, [*unread, end]) for session in sessions]


class _Beam(NamedTuple):
    """A hypothesis that goes on: what it has read, and said."""

    session: Any
    ids: list[int]
    logprobs: list[float]
    rank: float  # log-probability under the rules


def _searched(reader: Reader, session: Any, writing: _Writing, search: Search, last: bool) -> Life:
    """One segment, by beam search. `session` reads only the winner, at the end."""
    written, begin, end, cap, rules = writing
    beams = [_Beam(reader.fork(session), written.ids, [], 0.0)]
    logits = yield [(beams[0].session, written.tower, [begin, *written.ids])]
    found: list[Hypothesis] = []
    while beams:
        candidates: list[tuple[float, int, int, float]] = []  # rank, beam, token, its log-probability
        for index, (beam, row) in enumerate(zip(beams, logits, strict=True)):
            logprobs = writing.logprobs(row)
            ranks = rules.weigh(logprobs, beam.ids)
            if len(beam.ids) >= cap or rules.loops(beam.ids):  # it may end, or is closed as it stands
                found.append(_hypothesis(beam.ids, beam.logprobs, False, search.score(beam.rank, max(1, len(beam.logprobs)))))
                ranks = torch.full_like(ranks, -torch.inf).index_fill(0, torch.tensor(end), float(ranks[end]))
            values, tokens = ranks.topk(min(search.width + 1, len(ranks)))
            for rank, token in zip(values.tolist(), tokens.tolist(), strict=True):
                if rank > -torch.inf:
                    candidates.append((beam.rank + rank, index, token, float(logprobs[token])))
        candidates.sort(key=lambda candidate: -candidate[0])
        new, taken = [], set()
        for place, (rank, index, token, logprob) in enumerate(candidates):
            beam = beams[index]
            if token != end:
                heir = reader.fork(beam.session) if index in taken else beam.session
                taken.add(index)
                new.append(_Beam(heir, [*beam.ids, token], [*beam.logprobs, logprob], rank))
            elif place < search.width:
                said = [*beam.logprobs, logprob]
                found.append(_hypothesis(beam.ids, said, True, search.score(rank, len(said))))
            if len(new) == search.width:
                break
        found = sorted(found, key=lambda hypothesis: -hypothesis.score)[: search.width]
        hope = max((search.score(beam.rank, cap + 1) for beam in new), default=-torch.inf)
        if len(found) == search.width and hope <= found[-1].score:
            break
        beams = new
        if beams:
            logits = yield [(beam.session, written.tower, beam.ids[-1:]) for beam in beams]
    best = found[0]
    written.ids, written.logprobs, written.best = list(best.ids), list(best.logprobs), found[: search.best]
    written.stop = "end" if best.ended else "loop" if rules.loops(best.ids) else "limit"
    if not last:
        yield [(session, written.tower, [begin, *best.ids, end])]


def _hypothesis(ids: Sequence[int], logprobs: Sequence[float], ended: bool, score: float) -> Hypothesis:
    return Hypothesis(tuple(ids), tuple(logprobs), ended, score)


def _pieces(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(ids), CHUNK):
        yield ids[start : start + CHUNK]
