"""Generation: read what is given, then produce segment after segment in a given order (paper, sec. 3.2).

One tower runs at a time; the others wait in the state. A batch may be ragged: rows that have ended are padding until the rest has.
Nothing here knows how the model works inside, only `start`, `step` and `unembed`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from zipper.errors import ZipperError
from zipper.sampling import Sampling, choose
from zipper.sequence import PADDING, Ends, Segment, collate
from zipper.tower import Strand

#: {tower: most tokens of a segment, without begin and end}.
Limits = Mapping[str, int]


@runtime_checkable
class Model(Protocol):
    """What generation needs of a model."""

    def start(self, towers: Sequence[str], outputs: Sequence[str]) -> Any:
        """An empty state for a plan."""

    def step(self, strands: Mapping[str, Strand], state: Any) -> tuple[dict[str, Tensor], Any]:
        """Read tokens: states before the head, and the new state (which offers `compact(tower)`)."""

    def unembed(self, tower: str, hidden: Tensor) -> Tensor:
        """Logits."""

    def ends(self) -> Mapping[str, Ends]:
        """Begin and end ids of each tower."""

    def limit(self, tower: str, given: Mapping[str, int], wanted: int | None = None) -> int:
        """Most tokens of a segment of `tower`, from the number of tokens of each tower so far and what the user wants."""

    def check(self, segments: Sequence[Segment]) -> None:
        """Raise a ZipperError for unknown towers, ids out of range, or more than a tower can read."""


@torch.inference_mode()
def generate(
    model: Model,
    prompts: Sequence[Sequence[Segment]],
    outputs: Sequence[str | Segment],
    sampling: Sampling,
    limits: Limits | None = None,
) -> list[list[Segment]]:
    """Produce one segment per item of `outputs` for every prompt of a batch.

    prompts: given segments, contents are ids without begin and end; all rows of a batch follow the same plan. outputs: tower
    names in order; a Segment instead of a name forces its ids as the beginning of what is produced. limits: most tokens per
    segment, default `model.limit`. A segment that hits its limit is closed and returned with ended=False. A row in which a tower
    has no room for a segment gets it and those after it empty, with ended=False; a ZipperError where that is so in every row.
    """
    plan = check(model, prompts, outputs, limits)
    shape, produced = [segment.tower for segment in prompts[0]], [segment.tower for segment in plan]
    state = model.start(tuple(dict.fromkeys(shape + produced)), tuple(dict.fromkeys(produced)))
    clock = Clock(len(prompts), model.ends())
    if shape:
        _, state = model.step(clock.read(prompts), state)

    towers = {*shape, *produced}
    alone = {t: _Alone(model, t, prompts) for t in {*produced} if sampling.guidance != 1 and len(towers) > 1}
    generators = sampling.generators(len(prompts))
    results: list[list[Segment]] = [[] for _ in prompts]
    room = torch.ones(len(prompts), dtype=torch.bool)
    for number, forced in enumerate(plan):
        tower, last = forced.tower, number == len(plan) - 1
        caps = _caps(model, tower, clock.seen(), (limits or {}).get(tower), room)
        state = state.compact(tower)
        if tower in alone:
            alone[tower].state = alone[tower].state.compact(tower)
        ids, scores, ended, state = _segment(model, state, clock, forced, caps, sampling, generators, last, alone.get(tower))
        for row, result in enumerate(results):
            result.append(Segment(tower, ids[row], ended=ended[row], score=scores[row]))
    return results


def planned(outputs: Sequence[str | Segment]) -> list[Segment]:
    """What is to be produced: a name is a segment that begins with nothing."""
    return [item if isinstance(item, Segment) else Segment(item, []) for item in outputs]


def check(
    model: Model, prompts: Sequence[Sequence[Segment]], outputs: Sequence[str | Segment], limits: Limits | None
) -> list[Segment]:
    """The plan that `outputs` name. Raises a ZipperError for what `generate` cannot do."""
    plan = planned(outputs)
    if not plan or not prompts:
        raise ZipperError(f"generate() got {len(prompts)} prompts and outputs {list(outputs)}; it needs at least one of each.")
    shape = [segment.tower for segment in prompts[0]]
    for prompt in prompts:
        if [segment.tower for segment in prompt] != shape:
            raise ZipperError("The prompts of one batch must name the same towers in the same order; call generate once per order.")
        model.check([*prompt, *plan])
    model.check([Segment(tower, []) for tower in check_limits(limits)])
    return plan


def check_limits(limits: Limits | None) -> dict[str, int]:
    """Limits of the caller's own that will not change. Raises a ZipperError for one that is no number of tokens."""
    own = dict(limits or {})
    for tower, limit in own.items():
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise ZipperError(f"limits[{tower!r}] is {limit!r}; a limit is a number of tokens, at least 1.")
    return own


