"""Generation: many requests at once, each at its own place in its own plan, joining and leaving at
any step.

A request reads what is given, then produces segment after segment in a given order (paper, sec.
3.2), each as `writing` has it. Its code reads as if it were alone: a generator that says what it
wants to read and is sent the logits behind it. The engine collects what all of them want, has it
read in one step, and hands out the answers (continuous batching: Orca, OSDI 2022). Nothing here
knows how a model reads.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count
from typing import Any, NamedTuple, SupportsInt, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from zipper.errors import NoRoom as NoRoom
from zipper.errors import ZipperError
from zipper.former import names_of
from zipper.reading import Logits, Model, Piece, Reader, Stepwise
from zipper.sampling import Rules, Sampling, Search, choose
from zipper.strand import Produced, Segment, groups
from zipper.tasks import among, check_choices, lanes
from zipper.writing import (
    Course,
    Lane,
    Wanted,
    Writing,
    sampled,
    searched,
)
from zipper.writing import Hypothesis as Hypothesis
from zipper.writing import Written as Written

#: {tower: most tokens of a segment, without begin and end}.
Limits = Mapping[str, int]

# tokens of a prompt that are read at a time, so that nobody waits long for a neighbour's prompt
CHUNK = 512


@dataclass(frozen=True)
class Request:
    """What somebody wants.

    segments: given, contents are ids without begin and end.
    outputs: towers in order; a Segment instead of a name forces its ids as the beginning.
    sampling: its seed is the request's. search: by beams instead; None = sample.
    limits: {tower: most tokens of a segment}. rules: {tower: Rules}.
    more: the last given segment is not whole yet, `Answer.feed` brings the rest.

    "text|speech" among the outputs is a choice: the model says which of them comes next, and when
    it is over; "*" is one among all that it chooses among. What is not named in it is forbidden,
    what is named by itself is forced. least, most: segments of a choice.
    ceiling: most tokens of any segment, also where nothing is said in limits.
    """

    segments: Sequence[Segment]
    outputs: Sequence[str | Segment]
    sampling: Sampling = field(default_factory=Sampling)
    limits: Limits | None = None
    rules: Mapping[str, Rules] = field(default_factory=dict)
    search: Search | None = None
    more: bool = False
    least: int = 0
    most: int = 8
    ceiling: int | None = None


class Token(NamedTuple):
    """A token as it is produced: of which produced segment, its tower, id and log-probability in
    nats."""

    segment: int
    tower: str
    id: int
    logprob: float


class Chosen(NamedTuple):
    """What a model chose: how many segments were written before, the tower of the next, "" where
    it was over, and its log-probability in nats among all choices."""

    segment: int
    tower: str
    logprob: float


@final
class Answer:
    """What becomes of a request.

    written: segments so far. chosen: what was chosen among them. done: nothing more will come.
    error: why it ended early, if it did.
    """

    def __init__(self, request: Request, model: Model) -> None:
        self.request = request
        self.written: list[Written] = []
        self.chosen: list[Chosen] = []
        self.done = False
        self.error: Exception | None = None
        self.complete = not request.more
        self.fed: deque[int] = deque()
        self._model = model
        self._given = list(request.segments[-1].content) if request.more else []

    def feed(self, ids: Iterable[SupportsInt]) -> None:
        """More of the last given segment: a list, an array or a tensor of ids.

        Raises a ZipperError for ids that the model cannot read.
        """
        if self.complete or self.done:
            raise ZipperError(
                f"This request is {'complete' if self.complete else 'done'}. Make it with "
                "more=True to feed it, and feed it before finish()."
            )
        *before, last = self.request.segments
        (whole,) = _own(self._model, [Segment(last.tower, [*self._given, *ids])], before)
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

    def segments(self) -> list[Produced]:
        """What was produced. Raises what went wrong, and a ZipperError where it is not done."""
        if self.error is not None:
            raise self.error
        if not self.done:
            raise ZipperError("This request is still running. Call Engine.step() until it is done.")
        return [written.segment for written in self.written]

    @property
    def tokens(self) -> list[Token]:
        """What was produced so far, segment by segment."""
        return [*chain.from_iterable(self.said(number) for number in range(len(self.written)))]

    def said(self, number: int, since: int = 0) -> list[Token]:
        """What was produced so far of one segment behind its first `since` tokens, token by
        token."""
        written = self.written[number]
        pairs = zip(written.ids[written.forced + since :], written.logprobs[since:], strict=False)
        return [Token(number, written.tower, id, logprob) for id, logprob in pairs]


@dataclass
class _Row:
    """A request in the engine: its course, whether that was begun, and what it wants to read
    next."""

    answer: Answer
    course: Course
    turn: int  # how many were submitted before it
    begun: bool = False
    wanted: list[Wanted] = field(default_factory=list)
    logits: list[Any] = field(default_factory=list)

    @property
    def ready(self) -> bool:
        """Whether it has something to read; one that is new reads its begin token."""
        return not self.begun or not self.answer.waits

    def go_on(self) -> None:
        """Hands over the logits and notes what is wanted next. What goes wrong in a request is its
        own affair."""
        begun, self.begun = self.begun, True
        try:
            self.wanted = self.course.send(self.logits) if begun else next(self.course)
        except StopIteration:
            self.answer.done, self.wanted = True, []
        except Exception as error:
            self.answer.done, self.answer.error, self.wanted = True, error, []


@final
class Engine:
    """Runs requests. Not thread-safe: one thread calls `submit` and `step`.

    A request holds a row while it has something to read. One that waits to be fed (`Request.more`)
    gives its row to others and keeps what it has read; once it is fed, it takes the next row that
    is free, before all that were submitted after it. So whoever does nothing keeps nobody waiting,
    and nobody waits for ever: what came before reads no more than its towers have room for.
    """

    def __init__(self, model: Model, reader: Reader, rows: int = 8) -> None:
        """reader: how to read the model (`zipper.fast.engine` takes the fastest that knows it).
        rows: requests that read at once, others wait their turn."""
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
            raise ZipperError(f"An engine for {rows} requests was asked for; it runs at least 1.")
        self.model, self.reader, self.rows = model, reader, rows
        self._waiting: list[_Row] = []  # in the order in which they were submitted
        self._running: list[_Row] = []
        self._turns = count()

    @property
    def load(self) -> tuple[int, int]:
        """Requests that hold a row, and all others that are not done: new ones, and those that wait
        to be fed, which hold in memory what they have read."""
        return len(self._running), len(self._waiting)

    def submit(self, request: Request) -> Answer:
        """Takes a request; nothing is read yet. Raises a ZipperError for one that the model cannot
        read or write."""
        return self._take(_checked(self.model, request))

    @torch.inference_mode()
    def step(self) -> bool:
        """Every request with a row reads once; those that end, or wait to be fed, make room for
        others. Returns whether anything was read: False while all wait to be fed.
        """
        self._running = [row for row in self._running if not row.answer.done]
        self._waiting = [row for row in self._waiting if not row.answer.done]
        ready = [row for row in self._waiting if row.ready]
        for row in ready[: self.rows - len(self._running)]:
            self._waiting.remove(row)
            self._running.append(row)
            row.go_on()
        try:
            something = self._read()
        except BaseException as error:  # what they have read is in doubt, and nobody else's affair
            for row in self._running:
                row.answer.done = True
                row.answer.error = (
                    error if isinstance(error, Exception) else ZipperError("It was interrupted.")
                )
            self._running = []
            raise
        for row in self._running:
            if not row.answer.done:
                row.go_on()
        parked = [row for row in self._running if not row.answer.done and not row.wanted]
        if parked:
            self._running = [row for row in self._running if row.answer.done or row.wanted]
            self._waiting = sorted([*self._waiting, *parked], key=lambda row: row.turn)
        return something

    def run(self, requests: Sequence[Request]) -> list[Answer]:
        """Submits requests, all or none, and steps until they are done, in good or in bad."""
        checked = [_checked(self.model, request) for request in requests]
        answers = [self._take(request) for request in checked]
        while not all(answer.done for answer in answers) and self.step():
            pass
        return answers

    def generate(
        self,
        prompts: Sequence[Sequence[Segment]],
        outputs: Sequence[str | Segment],
        sampling: Sampling,
        limits: Limits | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[list[Produced]]:
        """Produce one segment per item of `outputs` for every prompt.

        prompts: given segments, contents are ids without begin and end. outputs: tower names in
        order; a Segment instead of a name forces its ids as the beginning of what is produced.
        sampling: prompt i draws from its seed + i, or + numbers[i]. limits: most tokens per
        segment, default `model.limit`.

        A segment that hits its limit is closed and returned with ended=False. A prompt behind which
        a tower has no room for a segment gets it and those after it empty, with ended=False; a
        ZipperError where that is so for all.
        """
        plan = planned(outputs)
        if not plan or not prompts:
            raise ZipperError(
                f"generate() got {len(prompts)} prompts and outputs {list(outputs)}; it needs at "
                "least one of each."
            )
        requests = [
            Request(prompt, outputs, sampling.of_row(row), limits)
            for row, prompt in zip(numbers or range(len(prompts)), prompts, strict=True)
        ]
        answers = self.run(requests)
        crowded = all(answer.error for answer in answers)
        for answer in answers:
            if answer.error is not None and (crowded or not isinstance(answer.error, NoRoom)):
                raise answer.error
        found = []
        for answer in answers:
            written = [part.segment for part in answer.written]
            missing = [s.tower for s in plan[len(written) :] if not among(s.tower)]
            if answer.chosen:
                missing = []
            found.append([*written, *(Produced(tower, [], ended=False) for tower in missing)])
        return found

    def stream(self, answer: Answer) -> Iterator[Token]:
        """Tokens of one request as they are produced, stepping all of them; ends when it is done or
        waits to be fed. Raises what went wrong."""
        told: dict[int, int] = {}
        while True:
            for number in range(len(answer.written)):
                fresh = answer.said(number, told.get(number, 0))
                yield from fresh
                told[number] = told.get(number, 0) + len(fresh)
            if answer.error is not None:
                raise answer.error
            if answer.done or not self.step():
                return

    def _take(self, request: Request) -> Answer:
        answer = Answer(request, self.model)
        self._waiting.append(
            _Row(answer, _course(self.model, self.reader, answer), next(self._turns))
        )
        return answer

    def _read(self) -> bool:
        """Reads what all requests with a row want, in one step; whether there was anything."""
        pieces: dict[str, list[Piece]] = {}
        places: dict[str, list[tuple[_Row, int]]] = {}
        for row in self._running:
            row.logits = [None] * len(row.wanted)
            for index, (session, tower, ids) in enumerate(row.wanted):
                pieces.setdefault(tower, []).append((session, ids))
                places.setdefault(tower, []).append((row, index))
        if pieces:
            for tower, logits in self.reader.read(pieces).items():
                for (row, index), found in zip(places[tower], _here(logits), strict=True):
                    row.logits[index] = found
        return bool(pieces)


def generate(
    model: Model,
    prompts: Sequence[Sequence[Segment]],
    outputs: Sequence[str | Segment],
    sampling: Sampling,
    limits: Limits | None = None,
) -> list[list[Produced]]:
    """`Engine.generate` by the model's own steps, all prompts side by side."""
    return Engine(model, Stepwise(model), max(1, len(prompts))).generate(
        prompts, outputs, sampling, limits
    )


