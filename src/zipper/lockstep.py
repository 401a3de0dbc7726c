"""The lock-step loop: towers run to where they halt, exchange through links, and run on.

This is the core of the paper (Zipper, arXiv:2405.18669, sec. 3). Training, the full forward and
cached decoding are the same loop; decoding passes a `State`. It knows towers, links and times; it
knows nothing of segments or files.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from zipper.config import LinkKey, Route
from zipper.link import BlockMask, InputProjection, Link, Memory, any_lengths, block_mask, project
from zipper.saving.files import MOST_LAYERS
from zipper.strand import Strand, visible
from zipper.tower import Past, Tower

#: Which tower reads which: (source, target).
Pair = tuple[str, str]


@dataclass(frozen=True)
class State:
    """What a zipped model has read so far; a value that `Zipper.step` takes and returns.

    towers: those the plan names, read or written. outputs: those that will produce.
    past: self-attention caches. read: every token read. memory: keys and values per link.
    unread: source states that a link has not turned into keys and values yet; it does so in one
    batch when its target next reads.
    """

    towers: tuple[str, ...]
    outputs: tuple[str, ...]
    past: dict[str, Past] = field(default_factory=dict)
    read: dict[str, Strand] = field(default_factory=dict)
    memory: dict[LinkKey, Memory] = field(default_factory=dict)
    unread: dict[LinkKey, tuple[Tensor, ...]] = field(default_factory=dict)

    def compact(self, tower: str) -> "State":
        """Close the gaps that rows which were silent left in a tower's self-attention cache."""
        if tower in self.past:
            self.past[tower].compact()
        return self

    def select(self, rows: Tensor) -> "State":
        """Keep, reorder or repeat rows of the batch; `rows` are indices."""
        for past in self.past.values():
            past.select(rows)
        return dataclasses.replace(
            self,
            read={name: strand.select(rows) for name, strand in self.read.items()},
            memory={key: Memory(m.keys[rows], m.values[rows]) for key, m in self.memory.items()},
            unread={key: tuple(h[rows] for h in parts) for key, parts in self.unread.items()},
        )


@dataclass(frozen=True)
class Parts:
    """What the loop runs: towers, their input projections, the links between them and the route
    through all of these.

    entrances: by tower the names of its input projections, and in whose company each is used.
    flex: links attend by FlexAttention where nothing is cached.
    """

    towers: nn.ModuleDict
    inputs: nn.ModuleDict
    links: nn.ModuleDict
    route: Route
    entrances: Mapping[str, Mapping[str, Sequence[str]]]
    flex: bool = False

    def tower(self, name: str) -> Tower:
        """One tower."""
        return cast(Tower, self.towers[name])

    def link(self, key: LinkKey) -> Link:
        """One link."""
        return cast(Link, self.links[str(key)])


class Tap(NamedTuple):
    """What a link is given: states of its source and of its target, both from before the
    exchange."""

    source: Tensor
    target: Tensor


@dataclass(frozen=True)
class Sight:
    """What strands see of one another in one pass.

    masks: by (source, target), only where anything is visible. blocks: the same as FlexAttention
    wants it, if it is used.
    """

    masks: Mapping[Pair, Bool[Tensor, "batch target source"]]
    blocks: Mapping[Pair, BlockMask]

    @classmethod
    def of(cls, strands: Mapping[str, Strand], read: Mapping[str, Strand], flex: bool) -> "Sight":
        """What each strand sees of all that the other towers have read."""
        masks = {}
        for target, strand in strands.items():
            for source in read:
                if source != target:
                    mask = visible(strand, read[source].to(strand.ids.device))
                    if mask.any():
                        masks[source, target] = mask
        return cls(masks, {pair: block_mask(mask) for pair, mask in masks.items()} if flex else {})


