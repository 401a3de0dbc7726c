"""The fast way to read: a zip as plain tensors, for a few tokens of a few sequences at a time.

Towers whose blocks are like Llama's are run here without transformers: fused projections, keys and
values in buffers with room to grow, no masks, no padding. What is read in one call is ragged: the
tokens of all sequences stand in one matrix, and only attention goes sequence by sequence. A tower
counts as known only if it repeats its own logits here; `Zipper.step` is the reference, and the way
for all others. Weights are taken at construction, and must not change after it; on a CPU some are
copied into other layouts. There all goes through one call of compiled code (`native`), if there is
a compiler; on CUDA single tokens go through graphs (`graphs`). Nothing here knows of sampling or
plans.
"""

import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from ctypes import c_int32
from functools import partial
from itertools import chain, pairwise
from types import FunctionType
from typing import Any, NamedTuple, cast, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from zipper.config import LinkKey, Stop
from zipper.errors import ZipperError
from zipper.fast import native
from zipper.fast.blocks import FastInput, FastLink, FastTower, attention, masked
from zipper.fast.graphs import Pool, Replay, Row, Said, Shape, above
from zipper.fast.plain import CUTS, Plain, plain, sample, truth
from zipper.fast.session import Cache, Entry, Place, Session, Shown
from zipper.fast.weights import Angles, Form, Table
from zipper.link import InputProjection, any_lengths
from zipper.model import Zipper
from zipper.reading import Logits, Piece
from zipper.tower import UnsupportedTower

PREPARED = 8  # steps that are held ready
MOST_PARTS = 64  # that a session keeps apart of what nobody has read yet