def planned(outputs: Sequence[str | Segment]) -> list[Segment]:
    """What is to be produced: a name is a segment that begins with nothing, several of one group
    stand in one item (`tasks.lanes`)."""
    if isinstance(outputs, str):
        raise ZipperError(f"outputs is {outputs!r}; a list was wanted. Write [{outputs!r}].")
    found: list[Segment] = []
    for item in outputs:
        made = [item] if isinstance(item, Segment) else [lane.segment([]) for lane in lanes([item])]
        found += made
    return found


def check_limits(limits: Limits | None) -> dict[str, int]:
    """Limits of the caller's own that will not change. Raises a ZipperError for one that is no
    number of tokens."""
    own = dict(limits or {})
    for tower, limit in own.items():
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise ZipperError(
                f"limits[{tower!r}] is {limit!r}; a limit is a number of tokens, at least 1."
            )
    return own


def _checked(model: Model, request: Request) -> Request:
    """A request that is nobody else's, for it is read later. Raises a ZipperError for one that
    cannot be done."""
    plan = planned(request.outputs)
    if not plan:
        raise ZipperError("A request without outputs; name at least one tower.")
    if request.more and not request.segments:
        raise ZipperError(
            "A request with more=True has no given segment to feed. Give one, its content may be "
            "empty."
        )
    check_choices(plan)
    choice = next((n for n, one in enumerate(plan) if among(one.tower)), None)
    if choice == 0 and not request.segments:
        raise ZipperError(
            "A request begins with a choice, and the end of a segment is what a choice goes by. "
            "Give a segment, or name the first."
        )
    if not 0 <= request.least <= request.most or not request.most:
        raise ZipperError(
            f"A request for {request.least} to {request.most} chosen segments; it wants "
            "0 <= least <= most, and most at least 1."
        )
    apart = [*groups(request.segments), *groups(plan)]
    together = [group for group in apart if len(group) > 1]
    if together and (request.search is not None or request.more):
        raise ZipperError(
            f"A request with {' + '.join(lane.tower for lane in together[0])} in one group was "
            "made, and with a search or to be fed. Neither is done for several lanes at once; "
            "leave it out."
        )
    for option in (request.limits or {}), request.rules:
        model.check([Segment(tower, []) for tower in option])
    for name, plain in ("guidance", 1.0), ("temperature", 0.0):
        if request.search is not None and getattr(request.sampling, name) != plain:
            raise ZipperError(
                f"A request with a search and with {name} was made; {name} is for sampling. Leave "
                "one of them out."
            )
    limits = check_limits(request.limits)
    if request.ceiling is not None and request.ceiling < 1:
        raise ZipperError(f"A ceiling of {request.ceiling} tokens was given; it is at least 1.")
    own = _own(model, [*request.segments, *plan])
    given = len(request.segments)
    return replace(
        request, segments=own[:given], outputs=own[given:], limits=limits, rules=dict(request.rules)
    )


