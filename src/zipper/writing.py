"""How one segment is written: sampled token by token, several of one group side by side, or
searched by beams.

Each is a generator that says what it wants to be read and is sent the logits behind it. Nothing
here knows who asked, nor how a model reads.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from zipper.reading import Reader
from zipper.sampling import Rules, Sampling, Search, choose
from zipper.strand import Produced, Segment

#: A piece that is wanted to be read: the session that reads, the tower, the ids.
Wanted = tuple[Any, str, Sequence[int]]
#: Says what it wants to be read next, and is sent the logits behind each piece.
Course = Generator[list[Wanted], list[Any], None]


@dataclass(frozen=True)
class Hypothesis:
    """One way to write a segment. logprobs: in nats, of every token that was produced, the end
    token last if it was."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ended: bool
    score: float


@dataclass
class Written:
    """A segment while it is produced, and after.

    ids: the forced ones first, without begin and end. forced: how many these are.
    logprobs: in nats, of every id that was produced and of the end token, by the model's own
    distribution.
    stop: why it ended: by itself, at its limit, in a loop; "" while it goes on.
    best: the best hypotheses of a search, best first.
    beside, stride, delay: as the plan has it, see `Segment`.
    """

    tower: str
    ids: list[int]
    forced: int
    logprobs: list[float] = field(default_factory=list)
    stop: Literal["", "end", "limit", "loop"] = ""
    best: list[Hypothesis] = field(default_factory=list)
    beside: bool = False
    stride: int = 1
    delay: int = 0

    @property
    def segment(self) -> Produced:
        """As `generate` returns it."""
        return Produced(
            self.tower,
            list(self.ids),
            self.stop == "end",
            sum(self.logprobs, 0.0),
            beside=self.beside,
            stride=self.stride,
            delay=self.delay,
        )


class Writing(NamedTuple):
    """What both ways to write a segment go by."""

    written: Written
    begin: int
    end: int
    cap: int
    rules: Rules

    def endless(self, logits: Float[Tensor, " known"]) -> bool:
        """Whether these are of a head that cannot say the end, as ImageGPT's: such a segment ends
        at its cap, as it should."""
        return len(logits) <= self.end

    def filled(self, logits: Float[Tensor, " known"]) -> Float[Tensor, " vocabulary"]:
        """In float32; begin and end, where the head has none, are never said."""
        missing = max(self.begin, self.end) + 1 - len(logits)
        logits = logits.float()
        return logits if missing <= 0 else F.pad(logits, (0, missing), value=-torch.inf)

    def logprobs(self, logits: Float[Tensor, " known"]) -> Float[Tensor, " vocabulary"]:
        """Log-probabilities by the model's own distribution; a segment begins once."""
        logits = self.filled(logits)
        if self.begin != self.end:
            logits[self.begin] = -torch.inf
        return logits.log_softmax(-1)


def _drawn(
    writing: Writing,
    logits: Sequence[Tensor],
    sampling: Sampling,
    generator: list[torch.Generator],
) -> int:
    """Draws the next token of a segment and notes it; the end token where it ends, by itself or by
    force. logits: behind all, and where guidance is wanted behind its own tower only."""
    written, _, end, cap, rules = writing
    logprobs = writing.logprobs(logits[0])
    blind = [writing.filled(each) for each in logits[1:]]
    guided = sampling.guide(logprobs, *blind) if blind else logprobs
    token = int(choose(rules.weigh(guided, written.ids)[None], sampling, generator)[0])
    if token == end:
        written.logprobs.append(float(logprobs[token]))
        written.stop = "end"
    elif len(written.ids) >= cap:
        # Closed by force: not produced, so not in the score.
        written.stop = "end" if writing.endless(logits[0]) else "limit"
        return end
    else:
        written.ids.append(token)
        written.logprobs.append(float(logprobs[token]))
        if rules.loops(written.ids):
            written.stop = "loop"
    return token


class Lane:
    """A segment of a group while it is read or written, a token at a time, with the others.

    sessions: one that sees all, and where guidance is wanted one that sees its own tower only.
    unread: what it reads in its next steps. writing: how it goes on behind that; None for a given
    one, which ends there. over: it has read its end.
    """

    def __init__(
        self,
        segment: Segment,
        ends: Mapping[str, Any],
        sessions: Sequence[Any],
        writing: Writing | None = None,
    ) -> None:
        begin, self.end = ends[segment.tower]
        self.segment, self.sessions, self.writing = segment, sessions, writing
        self.unread = [begin, *segment.content]
        if writing is None:
            self.unread.append(self.end)
        self.over = False

    def due(self, step: int) -> int:
        """The next step of its group, from this one on, in which it reads a token."""
        since = max(0, step - self.segment.delay)
        return self.segment.delay + since + -since % self.segment.stride

    def wants(self, alone: bool) -> list[Wanted]:
        """What it reads now: alone all that is unread, else a token."""
        ids = self.unread[: None if alone else 1]
        return [(session, self.segment.tower, ids) for session in self.sessions]

    def go_on(
        self,
        logits: Sequence[Any],
        sampling: Sampling,
        generator: list[torch.Generator],
        alone: bool,
    ) -> None:
        """That is read: draws the next token, where none is waiting."""
        stopped = self.writing is None or bool(self.writing.written.stop)
        del self.unread[: None if alone else 1]
        if self.unread:
            return
        if stopped:
            self.over = True
            return
        assert self.writing is not None
        token = _drawn(self.writing, logits, sampling, generator)
        looped = self.writing.written.stop == "loop"
        self.unread = [token, self.end] if looped else [token]