def _segment(
    model: Model,
    state: Any,
    clock: "Clock",
    forced: Segment,
    caps: Int[Tensor, " batch"],
    sampling: Sampling,
    generators: list[torch.Generator],
    last: bool,
    alone: "_Alone | None",
) -> tuple[list[list[int]], list[float], list[bool], Any]:
    """One segment for every row: (ids without begin and end, log-probability, ended by itself, state). A cap of 0: no segment."""
    tower, (begin, end) = forced.tower, model.ends()[forced.tower]
    rows, alive = len(caps), caps > 0
    going = alive  # rows that are alive after what is read next: those that end still read their end, for the segments after them
    ids: list[list[int]] = [list(forced.content) if here else [] for here in alive]
    scores, ended = [0.0] * rows, [False] * rows
    next_ids = torch.tensor([[begin, *forced.content]] * rows)
    while True:
        hidden, state = model.step({tower: clock.say(tower, next_ids, alive)}, state)
        blind = alone.read(next_ids, alive) if alone else None
        alive = going
        if not alive.any():
            break
        logits = model.unembed(tower, hidden[tower][:, -1:])[:, 0].float()
        if begin != end:
            logits[:, begin] = -torch.inf  # a segment begins once
        weighed = logits if blind is None else sampling.guide(logits, blind)
        # Only rows that are alive draw: the stream of one that has ended must not depend on how long its neighbours go on.
        token, streams = torch.full((rows,), end), [g for g, a in zip(generators, alive, strict=True) if a]
        token[alive] = choose(weighed[alive.to(logits.device)], sampling, streams).cpu()
        logprob = logits.log_softmax(-1).cpu().gather(-1, token[:, None])[:, 0]
        for row in alive.nonzero().flatten().tolist():
            ended[row] = bool(token[row] == end)
            if not ended[row] and len(ids[row]) >= caps[row]:
                token[row] = end  # closed by force: not produced, so not in the score
                continue
            if not ended[row]:
                ids[row].append(int(token[row]))
            scores[row] += float(logprob[row])
        going = alive & (token != end)
        if last and not going.any():
            break
        next_ids = token[:, None]
    return ids, scores, ended, state


class _Alone:
    """A tower that has read its own segments only: what guidance leads away from."""

    def __init__(self, model: Model, tower: str, prompts: Sequence[Sequence[Segment]]) -> None:
        self.model, self.tower = model, tower
        self.state, self.clock = model.start((tower,), (tower,)), Clock(len(prompts), model.ends())
        own = [[segment for segment in prompt if segment.tower == tower] for prompt in prompts]
        if own[0]:
            _, self.state = model.step(self.clock.read(own), self.state)

    def read(self, ids: Int[Tensor, "batch length"], alive: Bool[Tensor, " batch"]) -> Float[Tensor, "batch vocabulary"]:
        """Logits behind these ids, where a row is alive."""
        hidden, self.state = self.model.step({self.tower: self.clock.say(self.tower, ids, alive)}, self.state)
        return self.model.unembed(self.tower, hidden[self.tower][:, -1:])[:, 0].float()


def _caps(
    model: Model, tower: str, seen: Sequence[Mapping[str, int]], wanted: int | None, room: Bool[Tensor, " batch"]
) -> Int[Tensor, " batch"]:
    """The limit of the next segment in every row, 0 where there is no room for it; such a row leaves `room`, in place."""
    caps = torch.zeros(len(seen), dtype=torch.long)
    for row in room.nonzero().flatten().tolist():
        try:
            caps[row] = model.limit(tower, seen[row], wanted)
        except ZipperError:
            room[row] = False
            if not room.any():
                raise
    return caps


class Clock:
    """Positions and times of every row: how many tokens each tower, and the whole sequence, has had."""

    def __init__(self, rows: int, ends: Mapping[str, Ends]) -> None:
        self.ends = ends
        self.time = torch.zeros(rows, dtype=torch.long)
        self.position: dict[str, Int[Tensor, " batch"]] = {}

    def read(self, prompts: Sequence[Sequence[Segment]]) -> dict[str, Strand]:
        """The given segments as left-padded strands."""
        strands = collate([[replace(s, weight=0.0) for s in prompt] for prompt in prompts], self.ends, left=True).strands
        for tower, strand in strands.items():
            self.position[tower] = (strand.document >= 0).sum(1)
            self.time += self.position[tower]
        return strands

    def say(self, tower: str, ids: Int[Tensor, "batch length"], alive: Tensor) -> Strand:
        """The next tokens of `tower` in the rows that are alive, padding in the others."""
        step = torch.arange(ids.shape[1])
        position = self.position.setdefault(tower, torch.zeros_like(self.time))
        document = torch.where(alive, 0, PADDING)[:, None].expand_as(ids)
        strand = Strand(ids, position[:, None] + step, self.time[:, None] + step, document)
        self.position[tower] = position + alive * ids.shape[1]
        self.time = self.time + alive * ids.shape[1]
        return strand

    def seen(self) -> list[dict[str, int]]:
        """Per row, the number of tokens of each tower so far."""
        return [{tower: int(n[row]) for tower, n in self.position.items()} for row in range(len(self.time))]


def default_limit(own: float, given: Mapping[str, tuple[int, float]], room: int) -> int:
    """A cap for a segment from what was given: three times the length that the usual token rates make likely, plus 16.

    own: usual tokens of a segment of this tower. given: {tower: (tokens so far, usual tokens of its segment)}; 0 = unknown.
    room: what the tower can still read.
    """
    ratios = [tokens * own / usual if own and usual else tokens for tokens, usual in given.values()]
    return max(1, min(math.ceil(3 * max(ratios, default=own or 64)) + 16, room))