def _own(
    model: Model, segments: Sequence[Segment], before: Sequence[Segment] = ()
) -> list[Segment]:
    """Segments with contents of their own, which no one else will change. Raises a ZipperError for
    what the model cannot read behind those before."""
    model.check([*before, *(each for each in segments if not among(each.tower))])
    for each in segments:
        if towers := among(each.tower):
            model.choices(towers)
    return [replace(each, content=np.asarray(each.content).tolist()) for each in segments]


def _here(rows: Logits) -> Logits:
    """Logits on the CPU, in one transfer: what requests do with them is many small things, each of
    which would wait for a GPU."""
    some = [row for row in rows if row is not None]
    if not some or some[0].device.type == "cpu":
        return rows
    moved = iter(torch.stack(some).cpu())
    return [None if row is None else next(moved) for row in rows]


def _course(model: Model, reader: Reader, answer: Answer) -> Course:
    """A request from its first token to its last."""
    request, plan, ends = answer.request, planned(answer.request.outputs), model.ends()
    named = [model.choices(chosen) if (chosen := among(s.tower)) else (s.tower,) for s in plan]
    outputs = tuple(dict.fromkeys(chain(*named)))
    given = [segment.tower for segment in request.segments]
    towers = tuple(dict.fromkeys([*given, *outputs]))
    choosing = any(among(segment.tower) for segment in plan)
    # A choice goes by the end of any segment, of one that is given too.
    session = reader.open(towers, towers if choosing else outputs)
    # For guidance: sessions that read the segments of their own tower only.
    guided = request.sampling.guidance != 1 and len(towers) > 1
    alone = {tower: reader.open((tower,), (tower,)) for tower in outputs if guided}
    seen = Counter[str]()

    def readers(tower: str) -> list[Any]:
        """The sessions that read a segment of a tower."""
        return [session, alone[tower]] if tower in alone else [session]

    for group in groups(request.segments):
        if len(group) > 1:
            given_lanes = [Lane(lane, ends, readers(lane.tower)) for lane in group]
            yield from sampled(given_lanes, Sampling(), [], False)
            for lane in group:
                seen[lane.tower] += len(lane.content) + 2
            continue
        tower = group[0].tower
        for ids in _given(answer, group[0], ends):
            yield [(one, tower, ids) for one in readers(tower)] if ids else []
            seen[tower] += len(ids)

    generator = request.sampling.generators(1)

    def write(group: Sequence[Segment], last: bool) -> Course:
        """The segments of a group."""
        writing = [_begun(model, answer, forced, seen) for forced in group]
        if request.search is not None:
            yield from searched(reader, session, writing[0], request.search, last)
        else:
            made = [
                Lane(lane, ends, readers(lane.tower), one)
                for lane, one in zip(group, writing, strict=True)
            ]
            yield from sampled(made, request.sampling, generator, last)
        for one in writing:
            seen[one.written.tower] += len(one.written.ids) + 2

    planned_groups, behind = groups(plan), given[-1] if given else ""
    for number, group in enumerate(planned_groups):
        among_these = among(group[0].tower)
        if not among_these:
            yield from write(group, number == len(planned_groups) - 1)
            behind = group[-1].tower
            continue
        for written in range(request.most):
            state = reader.state(session, behind)
            logits = model.choice(behind, state)
            tower = _decided(model, answer, logits, among_these, written, generator)
            if not tower:
                break
            yield from write([Segment(tower, [])], False)
            behind = tower