@final
class Fused:
    """A zip compiled for decoding; see the module."""

    def __init__(
        self, model: Zipper, int8: bool = False, static: bool | None = None, compiled: bool = False
    ) -> None:
        """int8: blocks, heads and links with weights in 8 bits. static: single tokens go through
        steps of fixed shapes (`graphs`), by default on CUDA. compiled: those steps by
        torch.compile. Raises UnsupportedTower where a tower is not of a known kind, a ZipperError
        for compiled steps without fixed shapes.
        """
        self.model = model
        device = next(model.parameters()).device
        pooled = device.type == "cuda" if static is None else static
        towers = {name: plain(tower) for name, tower in model.towers.items()}
        form = Form(int8, not pooled and self._compilable(towers.values()))
        self._towers = {name: FastTower(tower, form) for name, tower in towers.items()}
        self._links = {key: FastLink(model.link(*key), form) for key in model.config.links}
        self._entrances: dict[Entry, FastInput] = {}
        self._turns: dict[tuple[float, int] | None, Table] = {}
        for link in self._links.values():
            for turns in filter(None, (link.turns, link.key_turns)):
                self._turns[turns] = Table(partial(link.angles, turns[0]))
        self._stops = {name: model.config.route.stops(name) for name in self._towers}
        self._between = _between(self._stops)
        self._ends = {name: model.config.route.last_shown(name, towers) for name in towers}
        # What is laid out is shared by all engines, and they may be of several threads.
        self._reading = threading.Lock()
        self._prepared: dict[tuple[Any, ...], Prepared] = {}
        self._chooses = bool(model.config.chooses)
        self._far = 0
        self._pool = self._pooled() if pooled else None
        if compiled and self._pool is None:
            raise ZipperError(
                "compiled=True is for steps of fixed shapes, which are the default on CUDA; this "
                f"model is on {device}. "
                "Move it to CUDA, or leave compiled out: a CPU has a compiled step of its own."
            )
        self._replays: dict[tuple[Any, ...], Replay] = {}
        self._inductor = compiled
        self._native = form.compiled
        for name, tower in self._towers.items():
            self._prove(name, 0.1 if int8 or tower.table.dtype != torch.float32 else 1e-3)

    @torch.inference_mode()
    def open(self, towers: Sequence[str], outputs: Sequence[str]) -> Session:
        """An empty sequence for a plan that reads and writes `towers`; only `outputs` will be asked
        for logits."""
        entries: dict[str, Entry] = dict.fromkeys(towers)
        for name in towers if len(towers) > 1 else ():
            parts = self.model.config.inputs[name].items()
            entries[name] = tuple(part for part, company in parts if {*company} & {*towers})
        session = Session(tuple(towers), tuple(outputs), entries)
        if self._pool is not None:
            session.row = self._pool.take()
            weakref.finalize(session, self._pool.free, session.row)
        return session

    @torch.inference_mode()
    def fork(self, session: Session) -> Session:
        """A copy that goes on by itself."""
        twin = self.open(session.towers, session.outputs)
        twin.states = dict(session.states)
        twin.unread = {pair: list(shown) for pair, shown in session.unread.items()}
        for name, cache in session.caches.items():
            twin.caches[name] = cache.copy(twin.row) if isinstance(cache, Row) else cache.fork()
        for link, memory in session.memory.items():
            twin.memory[link] = memory.copy(twin.row) if isinstance(memory, Row) else memory.share()
        return twin

    @torch.inference_mode()
    def read(self, pieces: Mapping[str, Sequence[Piece]]) -> dict[str, Logits]:
        """See `Reader`. What a sequence reads of one tower is shown to its others at the end of the
        step. Raises a ZipperError for an id that is none of the tower's, before anything is
        read.
        """
        for tower, given in pieces.items():
            known = len(self._towers[tower].table)
            for _, ids in given:
                if not 0 <= min(ids) <= max(ids) < known:
                    raise ZipperError(
                        f"{tower} was given ids from {min(ids)} to {max(ids)}; it knows those "
                        f"from 0 to {known - 1}."
                    )
        shown: list[tuple[Session, tuple[str, str], Shown]] = []
        with self._reading:
            found = {tower: self._read(tower, given, shown) for tower, given in pieces.items()}
        for session, pair, states in shown:
            unread = session.unread.setdefault(pair, [])
            unread.append(states)
            if len(unread) == MOST_PARTS:
                session.unread[pair] = [Shown.joined(unread)]
        return found

    def state(self, session: Session, tower: str) -> Float[Tensor, " width"]:
        """See `Reader`."""
        return session.states[tower]

    def link(self, key: LinkKey) -> FastLink:
        """A link of the model."""
        return self._links[key]

    def bytes(self, tower: str) -> tuple[int, int]:
        """Weights that one token reads: of the tower, and of the links into it where all sources
        are visible."""
        return self._towers[tower].bytes, sum(self._links[key].bytes for key in self._heard(tower))

    def turned(self, link: LinkKey, position: Int[Tensor, " tokens"]) -> Angles | None:
        """Rotary positions at the rate of a link's source."""
        table = self._turns.get(self._links[link].turns)
        return None if table is None else table.at(position)

    def _read(
        self,
        tower: str,
        pieces: Sequence[Piece],
        shown: list[tuple[Session, tuple[str, str], Shown]],
    ) -> Logits:
        """The pieces of one tower. shown: gets what other towers may read from the next step on."""
        answers: Logits = [None] * len(pieces)
        # A plan of one tower goes by no links, one in which the tower is silent stops early.
        paths: dict[tuple[Entry, bool], list[int]] = {}
        for index, (session, _) in enumerate(pieces):
            path = session.entries[tower], tower in session.outputs
            paths.setdefault(path, []).append(index)
        for (entry, speaks), indices in paths.items():
            for group, step in self._groups(indices, [len(ids) for _, ids in pieces]):
                logits = self._read_alike(
                    tower, [pieces[index] for index in group], entry, speaks, step, shown
                )
                if logits is not None:
                    for index, row in zip(group, logits, strict=True):
                        answers[index] = row
        return answers

    def _groups(
        self, indices: Sequence[int], lengths: Sequence[int]
    ) -> Iterator[tuple[Sequence[int], "_Way"]]:
        """What is read together, and how: where there is a pool, single tokens by a replay and the
        rest by torch."""
        if self._pool is None:
            yield indices, self._step if self._native else self._run
            return
        single = [index for index in indices if lengths[index] == 1]
        rest = [index for index in indices if lengths[index] > 1]
        for group, step in (single, self._replay), (rest, self._run):
            if group:
                yield group, step

    def _halts(self, name: str, entry: Entry, end: int) -> list[Stop]:
        """Where a tower halts on its way, none on the unimodal path."""
        if entry is None:
            return []
        return [stop for stop in self._stops[name] if stop.layer <= end]

    def _heard(self, name: str) -> list[LinkKey]:
        """The links by which a tower reads others."""
        return list(chain.from_iterable(stop.reads for stop in self._stops[name]))

    def _read_alike(
        self,
        name: str,
        pieces: Sequence[Piece],
        entry: Entry,
        speaks: bool,
        step: "_Way",
        shown: list[tuple[Session, tuple[str, str], Shown]],
    ) -> Float[Tensor, "sessions vocabulary"] | None:
        """Pieces that go the same way, in one call."""
        places, row = [], 0
        for session, piece in pieces:
            if name not in session.caches:
                session.caches[name] = self._empty(name, self._towers[name].shape, session)
            cache = session.caches[name]
            cache.reserve(len(piece))
            places.append(Place(session, cache, row, row := row + len(piece)))
        self._listen(name, places, self._end(name, speaks))
        positions: list[int] = []
        for place in places:
            positions += range(place.cache.length, place.cache.length + place.stop - place.start)
        ids = list(chain.from_iterable(ids for _, ids in pieces))
        spoken, kept = step(Turn(name, ids, positions, places, entry, speaks))
        for session, cache, start, stop in places:
            cache.length += stop - start
            if speaks and self._chooses:
                session.states[name] = kept[-1][stop - 1].clone()
            for pair in self._between if entry is not None else ():
                if pair[0] == name and pair[1] in session.towers:
                    shown.append((session, pair, Shown(kept, start, stop)))
        return spoken

    def _end(self, name: str, speaks: bool) -> int:
        """Behind how many blocks a tower may stop: a silent one where it is last shown."""
        return self._towers[name].layers if speaks else self._ends[name]

    def _empty(self, name: Hashable, shape: Shape, session: Session) -> Cache | Row:
        """A session's keys and values of a tower or a link, none yet."""
        return Cache(shape) if self._pool is None else Row(self._pool, name, session.row)

    def _listen(self, name: str, places: Sequence[Place], end: int) -> None:
        """The links into a tower read what was kept for them, in one batch each; those that are
        fused at its end, or behind it, are of no use to it."""
        later, alive = list[native.Unread](), list[Tensor]()
        for session, *_ in places:
            for pair in [pair for pair in session.unread if pair[1] == name]:
                shown = session.unread.pop(pair)
                for number, key in self._between[pair]:
                    if self.model.config.fused(key) >= end:
                        continue
                    link = self._links[key]
                    if key not in session.memory:
                        session.memory[key] = self._empty(key, link.shape, session)
                    memory = session.memory[key]
                    parts = [part.kept[number][part.start : part.stop] for part in shown]
                    states = parts[0] if len(parts) == 1 else torch.cat(parts)
                    if self._native and isinstance(memory, Cache):
                        alive.append(states)
                        table = self._turns.get(link.key_turns)
                        later.append(link.unread(memory, states, table and table.single))
                    else:
                        link.read(memory, states)
        if later:
            native.read(later)

    @any_lengths()
    def _run(self, turn: "Turn") -> "_Read":
        """One kernel after another, for any number of tokens."""
        name, ids, positions, places, entry, speaks = turn
        tower = self._towers[name]
        self._reach(1 + max(positions))
        position = torch.tensor(positions, device=tower.device)
        h = self._embed(name, torch.tensor(ids, device=tower.device), entry)
        spoken = [place.stop - 1 for place in places]
        return self._walk(
            name, h, Ragged(self, places, position), entry, spoken if speaks else None
        )

    def _reach(self, length: int) -> None:
        """Sees to it that there are rotary positions for so many tokens."""
        if length > self._far:
            self._far = max(length, 2 * self._far, 256)
            for table in (
                *(tower.angles for tower in self._towers.values()),
                *self._turns.values(),
            ):
                table.grow(self._far)
            self._prepared.clear()  # they point to the old ones
            self._replays.clear()

    def _embed(
        self, name: str, ids: Int[Tensor, " tokens"], entry: Entry
    ) -> Float[Tensor, "tokens width"]:
        h = F.embedding(ids, self._towers[name].table)
        return self._entrance(entry)(h) if entry else h

    def _entrance(self, entry: Entry) -> FastInput:
        """Input projections that embeddings go through."""
        if entry not in self._entrances:
            modules = [cast(InputProjection, self.model.inputs[part]) for part in entry or ()]
            self._entrances[entry] = FastInput(modules)
        return self._entrances[entry]

    def _walk(
        self,
        name: str,
        h: Tensor,
        way: "Ragged | Fixed",
        entry: Entry,
        spoken: Sequence[int] | slice | None,
    ) -> "_Read":
        """Embeddings to the logits of the tokens that are spoken."""
        tower, done = self._towers[name], 0
        kept: list[Tensor] = []
        angles = tower.angles.at(way.position)
        end = self._end(name, spoken is not None)
        for stop in self._halts(name, entry, end):
            h, done = tower.run(h, range(done, stop.layer), angles, way), stop.layer
            kept.append(h)
            for link in stop.reads if stop.layer < end else ():
                h = way.exchange(link, kept[-1], h)
        if spoken is None:
            return None, kept
        h = tower.run(h, range(done, tower.layers), angles, way)
        if self._chooses:
            kept.append(h)
        return tower.unembed(h[spoken]), kept

    def _replay(self, turn: "Turn") -> "_Read":
        """One token of each session, in a shape that has perhaps been there before."""
        name, ids, positions, places, entry, speaks = turn
        assert self._pool is not None
        rows, seen = [place.session.row for place in places], dict[LinkKey, list[int]]()
        for link in self._heard(name) if entry is not None else ():
            memories = [place.session.memory.get(link) for place in places]
            if any(memories):
                seen[link] = [memory.length if memory else 0 for memory in memories]
        batch, reach = above(1 + max(rows), least=1), above(1 + max(positions))
        span = above(max(map(max, seen.values()), default=0))
        self._reach(reach)
        key = name, entry, speaks, tuple(seen), batch, reach, span
        shape = 3 + len(seen), batch
        if key not in self._replays:
            step = self._fixed(name, entry, speaks, tuple(seen), reach, span)
            self._replays[key] = Replay(step, shape, self._towers[name].device, self._inductor)
        given = torch.zeros(shape, dtype=torch.long)
        given[:, rows] = torch.tensor([ids, positions, [1] * len(rows), *seen.values()])
        logits, kept = self._replays[key](given)
        if logits is not None:
            logits = logits[rows]
        if kept is None:
            return logits, ()
        return logits, kept[:, rows]

    def _fixed(
        self, name: str, entry: Entry, speaks: bool, seen: Sequence[LinkKey], reach: int, span: int
    ) -> FunctionType:
        """A step for `Replay`. Its input: ids, positions, whether a row takes part, and how much of
        each link in `seen` it sees."""

        def step(given: Int[Tensor, "numbers rows"]) -> Said:
            ids, position, active, *slots = given.unbind()
            assert self._pool is not None
            way = Fixed(
                self,
                self._pool,
                name,
                position,
                active > 0,
                dict(zip(seen, slots, strict=True)),
                reach,
                span,
            )
            logits, kept = self._walk(
                name, self._embed(name, ids, entry), way, entry, slice(None) if speaks else None
            )
            if not len(kept):
                return logits, None
            return logits, torch.stack(list(kept))

        assert isinstance(step, FunctionType)
        return step

    def _pooled(self) -> Pool:
        shapes: dict[Hashable, Shape] = {name: tower.shape for name, tower in self._towers.items()}
        shapes.update((key, link.shape) for key, link in self._links.items())
        return Pool(shapes, lambda: self._replays.clear())

    def _step(self, turn: "Turn") -> "_Read":
        """The same by one call of compiled code."""
        name, ids, positions, places, entry, speaks = turn
        tower = self._towers[name]
        self._reach(1 + max(positions))
        seen = tuple(
            link
            for link in (self._heard(name) if entry is not None else ())
            if any(link in place.session.memory for place in places)
        )
        key = name, entry, speaks, seen, tuple(place.stop for place in places)
        if (prepared := self._prepared.get(key)) is None:
            if len(self._prepared) == PREPARED:
                self._prepared.clear()
            prepared = self._prepared[key] = self._prepare(name, places, seen, entry, speaks)
        shape = len(prepared.keeps), len(ids), tower.table.shape[1]
        kept = torch.empty(shape, dtype=torch.float32, device="cpu")  # whatever the defaults are
        place, size = kept.data_ptr(), kept.element_size() * kept.stride(0)
        for number, stage in enumerate(prepared.keeps):
            stage.keep = place + number * size
        tokens: list[tuple[int, int, int, int, int]] = []
        for number, (_, cache, start, stop) in enumerate(places):
            held, room = cache.held.data_ptr(), cache.held.shape[3]
            mine = zip(positions[start:stop], ids[start:stop], strict=True)
            tokens += [(held, room, position, token, number) for position, token in mine]
        memory = [[_seen(place.session.memory.get(link)) for place in places] for link in seen]
        end = tower.angles.single, tower.table, tower.norm.struct, tower.head.struct
        logits = native.step(prepared.stages, tokens, memory, prepared.spoken, *end)
        return logits if speaks else None, kept

    def _prepare(
        self,
        name: str,
        places: Sequence[Place],
        seen: Sequence[LinkKey],
        entry: Entry,
        speaks: bool,
    ) -> "Prepared":
        """What is the same in every step of so many tokens that see something through `seen`."""
        tower, done = self._towers[name], 0
        stages, keeps = list[native.Stage](), list[int]()
        if entry:
            stages.append(self._entrance(entry).stage)
        end = self._end(name, speaks)
        for stop in self._halts(name, entry, end):
            stages += tower.stages[done : stop.layer]
            done = stop.layer
            keeps.append(len(stages))
            stages.append(native.Stage())
            reads = [key for key in stop.reads if stop.layer < end and key in seen]
            for key in reads:
                part = self._links[key]
                table = self._turns.get(part.turns)
                angles = None if table is None else table.single
                stages.append(part.stage(seen.index(key), angles, key == reads[-1]))
        if speaks:
            stages += tower.stages[done:]
        if speaks and self._chooses:
            keeps.append(len(stages))
            stages.append(native.Stage())
        laid = native.array(native.Stage, stages)
        spoken = [place.stop - 1 for place in places] if speaks else []
        return Prepared(laid, [laid[index] for index in keeps], native.array(c_int32, spoken))

    def _compilable(self, towers: Iterable[Plain]) -> bool:
        """Whether compiled code can multiply by all weights that there are, and knows the
        activation of all blocks."""
        kinds = {(p.device.type, p.dtype) for p in self.model.parameters()}
        if (
            not kinds <= {("cpu", torch.float32), ("cpu", torch.bfloat16)}
            or native.library() is None
        ):
            return False
        return all(tower.silu for tower in towers)

    @torch.inference_mode()
    def _prove(self, name: str, tolerance: float) -> None:
        """Raises UnsupportedTower unless random ids, many at once, a few and one by one, have the
        logits of the tower itself, up to `tolerance` of their spread."""
        tower = self._towers[name]
        ids, wanted = sample(len(tower.table)), truth(self.model.towers[name])
        session, found = self.open([name], [name]), []
        for start, stop in pairwise(CUTS):
            (logits,) = self.read({name: [(session, ids[start:stop])]})[name]
            assert logits is not None
            found.append(logits.float())
        error = (torch.stack(found) - wanted).norm(dim=-1)
        if not (error / (wanted - wanted.mean(-1, keepdim=True)).norm(dim=-1) <= tolerance).all():
            raise UnsupportedTower(
                f"The logits of {tower.name} differ from its own by {float(error.max()):.3g} on "
                "the fast path."
            )