@any_lengths()
def advance(
    parts: Parts,
    strands: Mapping[str, Strand],
    state: State,
    cached: bool,
    taps: dict[LinkKey, Tap] | None = None,
    planned: bool = False,
) -> tuple[dict[str, Tensor], State]:
    """Read strands: states behind the last block of each tower in the plan's outputs, before the
    head, and the new state.

    Towers that are not in `strands` do not run; what they said before is in `state`. A plan of one
    tower takes the unimodal path: the bare tower, no projection, no link. taps: gets what each link
    is given. planned: all documents follow the plan, as where it is cached; else each is read by
    the towers that it has.
    """
    towers = {name: parts.tower(name) for name in strands}
    strands = {name: strand.to(towers[name].device) for name, strand in strands.items()}
    fresh = [name for name in strands if cached and name not in state.past]
    state = _entered(state, strands, {name: towers[name].new_past() for name in fresh})
    sight = Sight.of(strands, state.read, parts.flex and not cached)
    fused = len(state.towers) > 1

    hidden, passes, done = {}, {}, dict.fromkeys(strands, 0)
    for name, strand in strands.items():
        past = state.past.get(name) if cached else None
        h = towers[name].embed(strand, past)
        if parts.entrances[name]:
            read = None if cached or planned else strands
            h = _projected(parts, h, name, read, state.towers)
        hidden[name], passes[name] = h, towers[name].start(strand, h, past)

    shown: dict[LinkKey, Tensor] = {}
    ends = {name: _end(parts.route, name, state) for name in strands}
    for halt in parts.route.halts if fused else ():
        stops = [stop for stop in halt if stop.tower in strands and stop.layer <= ends[stop.tower]]
        for name, layer, _, _ in stops:
            hidden[name] = towers[name].run(hidden[name], range(done[name], layer), passes[name])
            done[name] = layer
        for key in chain(*(stop.shows for stop in stops)):
            shown[key] = hidden[key.source]
            if key.target in state.towers:
                state.unread[key] = (*state.unread.get(key, ()), shown[key])
        # Behind where it is last shown, a silent tower need not be fused.
        fused_here = [stop for stop in stops if stop.layer < ends[stop.tower]]
        keys = [*chain(*(stop.reads for stop in fused_here))]
        if taps is not None:
            taps.update((k, Tap(shown[k], hidden[k.target])) for k in keys if k in shown)
        hidden = _exchange(parts, keys, hidden, strands, state, sight)

    for name in (name for name in strands if name in state.outputs):
        rest = range(done[name], towers[name].layers)
        hidden[name] = towers[name].run(hidden[name], rest, passes[name])
    return {name: h for name, h in hidden.items() if name in state.outputs}, state


def _exchange(
    parts: Parts,
    keys: Sequence[LinkKey],
    hidden: dict[str, Tensor],
    strands: Mapping[str, Strand],
    state: State,
    sight: Sight,
) -> dict[str, Tensor]:
    """Every target reads, by these links, states that were shown before it is fused: the new dict
    is made from the old one.

    Several sources add up. A pair in which nothing is visible is skipped, which is exact: it would
    add 0 everywhere.
    """
    new = dict(hidden)
    for key in keys:
        pair = key.source, key.target
        if pair in sight.masks:
            link, strand = parts.link(key), strands[key.target]
            unread = state.unread.pop(key, ())
            memory = _memory(link, state.read[key.source], state.memory.get(key), unread)
            state.memory[key] = memory
            blocks = sight.blocks.get(pair)
            new[key.target] = new[key.target] + link(
                hidden[key.target], memory, sight.masks[pair], strand.position, blocks
            )
    return new


def _end(route: Route, tower: str, state: State) -> int:
    """Behind how many blocks a tower of a plan may stop: a silent one where it is last read."""
    if tower in state.outputs or not state.outputs:  # without outputs all is run, to be looked at
        return MOST_LAYERS
    return route.last_shown(tower, state.towers)


def _entered(state: State, strands: Mapping[str, Strand], fresh: Mapping[str, Past]) -> State:
    """The state once these strands are among what was read; its dicts are its own."""
    read = dict(state.read)
    for name, strand in strands.items():
        read[name] = read[name].followed(strand) if name in read else strand
    return dataclasses.replace(
        state,
        read=read,
        past={**fresh, **state.past},
        memory=dict(state.memory),
        unread=dict(state.unread),
    )


def _projected(
    parts: Parts,
    h: Tensor,
    name: str,
    read: Mapping[str, Strand] | None,
    company: Sequence[str],
) -> Tensor:
    """Embeddings through the input projections (paper: h^0 = ReLU(MLP(embed))) for this company,
    but for documents that none of it reads: these take the unimodal path. read: all that is read;
    None where it comes bit by bit, a plan of several towers being multi-modal throughout.
    """
    used: list[tuple[InputProjection, Tensor | None]] = []
    for key, partners in parts.entrances[name].items():
        there = [partner for partner in partners if partner in company]
        if there:
            mask = None if read is None else _shared(read[name], [read[n] for n in there])
            used.append((cast(InputProjection, parts.inputs[key]), mask))
    return project(h, used)


def _shared(strand: Strand, others: Sequence[Strand]) -> Bool[Tensor, "batch length"]:
    """Which tokens belong to a document that other towers read too."""
    mine = strand.document
    shared = torch.zeros_like(mine, dtype=torch.bool)
    for other in others:
        theirs = other.document.to(mine.device)
        shared |= (mine[:, :, None] == theirs[:, None, :]).any(-1)
    return shared


def _memory(link: Link, read: Strand, memory: Memory | None, unread: tuple[Tensor, ...]) -> Memory:
    """A link's memory, extended by the source states it had not read yet."""
    if unread:
        states = torch.cat(unread, dim=1)
        fresh = link.read(states, read.position[:, read.position.shape[1] - states.shape[1] :])
        if memory is None:
            return fresh
        return Memory(
            torch.cat([memory.keys, fresh.keys], dim=2),
            torch.cat([memory.values, fresh.values], dim=2),
        )
    assert memory is not None
    return memory
