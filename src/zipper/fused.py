"""The fast way to read: a zip as plain tensors, for a few tokens of a few sequences at a time.

Towers whose blocks are like Llama's are run here without transformers: fused projections, keys and values in buffers with room to
grow, no masks, no padding. What is read in one call is ragged: the tokens of all sequences stand in one matrix, and only attention
goes sequence by sequence. A tower counts as known only if it repeats its own logits here; `Zipper.step` is the reference, and the
way for all others. Weights are taken at construction, and must not change after it; on a CPU some are copied into other layouts.
There all goes through one call of compiled code (`native`), if there is a compiler; on CUDA single tokens go through graphs
(`graphs`). Nothing here knows of sampling or plans.
"""

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from ctypes import addressof, c_int32, pointer
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import count, pairwise
from types import FunctionType
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from zipper import native
from zipper.errors import ZipperError
from zipper.graphs import Pool, Replay, Row, Said, Shape, above
from zipper.link import InputProjection, Link, Memory, rotate
from zipper.model import Zipper, link_name
from zipper.plain import CUTS, Block, Held, Plain, plain, sample, truth
from zipper.tower import UnsupportedTower

#: With AMX a product with one row in bfloat16 is slow as a matrix product, without AMX as a matrix-vector product (docs/log.md).
AMX = torch.cpu._is_amx_tile_supported()
#: What oneDNN multiplies by weights that it has packed: one row in bfloat16 in half of the time, eight rows also in float32.
PACKED: set[torch.dtype] = set()
if torch.backends.mkldnn.is_available():
    PACKED = {torch.float32} | ({torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set())

STAMPS = count()
PREPARED = 8  # steps of certain sessions that are held ready


class Form(NamedTuple):
    """How weights are kept. int8: in 8 bits, one scale a row; not where rows are no multiple of 32. compiled: for `native`."""

    int8: bool
    compiled: bool


@final
class Matrix:
    """x -> x W^T + b of one or several linear layers that read the same; on a CPU by whatever kernel is fastest there."""

    def __init__(self, layers: Sequence[nn.Linear | Held], form: Form, factor: float = 1.0) -> None:
        """factor: of the whole product."""
        weights = [layer.weight.detach() for layer in layers]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        weight = weight if factor == 1 else weight * factor
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        if biases and len(biases) < len(layers):
            raise UnsupportedTower("Some of its fused projections have a bias and some have none.")
        self.bias: Tensor | None = torch.cat(biases) * factor if biases else None
        self.scale: Float[Tensor, " out"] | None = None
        if form.int8 and weight.shape[1] % 32 == 0:  # torch's kernel reads beyond the end of other rows
            self.scale = weight.float().abs().amax(1).clamp(min=1e-12) / 127
            weight = (weight.float() / self.scale[:, None]).round().to(torch.int8)
        self.bytes = sum(t.numel() * t.element_size() for t in (weight, self.bias, self.scale) if t is not None)
        self._compiled = form.compiled
        if form.compiled:
            self._held = native.laid_out(weight), _single(self.scale), _single(self.bias)
            self.struct = native.matrix(*self._held, *weight.shape)
        else:
            self._many, self._one = self._kernels(weight)

    def _kernels(self, weight: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """x -> x W^T by torch, for several tokens and for one."""
        if self.scale is not None and weight.device.type != "cpu":
            scale = self.scale
            return (wide := lambda x: F.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)), wide
        if self.scale is not None:
            scale = self.scale.bfloat16()
            return (eight := lambda x: torch._weight_int8pack_mm(x.bfloat16(), weight, scale).to(x.dtype)), eight
        if weight.device.type != "cpu" or weight.dtype not in PACKED:
            return (plain := partial(F.linear, weight=weight)), plain
        laid = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        packed = lambda x: torch.ops.mkldnn._linear_pointwise(x, laid, None, "none", [], "")  # noqa: E731
        if weight.dtype == torch.float32 and weight.shape[0] > weight.shape[1]:
            long = weight.T.contiguous()  # along its longer side, twice as fast
            return packed, lambda x: torch.mm(x, long)
        if weight.dtype == torch.bfloat16 and AMX:
            return packed, lambda x: torch.mv(weight, x[0])[None]
        return packed, packed

    def __call__(self, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens out"]:
        """The product, in x's dtype."""
        if self._compiled:
            return native.product(self.struct, x).to(x.dtype)
        y = self._one(x) if len(x) == 1 else self._many(x)
        return y if self.bias is None else y + self.bias


def _single(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.float().contiguous()


@final
class Cache:
    """Keys and values of what one sequence has read in one tower, with room to grow: explicit lengths instead of joined tensors."""

    def __init__(self, shape: Shape) -> None:
        self.length = 0
        empty = shape.layers, 2, shape.heads, 0, shape.head_width
        self.held: Float[Tensor, "layers 2 heads room head_width"] = shape.like.new_empty(empty)
        self._layers: list[tuple[Tensor, Tensor]] = []  # as views

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer."""
        return self._layers[index]

    def reserve(self, tokens: int) -> None:
        """Makes room for so many more; grows by half at least, so that a long segment is seldom copied."""
        wanted, room = self.length + tokens, self.held.shape[3]
        if wanted > room:
            self._move(max(wanted, room + room // 2, 64))

    def fork(self) -> "Cache":
        """A copy that goes on by itself."""
        twin = copy.copy(self)
        twin._move(self.length + 32)
        return twin

    def _move(self, room: int) -> None:
        """To other memory, with room for so many tokens."""
        moved = _empty((*self.held.shape[:3], room, self.held.shape[4]), self.held)
        moved[:, :, :, : self.length] = self.held[:, :, :, : self.length]
        self.held = moved
        self._layers = [(layer[0], layer[1]) for layer in moved]


class Angles(NamedTuple):
    """Rotary positions of tokens, laid out for `_turn`."""

    cos: Float[Tensor, "tokens 1 head_width"]
    sin: Float[Tensor, "tokens 1 head_width"]


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Memory for keys and values, uninitialised; tests fill it with NaN."""
    return like.new_empty(shape)


@dataclass
class Session:
    """One sequence: what it has read.

    towers: those of its plan. outputs: those that will produce, the others run no further than their last junction. memory: of
    links that `towers` hold. unread: {(source, target): states of the source that links into the target have not read yet}. stamp:
    no other session has it, nor this one with another memory. row: in the pool, if there is one.
    """

    towers: tuple[str, ...]
    outputs: tuple[str, ...]
    caches: dict[str, Cache | Row] = field(default_factory=dict)
    memory: dict[str, Memory] = field(default_factory=dict)
    unread: dict[tuple[str, str], list["_Shown"]] = field(default_factory=dict)
    stamp: int = field(default_factory=STAMPS.__next__)
    row: int = -1


@final
class Fused:
    """A zip compiled for decoding; see the module."""

    def __init__(self, model: Zipper, int8: bool = False, static: bool | None = None, compiled: bool = False) -> None:
        """int8: blocks, heads and links with weights in 8 bits. static: single tokens go through steps of fixed shapes (`graphs`),
        by default on CUDA. compiled: those steps by torch.compile. Raises UnsupportedTower where a tower is not of a known kind, a
        ZipperError for compiled steps without fixed shapes.
        """
        self.model = model
        device = next(model.parameters()).device
        pooled = device.type == "cuda" if static is None else static
        towers = {name: plain(tower) for name, tower in model.towers.items()}
        form = Form(int8, not pooled and self._compilable(towers.values()))
        self._towers = {name: _Tower(tower, form) for name, tower in towers.items()}
        self._links = {name: _Link(link, form) for name, link in model.links.items() if isinstance(link, Link)}
        self._inputs = {name: _Input(part) for name, part in model.inputs.items() if isinstance(part, InputProjection)}
        self._turns = {link.scale: _Table(link.angles) for link in self._links.values() if link.link.config.rotary}
        self._stops = {name: tuple(_stops(name, model)) for name in self._towers}
        self._ears = {name: {link for stop in stops for link in stop.reads} for name, stops in self._stops.items()}
        shown = {name: {link for stop in stops for link in stop.shows} for name, stops in self._stops.items()}
        self._audience = {name: [n for n, ears in self._ears.items() if ears & shown[name]] for name in self._stops}
        self._prepared: dict[tuple[Any, ...], _Prepared] = {}
        self._far = 0
        self._pool = self._pooled() if pooled else None
        if compiled and self._pool is None:
            raise ZipperError(
                f"compiled=True is for steps of fixed shapes, which are the default on CUDA; this model is on {device}. "
                "Move it to CUDA, or leave compiled out: a CPU has a compiled step of its own."
            )
        self._replays: dict[tuple[Any, ...], Replay] = {}
        self._inductor = compiled
        self._native = form.compiled
        for name, tower in self._towers.items():
            self._prove(name, 0.1 if int8 or tower.table.dtype != torch.float32 else 1e-3)

    @torch.inference_mode()
    def open(self, towers: Sequence[str], outputs: Sequence[str]) -> Session:
        """An empty sequence for a plan that reads and writes `towers`; only `outputs` will be asked for logits."""
        session = Session(tuple(towers), tuple(outputs))
        if self._pool is not None:
            session.row = self._pool.take()
            weakref.finalize(session, self._pool.free, session.row)
        return session

    @torch.inference_mode()
    def fork(self, session: Session) -> Session:
        """A copy that goes on by itself. What links hold is shared: it is replaced, never written to."""
        twin = self.open(session.towers, session.outputs)
        twin.memory, twin.unread = dict(session.memory), {pair: list(shown) for pair, shown in session.unread.items()}
        for name, cache in session.caches.items():
            if isinstance(cache, Row):
                cache.pool.copy(name, session.row, twin.row, cache.length)
                twin.caches[name] = Row(cache.pool, name, twin.row, cache.length)
            else:
                twin.caches[name] = cache.fork()
        if self._pool is not None:
            for link, memory in session.memory.items():
                self._pool.copy(link, session.row, twin.row, memory.keys.shape[2])
        return twin

    @torch.inference_mode()
    def read(self, tower: str, pieces: Sequence[tuple[Session, Sequence[int]]]) -> list[Float[Tensor, " vocabulary"] | None]:
        """Every session reads at least one more token of this tower. Returns the logits behind its last one, None where its plan
        wants none. The tokens are later than all that the session has read, so they see all of it (`model.visible`). Raises a
        ZipperError for an id that is none of the tower's, before anything is read."""
        known = len(self._towers[tower].table)
        for _, ids in pieces:
            if not 0 <= min(ids) <= max(ids) < known:
                raise ZipperError(f"{tower} was given ids from {min(ids)} to {max(ids)}; it knows those from 0 to {known - 1}.")
        answers: list[Tensor | None] = [None] * len(pieces)
        paths: dict[tuple[bool, bool], list[int]] = {}  # a plan of one tower goes by no links, one that is silent stops early
        for index, (session, _) in enumerate(pieces):
            paths.setdefault((len(session.towers) > 1, tower in session.outputs), []).append(index)
        for (linked, speaks), indices in paths.items():
            for group, step in self._groups(indices, [len(ids) for _, ids in pieces]):
                logits = self._read(tower, [pieces[index] for index in group], linked, speaks, step)
                for index, row in zip(group, [None] * len(group) if logits is None else logits, strict=True):
                    answers[index] = row
        return answers

    def _groups(self, indices: Sequence[int], lengths: Sequence[int]) -> Iterator[tuple[Sequence[int], "_Way"]]:
        """What is read together, and how: where there is a pool, single tokens by a replay and the rest by torch."""
        if self._pool is None:
            yield indices, self._step if self._native else self._run
            return
        single = [index for index in indices if lengths[index] == 1]
        rest = [index for index in indices if lengths[index] > 1]
        for group, step in (single, self._replay), (rest, self._run):
            if group:
                yield group, step

    def link(self, name: str) -> "_Link":
        """A link of the model."""
        return self._links[name]

    def bytes(self, tower: str) -> tuple[int, int]:
        """Weights that one token reads: of the tower, and of the links into it where all sources are visible."""
        return self._towers[tower].bytes, sum(self._links[link].bytes for stop in self._stops[tower] for link in stop.reads)

    def _read(
        self, name: str, pieces: Sequence[tuple[Session, Sequence[int]]], linked: bool, speaks: bool, step: "_Way"
    ) -> Float[Tensor, "sessions vocabulary"] | None:
        places, row = [], 0
        for session, ids in pieces:
            if name not in session.caches:
                pool = self._pool
                session.caches[name] = Cache(self._towers[name].shape) if pool is None else Row(pool, name, session.row)
            cache = session.caches[name]
            cache.reserve(len(ids))
            if session.unread:
                self._listen(name, session)
            places.append(_Place(session, cache, row, row := row + len(ids)))
        positions = [slot for p in places for slot in range(p.cache.length, p.cache.length + p.stop - p.start)]
        spoken, kept = step(name, [i for _, ids in pieces for i in ids], positions, places, linked, speaks)
        for session, cache, start, stop in places:
            cache.length += stop - start
            for target in self._audience[name] if linked else ():
                if target in session.towers:
                    session.unread.setdefault((name, target), []).append(_Shown(kept, start, stop))
        return spoken

    def _listen(self, name: str, session: Session) -> None:
        """The links into a tower read what was kept for them, in one batch each."""
        for source, target in [pair for pair in session.unread if pair[1] == name]:
            shown = session.unread.pop((source, target))
            session.stamp = next(STAMPS)
            for number, stop in enumerate(self._stops[source]):
                for link in stop.shows:
                    if link in self._ears[target]:
                        states = torch.cat([part.kept[number][part.start : part.stop] for part in shown])
                        memory = session.memory[link] = self._links[link].extend(session.memory.get(link), states)
                        if self._pool is not None:  # a replay reads it there, longer pieces read it in the session
                            tokens = memory.keys.shape[2]
                            self._pool.reserve(link, tokens)
                            self._pool.held[link][session.row, 0, :, :, :tokens] = torch.cat(memory)

    def _run(
        self, name: str, ids: Sequence[int], positions: Sequence[int], places: Sequence["_Place"], linked: bool, speaks: bool
    ) -> "_Read":
        """One kernel after another, for any number of tokens."""
        tower = self._towers[name]
        self._reach(1 + max(positions))
        position = torch.tensor(positions, device=tower.device)
        h = self._embed(name, torch.tensor(ids, device=tower.device), linked)
        spoken = [place.stop - 1 for place in places]
        return self._walk(name, h, _Ragged(self, places, position), linked, spoken if speaks else None)

    def _reach(self, length: int) -> None:
        """Sees to it that there are rotary positions for so many tokens."""
        if length > self._far:
            self._far = max(length, 2 * self._far, 256)
            for table in (*(tower.angles for tower in self._towers.values()), *self._turns.values()):
                table.grow(self._far)
            self._prepared.clear()  # they point to the old ones
            self._replays.clear()

    def _embed(self, name: str, ids: Int[Tensor, " tokens"], linked: bool) -> Float[Tensor, "tokens width"]:
        h = F.embedding(ids, self._towers[name].table)
        return self._inputs[name].module(h[None])[0] if linked and name in self._inputs else h

    def _walk(self, name: str, h: Tensor, way: "_Ragged | _Fixed", linked: bool, spoken: Sequence[int] | slice | None) -> "_Read":
        """Embeddings to the logits of the tokens that are spoken."""
        tower, done = self._towers[name], 0
        kept: list[Tensor] = []
        angles = tower.angles.at(way.position)
        for stop in self._stops[name] if linked else ():
            h, done = tower.run(h, range(done, stop.layer), angles, way), stop.layer
            kept.append(h)
            for link in stop.reads:
                h = way.exchange(link, kept[-1], h)
        if spoken is None:
            return None, kept
        return tower.unembed(tower.run(h, range(done, tower.layers), angles, way)[spoken]), kept

    def _replay(
        self, name: str, ids: Sequence[int], positions: Sequence[int], places: Sequence["_Place"], linked: bool, speaks: bool
    ) -> "_Read":
        """One token of each session, in a shape that has perhaps been there before."""
        assert self._pool is not None
        rows, seen = [place.session.row for place in places], dict[str, list[int]]()
        for link in sorted(self._ears[name]) if linked else ():
            memories = [place.session.memory.get(link) for place in places]
            if any(memories):
                seen[link] = [memory.keys.shape[2] if memory else 0 for memory in memories]
        batch, reach = above(1 + max(rows), least=1), above(1 + max(positions))
        span = above(max((slots for lengths in seen.values() for slots in lengths), default=0))
        self._reach(reach)
        key = name, linked, speaks, tuple(seen), batch, reach, span
        shape = 3 + len(seen), batch
        if key not in self._replays:
            step = self._fixed(name, linked, speaks, tuple(seen), reach, span)
            self._replays[key] = Replay(step, shape, self._towers[name].device, self._inductor)
        given = torch.zeros(shape, dtype=torch.long)
        given[:, rows] = torch.tensor([ids, positions, [1] * len(rows), *seen.values()])
        logits, kept = self._replays[key](given)
        return None if logits is None else logits[rows], () if kept is None else kept[:, rows]

    def _fixed(self, name: str, linked: bool, speaks: bool, seen: Sequence[str], reach: int, span: int) -> FunctionType:
        """A step for `Replay`. Its input: ids, positions, whether a row takes part, and how much of each link in `seen` it sees."""

        def step(given: Int[Tensor, "numbers rows"]) -> Said:
            ids, position, active, *slots = given.unbind()
            assert self._pool is not None
            way = _Fixed(self, self._pool, name, position, active > 0, dict(zip(seen, slots, strict=True)), reach, span)
            logits, kept = self._walk(name, self._embed(name, ids, linked), way, linked, slice(None) if speaks else None)
            return logits, torch.stack(list(kept)) if len(kept) else None

        assert isinstance(step, FunctionType)
        return step

    def _pooled(self) -> Pool:
        shapes = {name: tower.shape for name, tower in self._towers.items()} | {n: link.shape for n, link in self._links.items()}
        return Pool(shapes, lambda: self._replays.clear())

    def turned(self, link: str, position: Int[Tensor, " tokens"]) -> Angles | None:
        """Rotary positions at the rate of a link's source."""
        table = self._turns.get(self._links[link].scale)
        return None if table is None else table.at(position)

    def _step(
        self, name: str, ids: Sequence[int], positions: Sequence[int], places: Sequence["_Place"], linked: bool, speaks: bool
    ) -> "_Read":
        """The same by one call of compiled code."""
        tower = self._towers[name]
        self._reach(1 + max(positions))
        key = name, linked, speaks, *((place.session.stamp, place.stop) for place in places)
        if (prepared := self._prepared.get(key)) is None:
            if len(self._prepared) == PREPARED:
                self._prepared.clear()
            prepared = self._prepared[key] = self._prepare(name, places, linked, speaks)
        shape = len(prepared.keeps), len(ids), tower.table.shape[1]
        kept = torch.empty(shape, dtype=torch.float32, device="cpu")  # whatever the defaults are
        place, size = kept.data_ptr(), kept.element_size() * kept.stride(0)
        for number, stage in enumerate(prepared.keeps):
            stage.keep = place + number * size
        tokens = [
            (cache.held.data_ptr(), cache.held.shape[3], position, token)
            for _, cache, start, stop in places
            for position, token in zip(positions[start:stop], ids[start:stop], strict=True)
        ]
        end = tower.table, tower.norm.struct, tower.head.struct
        logits = native.step(prepared.stages, tokens, prepared.spoken, tower.angles.single, *end)
        return logits if speaks else None, kept

    def _prepare(self, name: str, places: Sequence["_Place"], linked: bool, speaks: bool) -> "_Prepared":
        """What is the same in every step of these sessions, as long as they see no more."""
        tower, done, alive = self._towers[name], 0, list[Any]()
        stages, keeps = [self._inputs[name].stage] if linked and name in self._inputs else [], []
        for stop in self._stops[name] if linked else ():
            stages += tower.stages[done : stop.layer]
            done = stop.layer
            keeps.append(len(stages))
            stages.append(native.Stage())
            seen = [link for link in stop.reads if any(link in place.session.memory for place in places)]
            for number, link in enumerate(seen, 1):
                turns = self._turns.get(self._links[link].scale)
                angles = turns.single if turns else (None, None)
                stages.append(self._links[link].stage(link, angles, places, number == len(seen), alive))
        stages += tower.stages[done:] if speaks else []
        laid = native.array(native.Stage, stages)
        spoken = [place.stop - 1 for place in places] if speaks else []
        return _Prepared(laid, [laid[index] for index in keeps], native.array(c_int32, spoken), alive)

    def _compilable(self, towers: Iterable[Plain]) -> bool:
        """Whether compiled code can multiply by all weights that there are, and knows the activation of all blocks."""
        kinds = {(p.device.type, p.dtype) for p in self.model.parameters()}
        if not kinds <= {("cpu", torch.float32), ("cpu", torch.bfloat16)} or native.library() is None:
            return False
        return all(tower.silu for tower in towers)

    @torch.inference_mode()
    def _prove(self, name: str, tolerance: float) -> None:
        """Raises UnsupportedTower unless random ids, many at once, a few and one by one, have the logits of the tower itself, up to
        `tolerance` of their spread."""
        tower = self._towers[name]
        ids, wanted, session = sample(len(tower.table)), truth(self.model.towers[name]), self.open([name], [name])
        found = [self.read(name, [(session, ids[a:b])])[0] for a, b in pairwise(CUTS)]
        error = (torch.stack([row for row in found if row is not None]).float() - wanted).norm(dim=-1)
        if not (error / (wanted - wanted.mean(-1, keepdim=True)).norm(dim=-1) <= tolerance).all():
            raise UnsupportedTower(f"The logits of {tower.name} differ from its own by {float(error.max()):.3g} on the fast path.")


class _Place(NamedTuple):
    """Where the tokens of one session stand in a ragged matrix: rows start .. stop - 1."""

    session: Session
    cache: Cache | Row
    start: int
    stop: int


@final
class _Ragged:
    """Tokens of some sessions in one matrix, any number of each: attention goes session by session."""

    def __init__(self, reader: Fused, places: Sequence[_Place], position: Int[Tensor, " tokens"]) -> None:
        self.reader, self.places, self.position = reader, places, position
        self._turned: dict[float, Angles | None] = {}  # links of the same rate share them

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, layer: int) -> Float[Tensor, "tokens attended"]:
        """Keeps keys and values of a block, and attends to all that there are."""
        attended = []
        for _, cache, start, stop in self.places:
            past, end = cache.length, cache.length + stop - start
            held, said = cache.layer(layer)
            held[:, past:end] = keys[start:stop].transpose(0, 1)
            said[:, past:end] = values[start:stop].transpose(0, 1)
            attended.append(_attend(query[start:stop], held[:, :end], said[:, :end], scale, causal=True))
        return torch.cat(attended) if len(attended) > 1 else attended[0]

    def exchange(self, name: str, states: Tensor, h: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
        """Adds what a link makes of `states`, for the tokens that see something."""
        seeing = [place for place in self.places if name in place.session.memory]
        if not seeing:
            return h
        link, memories = self.reader.link(name), [place.session.memory[name] for place in seeing]
        lengths = [place.stop - place.start for place in seeing]
        if link.scale not in self._turned:
            self._turned[link.scale] = self.reader.turned(name, self.position)
        angles = self._turned[link.scale]

        def attend(query: Tensor, scale: float) -> Tensor:
            parts = zip(query.split(lengths) if len(lengths) > 1 else [query], memories, strict=True)
            attended = [_attend(part, memory.keys[0], memory.values[0], scale, causal=False) for part, memory in parts]
            return torch.cat(attended) if len(attended) > 1 else attended[0]

        if len(seeing) == len(self.places):
            return h + link(states, angles, attend)
        rows = torch.cat([torch.arange(p.start, p.stop, device=h.device) for p in seeing])
        turned = None if angles is None else Angles(*(part[rows] for part in angles))
        return h.index_add(0, rows, link(states[rows], turned, attend))


@final
class _Fixed:
    """One token in each of the first rows of a pool. Rows that do not take part write behind all that is read."""

    def __init__(
        self,
        reader: Fused,
        pool: Pool,
        name: str,
        position: Int[Tensor, " rows"],
        active: Bool[Tensor, " rows"],
        seen: Mapping[str, Int[Tensor, " rows"]],
        reach: int,
        span: int,
    ) -> None:
        """seen: by link, slots of its memory. reach, span: slots of the tower and of links that are looked at."""
        self.reader, self.pool, self.position, self.seen, self.span = reader, pool, position, seen, span
        self._held, self._reach = pool.held[name][: len(position)], reach
        self._rows = torch.arange(len(position), device=position.device)
        self._slot = torch.where(active, position, self._held.shape[4] - 1)
        self._mask = self._first(position + 1, reach)

    @staticmethod
    def _first(slots: Int[Tensor, " rows"], of: int) -> Bool[Tensor, "rows 1 1 slots"]:
        return (torch.arange(of, device=slots.device) < slots[:, None])[:, None, None]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, layer: int) -> Float[Tensor, "rows attended"]:
        """As `_Ragged.attend`."""
        held, said = self._held[:, layer].unbind(1)
        held[self._rows, :, self._slot] = keys.to(held.dtype)
        said[self._rows, :, self._slot] = values.to(said.dtype)
        return _masked(query, scale, held[:, :, : self._reach], said[:, :, : self._reach], self._mask)

    def exchange(self, name: str, states: Tensor, h: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
        """As `_Ragged.exchange`."""
        if name not in self.seen:
            return h
        slots = self.seen[name]
        keys, values = self.pool.held[name][: len(slots), 0, :, :, : self.span].unbind(1)
        mask = self._first(slots.clamp(min=1), self.span)  # where nothing is seen, the first slot is, and for nothing
        attend = partial(_masked, keys=keys, values=values, mask=mask)
        added = self.reader.link(name)(states, self.reader.turned(name, self.position), attend)
        return h + added.where(slots[:, None] > 0, 0)


class _Shown(NamedTuple):
    """States of a session that others may read: rows start .. stop - 1, of each junction of its tower."""

    kept: Sequence[Float[Tensor, "tokens width"]] | Float[Tensor, "junctions tokens width"]
    start: int
    stop: int


_Way = Callable[[str, Sequence[int], Sequence[int], Sequence["_Place"], bool, bool], "_Read"]
_Read = tuple[Float[Tensor, "sessions vocabulary"] | None, Sequence[Tensor] | Tensor]  # logits, and states at the tower's junctions


class _Prepared(NamedTuple):
    """A compiled step of certain sessions. keeps: the stages that keep states. alive: what it points to."""

    stages: Any
    keeps: list[native.Stage]
    spoken: Any
    alive: list[Any]


class _Stop(NamedTuple):
    """A junction as one tower sees it: the number of blocks before it, links by which it reads, links by which it is read."""

    layer: int
    reads: tuple[str, ...]
    shows: tuple[str, ...]


def _stops(tower: str, model: Zipper) -> Iterator[_Stop]:
    links = [(n, link_name(n, source, target), source, target) for n, source, target in model.config.link_names()]
    for n, junction in enumerate(model.config.junctions):
        here = [link for link in links if link[0] == n and tower in junction]
        reads = tuple(name for _, name, _, target in here if target == tower)
        shows = tuple(name for _, name, source, _ in here if source == tower)
        if reads or shows:
            yield _Stop(junction[tower], reads, shows)


def _held(part: Tensor) -> Tensor:
    """Keys or values as they are kept: by torch on a CPU in float32, where its attention of one row is slow in 16 bits."""
    return part.float() if part.device.type == "cpu" and native.library() is None else part


@final
class _Tower:
    """A tower whose blocks are like Llama's."""

    def __init__(self, tower: Plain, form: Form) -> None:
        tower.check()
        outline = tower.outline
        self.name, self.table = tower.name, tower.tensors[outline.table].detach().contiguous()
        parts = zip(outline.blocks, tower.activations, strict=True)
        self.blocks = [_Block(tower, block, activation, form) for block, activation in parts]
        self.norm, self.head, self._rotary = (
            _Norm(*tower.norm(outline.norm)),
            Matrix([tower.linear(outline.head)], form),
            tower.turns,
        )
        self.layers, self.device = len(self.blocks), self.table.device
        self.angles = _Table(self._computed)

    @property
    def bytes(self) -> int:
        """Weights that one token reads."""
        return self.head.bytes + sum(block.bytes for block in self.blocks)

    @cached_property
    def stages(self) -> list[native.Stage]:
        """Its blocks, as the compiled step takes them."""
        return [native.Stage(block=pointer(block.struct), layer=n) for n, block in enumerate(self.blocks)]

    @property
    def shape(self) -> Shape:
        """Of its keys and values."""
        return Shape(self.layers, self.blocks[0].key_heads, self.blocks[0].head_width, _held(self.table[:0]))

    def run(
        self, h: Float[Tensor, "tokens width"], layers: range, angles: Angles, way: "_Ragged | _Fixed"
    ) -> Float[Tensor, "tokens width"]:
        """Some of its blocks."""
        for index in layers:
            h = self.blocks[index](h, angles, partial(way.attend, layer=index))
        return h

    def unembed(self, h: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens vocabulary"]:
        """Final norm and head."""
        return self.head(self.norm(h))

    def _computed(self, length: int) -> Angles:
        cos, sin = self._rotary(self.table, torch.arange(length, device=self.device)[None])
        return _paired(cos[0, :, : cos.shape[-1] // 2], sin[0, :, : sin.shape[-1] // 2])


@final
class _Block:
    """Norm, grouped-query attention with rotary positions, norm, gated feed-forward."""

    def __init__(self, tower: Plain, block: Block, activation: Callable[[Tensor], Tensor], form: Form) -> None:
        query, key, value, out, gate, up, down = map(
            tower.linear, (block.query, block.key, block.value, block.out, block.gate, block.up, block.down)
        )
        self.head_width, self.scale, self.activation = block.head_width, block.scale, activation
        self.norm, self.second_norm = (_Norm(*tower.norm(norm)) for norm in (block.norm, block.second_norm))
        self.qkv, self.out = Matrix([query, key, value], form), Matrix([out], form)
        self.gates = [Matrix([part], form) for part in (gate, up)] if form.compiled else [Matrix([gate, up], form)]
        self.down = Matrix([down], form)
        self.head_norms = [_Norm(*tower.norm(norm)) for norm in (block.query_norm, block.key_norm) if norm is not None]
        self.heads, self.key_heads = (len(part.weight) // self.head_width for part in (query, key))

    @cached_property
    def struct(self) -> native.Block:
        """As the compiled step reads it."""
        query, key = (norm.struct for norm in self.head_norms) if self.head_norms else (native.Norm(), native.Norm())
        matrices = (matrix.struct for matrix in (self.qkv, self.out, *self.gates, self.down))
        shape = (self.heads, self.key_heads, self.head_width, self.scale)
        return native.Block(self.norm.struct, self.second_norm.struct, query, key, *matrices, *shape)

    @property
    def bytes(self) -> int:
        """Weights that one token reads."""
        return sum(matrix.bytes for matrix in (self.qkv, self.out, *self.gates, self.down))

    def __call__(
        self, h: Float[Tensor, "tokens width"], angles: Angles, attend: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    ) -> Float[Tensor, "tokens width"]:
        """States after the block. attend: from queries, keys, values and their scale."""
        mixed = self.qkv(self.norm(h)).view(len(h), -1, self.head_width)
        turned, values = mixed[:, : -self.key_heads], mixed[:, -self.key_heads :]
        if self.head_norms:
            parts = turned.split([self.heads, self.key_heads], 1)
            turned = torch.cat([norm(part) for norm, part in zip(self.head_norms, parts, strict=True)], 1)
        turned = _turn(turned, angles)
        h = h + self.out(attend(turned[:, : self.heads], turned[:, self.heads :], values, self.scale))
        (gates,) = self.gates
        gate, up = gates(self.second_norm(h)).chunk(2, -1)
        return h + self.down(self.activation(gate) * up)


@final
class _Input:
    """What stands between embeddings and the first block, where a plan has several towers."""

    def __init__(self, module: InputProjection) -> None:
        self.module = module

    @cached_property
    def stage(self) -> native.Stage:
        """As the compiled step takes it."""
        self._matrices = [
            Matrix([layer], Form(int8=False, compiled=True)) for layer in self.module.mlp if isinstance(layer, nn.Linear)
        ]
        layers = native.array(native.Matrix, [matrix.struct for matrix in self._matrices])
        return native.Stage(input=pointer(native.Input(layers, len(layers), self.module.kind == "residual")))


@final
class _Link:
    """`Link.forward` for tokens that all see something."""

    def __init__(self, link: Link, form: Form) -> None:
        self.link, self.scale, self.norm = link, link.position_scale, _layer_norm(link.norm)
        self.query, self.out = Matrix([link.query], form), Matrix([link.out], form, float(link.gate.detach().tanh()))
        whole = form._replace(int8=False)
        layers = [link.whiten, *(link.projection if isinstance(link.projection, nn.Sequential) else ())]
        self.projections = [Matrix([part], whole) if isinstance(part, nn.Linear) else part for part in layers if part is not None]
        self.memory = Matrix([link.key, link.value], whole)
        self._dtype = torch.float32 if form.compiled else link.key.weight.dtype
        self.source_norm = copy.deepcopy(link.source_norm).to(self._dtype)
        self.first = None
        if link.feedforward is not None:
            norm, first, _, second = link.feedforward
            assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
            # gelu(x) = x (1 + erf(x / sqrt(2))) / 2: with its constants and the gates in the matrices, two small kernels are left.
            half, gate = 2**-0.5, float(link.feedforward_gate.detach().tanh())
            self.second_norm = _layer_norm(norm)
            self.first, self.second = Matrix([first], form, half), Matrix([second], form, half * gate)

    @property
    def bytes(self) -> int:
        """Weights that one token reads."""
        return sum(matrix.bytes for matrix in (self.query, self.out, *((self.first, self.second) if self.first else ())))

    @property
    def shape(self) -> Shape:
        """Of its keys and values."""
        return Shape(1, self.link.heads, self.link.config.head_width, _held(self.link.query.weight.detach()[:0]))

    @cached_property
    def _pointer(self) -> Any:
        return pointer(self.struct)

    @cached_property
    def struct(self) -> native.Link:
        """As the compiled step reads it."""
        ahead = (self.first.struct, self.second.struct) if self.first else (native.Matrix(), native.Matrix())
        second = self.second_norm.struct if self.first else native.Norm()
        shape = (self.link.heads, self.link.config.head_width)
        return native.Link(self.norm.struct, second, self.query.struct, self.out.struct, *ahead, *shape)

    def stage(
        self, name: str, angles: tuple[Tensor | None, Tensor | None], places: Sequence["_Place"], last: bool, alive: list[Any]
    ) -> native.Stage:
        """The link in a compiled step, where some sessions see something. last: of its junction. alive: gets what it points to."""
        seen: list[Any] = []
        for place in places:
            memory = place.session.memory.get(name)
            there = (*map(native.pointer, memory), memory.keys.shape[2]) if memory else (None, None, 0)
            seen += [there] * (place.stop - place.start)
            alive.append(memory)
        found = native.array(native.Memory, seen)
        alive.append(found)
        half = self.link.query.weight.dtype == torch.bfloat16
        return native.Stage(None, None, self._pointer, None, addressof(found), *map(native.pointer, angles), 0, last, half)

    def extend(self, memory: Memory | None, states: Float[Tensor, "tokens source_width"]) -> Memory:
        """`Link.read` of source states that come behind those in `memory`; laid out for the many steps that read them."""
        link, start = self.link, 0 if memory is None else memory.keys.shape[2]
        h = self.source_norm(states.to(self._dtype))
        for part in self.projections:
            h = part(h)
        if link.config.projection_relu:
            h = F.relu(h)
        keys, values = self.memory(h).view(1, len(h), 2, link.heads, -1).permute(2, 0, 3, 1, 4)
        if link.config.rotary:
            keys = rotate(keys, torch.arange(start, start + len(h), device=h.device)[None].float())
        kept = {"dtype": self.shape.like.dtype, "copy": True, "memory_format": torch.contiguous_format}
        fresh = Memory(*(part.to(**kept) for part in (keys, values)))
        return fresh if memory is None else Memory(*(torch.cat(pair, dim=2) for pair in zip(memory, fresh, strict=True)))

    def angles(self, length: int) -> Angles:
        """Rotary positions of queries at the source's rate, as `link.rotate` has them, for the first `length` positions."""
        like = self.link.query.weight
        half = self.link.config.head_width // 2
        position = torch.arange(length, device=like.device, dtype=torch.float32)[:, None] * self.scale
        angle = position * 10_000.0 ** (-torch.arange(half, device=like.device, dtype=torch.float32) / half)
        return _paired(angle.cos().to(like.dtype), angle.sin().to(like.dtype))

    def __call__(
        self, h: Float[Tensor, "tokens width"], angles: Angles | None, attend: Callable[[Tensor, float], Tensor]
    ) -> Float[Tensor, "tokens width"]:
        """What the link adds to these tokens. attend: from queries and their scale, to what they see."""
        x = h.to(self.link.query.weight.dtype)
        query = self.query(self.norm(x)).view(len(x), self.link.heads, -1)
        if angles is not None:
            query = _turn(query, angles)
        added = self.out(attend(query, query.shape[-1] ** -0.5))
        if self.first is not None:
            inner = self.first(self.second_norm(x + added)).float()
            added = added + self.second(torch.addcmul(inner, inner, inner.erf()).to(x.dtype))
        return added.to(h.dtype)


@final
class _Norm:
    """A layer norm, or transformers' root-mean-square norm (arXiv:1910.07467), in few kernels."""

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float) -> None:
        self.weight, self.bias, self.eps = weight.detach(), None if bias is None else bias.detach(), eps
        if bias is None:  # sqrt(mean + eps) is the hypotenuse of norm and floor, up to a factor that goes into the weight
            width = len(self.weight)
            self.scaled = self.weight.float() * width**0.5
            self.floor = self.scaled.new_tensor((width * self.eps) ** 0.5)

    def __call__(self, x: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens width"]:
        if self.bias is None:
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
            return (x / torch.hypot(norm, self.floor) * self.scaled).to(x.dtype)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    @cached_property
    def struct(self) -> native.Norm:
        """As the compiled step reads it."""
        self._held = [_single(self.weight), _single(self.bias)]
        return native.Norm(*map(native.pointer, self._held), self.eps)


def _layer_norm(module: nn.Module) -> _Norm:
    assert isinstance(module, nn.LayerNorm)
    return _Norm(module.weight, module.bias, module.eps)


@final
class _Table:
    """Rotary positions, computed once. angles: of the first so many."""

    def __init__(self, angles: Callable[[int], Angles]) -> None:
        self._angles = angles

    def at(self, position: Int[Tensor, " tokens"]) -> Angles:
        """Of positions within reach."""
        return Angles(self._held.cos[position], self._held.sin[position])

    @cached_property
    def single(self) -> tuple[Tensor, Tensor]:
        """In float32, laid out for the compiled step."""
        return self._held.cos.float().contiguous(), self._held.sin.float().contiguous()

    def grow(self, length: int) -> None:
        """To so many positions."""
        self._held = self._angles(length)
        self.__dict__.pop("single", None)


def _paired(cos: Float[Tensor, "tokens half"], sin: Float[Tensor, "tokens half"]) -> Angles:
    return Angles(torch.cat([cos, cos], -1)[:, None], torch.cat([-sin, sin], -1)[:, None])


def _turn(x: Float[Tensor, "tokens heads head_width"], angles: Angles) -> Float[Tensor, "tokens heads head_width"]:
    """Rotary positions, halves paired: the two halves of `sin` have opposite signs."""
    return torch.addcmul(x * angles.cos, x.roll(x.shape[-1] // 2, -1), angles.sin)


def _attend(
    query: Float[Tensor, "tokens heads head_width"],
    keys: Float[Tensor, "key_heads slots head_width"],
    values: Float[Tensor, "key_heads slots head_width"],
    scale: float,
    causal: bool,
) -> Float[Tensor, "tokens attended"]:
    """Attention of one sequence; heads that share keys become rows of one product. causal: the tokens are the last slots. In the
    dtype of the query, whatever that of the keys is."""
    tokens, heads, width = query.shape
    (shared, slots), group = keys.shape[:2], heads // len(keys)
    dtype, query = query.dtype, query.to(keys.dtype)
    if tokens == 1:
        rows = query.view(1, shared, group, width)
        return F.scaled_dot_product_attention(rows, keys[None], values[None], scale=scale).reshape(1, heads * width).to(dtype)
    rows = query.view(tokens, shared, group, width).permute(1, 2, 0, 3).reshape(1, shared, group * tokens, width)
    plain, mask = causal and tokens == slots and group == 1, None
    if causal and not plain:
        mask = torch.ones(tokens, slots, dtype=torch.bool, device=query.device).tril(slots - tokens).repeat(group, 1)
    found = F.scaled_dot_product_attention(rows, keys[None], values[None], mask, is_causal=plain, scale=scale)
    return found.view(shared, group, tokens, width).permute(2, 0, 1, 3).reshape(tokens, heads * width).to(dtype)


def _masked(
    query: Float[Tensor, "rows heads head_width"],
    scale: float,
    keys: Float[Tensor, "rows key_heads slots head_width"],
    values: Float[Tensor, "rows key_heads slots head_width"],
    mask: Bool[Tensor, "rows 1 1 slots"],
) -> Float[Tensor, "rows attended"]:
    """Attention of one token a row, as `_attend`."""
    wide = query.to(keys.dtype).unflatten(1, (keys.shape[1], -1))
    return F.scaled_dot_product_attention(wide, keys, values, mask, scale=scale).flatten(1).to(query.dtype)