@final
class Ragged:
    """Tokens of some sessions in one matrix, any number of each: attention goes session by
    session."""

    def __init__(
        self, reader: Fused, places: Sequence[Place], position: Int[Tensor, " tokens"]
    ) -> None:
        self.reader, self.places, self.position = reader, places, position
        # Links of the same rate share them.
        self._turned: dict[tuple[float, int] | None, Angles | None] = {}

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float, layer: int
    ) -> Float[Tensor, "tokens attended"]:
        """Keeps keys and values of a block, and attends to all that there are."""
        attended = []
        for _, cache, start, stop in self.places:
            past, end = cache.length, cache.length + stop - start
            held, said = cache.layer(layer)
            held[:, past:end] = keys[start:stop].transpose(0, 1)
            said[:, past:end] = values[start:stop].transpose(0, 1)
            attended.append(
                attention(query[start:stop], held[:, :end], said[:, :end], scale, causal=True)
            )
        return torch.cat(attended) if len(attended) > 1 else attended[0]

    def exchange(
        self, name: LinkKey, states: Tensor, h: Float[Tensor, "tokens width"]
    ) -> Float[Tensor, "tokens width"]:
        """Adds what a link makes of `states`, for the tokens that see something."""
        seeing = [place for place in self.places if name in place.session.memory]
        if not seeing:
            return h
        link, memories = self.reader.link(name), [place.session.memory[name] for place in seeing]
        lengths = [place.stop - place.start for place in seeing]
        if link.turns not in self._turned:
            self._turned[link.turns] = self.reader.turned(name, self.position)
        angles = self._turned[link.turns]

        def attend(query: Tensor, scale: float) -> Tensor:
            parts = zip(
                query.split(lengths) if len(lengths) > 1 else [query], memories, strict=True
            )
            attended = []
            for part, memory in parts:
                keys, values = (kept[:, : memory.length] for kept in memory.layer(0))
                attended.append(attention(part, keys, values, scale, causal=False))
            return torch.cat(attended) if len(attended) > 1 else attended[0]

        if len(seeing) == len(self.places):
            return h + link(states, angles, attend)
        rows = torch.cat([torch.arange(p.start, p.stop, device=h.device) for p in seeing])
        turned = None if angles is None else Angles(*(part[rows] for part in angles))
        return h.index_add(0, rows, link(states[rows], turned, attend))