def _decided(
    model: Model,
    answer: Answer,
    logits: Float[Tensor, " choices"],
    towers: Sequence[str],
    done: int,
    generator: list[torch.Generator],
) -> str:
    """Which of some towers comes next, "" where it is over; noted in the answer. done: segments of
    this choice so far."""
    names, request = [*sorted(model.ends()), ""], answer.request
    logprobs = logits.cpu().log_softmax(-1)
    open_to = {*model.choices(towers)} | ({""} if done >= request.least else set())
    shut = torch.tensor([name not in open_to for name in names])
    picked = int(
        choose(logprobs.masked_fill(shut, -torch.inf)[None], request.sampling, generator)[0]
    )
    answer.chosen.append(Chosen(len(answer.written), names[picked], float(logprobs[picked])))
    return names[picked]


def _begun(model: Model, answer: Answer, forced: Segment, seen: Mapping[str, int]) -> Writing:
    """A segment that is about to be written, and what it goes by."""
    request, tower = answer.request, forced.tower
    try:
        cap = model.limit(tower, seen, (request.limits or {}).get(tower))
        room = model.limit(tower, seen, len(forced.content) or 1)
    except ZipperError as error:
        raise NoRoom(str(error)) from error
    if room < len(forced.content):
        raise NoRoom(
            f"The tower {tower!r} has room for {room} ids behind what was written, and a beginning "
            f"of {len(forced.content)} was given. Give less."
        )
    cap = min(cap, request.ceiling or cap)
    written = Written(
        tower,
        list(forced.content),
        len(forced.content),
        beside=forced.beside,
        stride=forced.stride,
        delay=forced.delay,
    )
    answer.written.append(written)
    begin, end = model.ends()[tower]
    return Writing(written, begin, end, cap, request.rules.get(tower, Rules()))


def _given(answer: Answer, segment: Segment, ends: Mapping[str, Any]) -> Iterator[Sequence[int]]:
    """A given segment in pieces, begin and end included; an empty piece where it has to be fed
    first."""
    request = answer.request
    waits = request.more and segment is request.segments[-1]
    begin, end = ends[segment.tower]
    ids = [begin, *segment.content]
    while True:
        # Looked at first: what is fed after it is in the next round.
        whole = not waits or answer.complete
        while answer.fed and waits:
            ids.append(answer.fed.popleft())
        if whole:
            ids.append(end)
        for start in range(0, len(ids) or 1, CHUNK):
            yield ids[start : start + CHUNK]
        if whole:
            return
        ids = []


__getattr__ = names_of(__name__, ("zipper.config", "zipper.reading"))