def sampled(
    lanes: Sequence[Lane], sampling: Sampling, generator: list[torch.Generator], last: bool
) -> Course:
    """The lanes of a group, a step at a time: each draws its next token from what came before the
    step, and ends by itself. Drawn in the order of the towers' names, whatever that of the plan. A
    lane alone waits for nobody, and reads at once what it holds."""
    alone = len(lanes) == 1
    ordered = sorted(lanes, key=lambda lane: lane.segment.tower)
    step = 0
    while live := [lane for lane in ordered if not lane.over]:
        step = 0 if alone else min(lane.due(step) for lane in live)
        due = live if alone else [lane for lane in live if lane.due(step) == step]
        logits = iter((yield [*chain.from_iterable(lane.wants(alone) for lane in due)]))
        for lane in due:
            lane.go_on([next(logits) for _ in lane.sessions], sampling, generator, alone)
        if last and all(lane.writing is not None and lane.writing.written.stop for lane in lanes):
            return
        step += 1


class _Beam(NamedTuple):
    """A hypothesis that goes on: what it has read, and said."""

    session: Any
    ids: list[int]
    logprobs: list[float]
    rank: float  # log-probability under the rules


class _Candidate(NamedTuple):
    """How a beam may go on: by which token. logprob: of the token by the model's own
    distribution."""

    rank: float
    beam: _Beam
    token: int
    logprob: float


def searched(reader: Reader, session: Any, writing: Writing, search: Search, last: bool) -> Course:
    """One segment, by beam search. `session` reads only the winner, at the end."""
    written, begin, end, cap, rules = writing
    beams = [_Beam(reader.fork(session), written.ids, [], 0.0)]
    logits = yield [(beams[0].session, written.tower, [begin, *written.ids])]
    found: list[Hypothesis] = []
    while beams:
        candidates, closed = _candidates(beams, logits, writing, search)
        beams, ended = _heirs(reader, candidates, end, search)
        ranked = sorted([*found, *closed, *ended], key=lambda hypothesis: -hypothesis.score)
        found = ranked[: search.width]
        hope = max((search.score(beam.rank, cap + 1) for beam in beams), default=-torch.inf)
        if len(found) == search.width and hope <= found[-1].score:
            break
        if beams:
            logits = yield [(beam.session, written.tower, beam.ids[-1:]) for beam in beams]
    best = found[0]
    written.ids, written.logprobs, written.best = (
        list(best.ids),
        list(best.logprobs),
        found[: search.best],
    )
    written.stop = "end" if best.ended else "loop" if rules.loops(best.ids) else "limit"
    if not last:
        yield [(session, written.tower, [begin, *best.ids, end])]


def _candidates(
    beams: Sequence[_Beam], logits: Sequence[Tensor], writing: Writing, search: Search
) -> tuple[list[_Candidate], list[Hypothesis]]:
    """How beams may go on, likeliest first, and those that are closed as they stand: at the cap, or
    in a loop."""
    candidates, closed = [], []
    for beam, row in zip(beams, logits, strict=True):
        logprobs = writing.logprobs(row)
        ranks = writing.rules.weigh(logprobs, beam.ids)
        full, looped = len(beam.ids) >= writing.cap, writing.rules.loops(beam.ids)
        if full or looped:  # it may end, or is closed as it stands, where anything else may follow
            if (ranks > -torch.inf).nonzero().flatten().tolist() != [writing.end]:
                score = search.score(beam.rank, max(1, len(beam.logprobs)))
                ended = writing.endless(row) and full
                closed.append(Hypothesis(tuple(beam.ids), tuple(beam.logprobs), ended, score))
            only_end = torch.full_like(ranks, -torch.inf)
            only_end[writing.end] = ranks[writing.end]
            ranks = only_end
        values, tokens = ranks.topk(min(search.width + 1, len(ranks)))
        for rank, token in zip(values.tolist(), tokens.tolist(), strict=True):
            if rank > -torch.inf:
                candidates.append(_Candidate(beam.rank + rank, beam, token, float(logprobs[token])))
    return sorted(candidates, key=lambda candidate: -candidate.rank), closed


def _heirs(
    reader: Reader, candidates: Sequence[_Candidate], end: int, search: Search
) -> tuple[list[_Beam], list[Hypothesis]]:
    """The beams that go on, at most as many as the search is wide, and the hypotheses that have
    ended."""
    beams: list[_Beam] = []
    ended: list[Hypothesis] = []
    taken: set[int] = set()
    for place, (rank, beam, token, logprob) in enumerate(candidates):
        said = [*beam.logprobs, logprob]
        if token != end:
            heir = reader.fork(beam.session) if id(beam) in taken else beam.session
            taken.add(id(beam))
            beams.append(_Beam(heir, [*beam.ids, token], said, rank))
        elif place < search.width:
            ended.append(
                Hypothesis(tuple(beam.ids), tuple(said), True, search.score(rank, len(said)))
            )
        if len(beams) == search.width:
            break
    return beams, ended