@final
class Fixed:
    """One token in each of the first rows of a pool. Rows that do not take part write behind all
    that is read."""

    def __init__(
        self,
        reader: Fused,
        pool: Pool,
        name: str,
        position: Int[Tensor, " rows"],
        active: Bool[Tensor, " rows"],
        seen: Mapping[LinkKey, Int[Tensor, " rows"]],
        reach: int,
        span: int,
    ) -> None:
        """seen: by link, slots of its memory. reach, span: slots of the tower and of links that are
        looked at."""
        self.reader, self.pool, self.position, self.seen, self.span = (
            reader,
            pool,
            position,
            seen,
            span,
        )
        self._held, self._reach = pool.held[name][: len(position)], reach
        self._rows = torch.arange(len(position), device=position.device)
        self._slot = torch.where(active, position, self._held.shape[4] - 1)
        self._mask = self._first(position + 1, reach)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float, layer: int
    ) -> Float[Tensor, "rows attended"]:
        """As `Ragged.attend`."""
        held, said = self._held[:, layer].unbind(1)
        held[self._rows, :, self._slot] = keys.to(held.dtype)
        said[self._rows, :, self._slot] = values.to(said.dtype)
        return masked(
            query, scale, held[:, :, : self._reach], said[:, :, : self._reach], self._mask
        )

    def exchange(
        self, name: LinkKey, states: Tensor, h: Float[Tensor, "rows width"]
    ) -> Float[Tensor, "rows width"]:
        """As `Ragged.exchange`."""
        if name not in self.seen:
            return h
        slots = self.seen[name]
        keys, values = self.pool.held[name][: len(slots), 0, :, :, : self.span].unbind(1)
        # Where nothing is seen, the first slot is, and for nothing.
        mask = self._first(slots.clamp(min=1), self.span)
        attend = partial(masked, keys=keys, values=values, mask=mask)
        added = self.reader.link(name)(states, self.reader.turned(name, self.position), attend)
        return h + added.where(slots[:, None] > 0, 0)

    @staticmethod
    def _first(slots: Int[Tensor, " rows"], of: int) -> Bool[Tensor, "rows 1 1 slots"]:
        return (torch.arange(of, device=slots.device) < slots[:, None])[:, None, None]


class Turn(NamedTuple):
    """What is read at once of one tower: ids and their positions, end to end in `places`, through
    the input projections of `entry`. speaks: whether logits are wanted."""

    name: str
    ids: Sequence[int]
    positions: Sequence[int]
    places: Sequence[Place]
    entry: Entry
    speaks: bool


class Prepared(NamedTuple):
    """A compiled step of so many tokens of so many sessions. keeps: the stages that keep states."""

    stages: Any
    keeps: list[native.Stage]
    spoken: Any


def _seen(memory: Cache | Row | None) -> tuple[int, int, int]:
    """What a session sees through a link, as the compiled step takes it."""
    if memory is None:
        return 0, 0, 0
    return memory.held.data_ptr(), memory.held.shape[3], memory.length


def _between(
    stops: Mapping[str, Sequence[Stop]],
) -> dict[tuple[str, str], list[tuple[int, LinkKey]]]:
    """By (source, target): the links between them, each with the number of the halt at which its
    source is read."""
    found: dict[tuple[str, str], list[tuple[int, LinkKey]]] = {}
    for halts in stops.values():
        for number, stop in enumerate(halts):
            for key in stop.shows:
                found.setdefault((key.source, key.target), []).append((number, key))
    return found


_Way = Callable[[Turn], "_Read"]  # to read them
#: Logits of the places, and states at the tower's halts.
_Read = tuple[Float[Tensor, "sessions vocabulary"] | None, Sequence[Tensor] | Tensor]
