"""Towers and links as they are run for decoding: blocks like Llama's, input projections, links."""

import copy
from collections.abc import Callable, Sequence
from ctypes import pointer
from functools import cached_property, partial, reduce
from typing import Any, Protocol, final, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from zipper.fast import native
from zipper.fast.graphs import Row, Shape
from zipper.fast.plain import Block, Held, Plain
from zipper.fast.session import Cache
from zipper.fast.weights import Angles, Form, Matrix, Norm, Table, layer_norm, paired, turn
from zipper.link import InputProjection, Link, project, rotate


@runtime_checkable
class Attending(Protocol):
    """How the tokens of one call attend; see `zipper.fast.reader`."""

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float, layer: int
    ) -> Tensor:
        """Keeps keys and values of a block, and attends to all that there are."""


def kept_as(part: Tensor) -> Tensor:
    """Keys or values as they are kept: by torch on a CPU in float32, where its attention of one row
    is slow in 16 bits."""
    return part.float() if part.device.type == "cpu" and native.library() is None else part


@final
class FastTower:
    """A tower whose blocks are like Llama's."""

    def __init__(self, tower: Plain, form: Form) -> None:
        tower.check()
        outline = tower.outline
        self.name, self.table = tower.name, tower.tensors[outline.table].detach().contiguous()
        parts = zip(outline.blocks, tower.activations, strict=True)
        self.blocks = [FastBlock(tower, block, activation, form) for block, activation in parts]
        self.norm, self.head, self._rotary = (
            Norm(*tower.norm(outline.norm)),
            Matrix([tower.linear(outline.head)], form),
            tower.turns,
        )
        self.layers, self.device = len(self.blocks), self.table.device
        self.angles = Table(self._computed)

    @property
    def bytes(self) -> int:
        """Weights that one token reads."""
        return self.head.bytes + sum(block.bytes for block in self.blocks)

    @cached_property
    def stages(self) -> list[native.Stage]:
        """Its blocks, as the compiled step takes them."""
        return [
            native.Stage(block=pointer(block.struct), layer=n)
            for n, block in enumerate(self.blocks)
        ]

    @property
    def shape(self) -> Shape:
        """Of its keys and values."""
        return Shape(
            self.layers,
            self.blocks[0].key_heads,
            self.blocks[0].head_width,
            kept_as(self.table[:0]),
        )

    def run(
        self, h: Float[Tensor, "tokens width"], layers: range, angles: Angles, way: Attending
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
        return paired(cos[0, :, : cos.shape[-1] // 2], sin[0, :, : sin.shape[-1] // 2])


@final
class FastBlock:
    """Norm, grouped-query attention with rotary positions, norm, gated feed-forward."""

    def __init__(
        self, tower: Plain, block: Block, activation: Callable[[Tensor], Tensor], form: Form
    ) -> None:
        query, key, value, out, gate, up, down = map(
            tower.linear,
            (block.query, block.key, block.value, block.out, block.gate, block.up, block.down),
        )
        self.head_width, self.scale, self.activation = block.head_width, block.scale, activation
        self.norm, self.second_norm = (
            Norm(*tower.norm(norm)) for norm in (block.norm, block.second_norm)
        )
        self.qkv, self.out = Matrix([query, key, value], form), Matrix([out], form)
        self.gates = (
            [Matrix([part], form) for part in (gate, up)]
            if form.compiled
            else [Matrix([gate, up], form)]
        )
        self.down = Matrix([down], form)
        self.head_norms = [
            Norm(*tower.norm(norm))
            for norm in (block.query_norm, block.key_norm)
            if norm is not None
        ]
        self.heads, self.key_heads = (len(part.weight) // self.head_width for part in (query, key))

    @cached_property
    def struct(self) -> native.Block:
        """As the compiled step reads it."""
        query, key = (
            (norm.struct for norm in self.head_norms)
            if self.head_norms
            else (native.Norm(), native.Norm())
        )
        matrices = (matrix.struct for matrix in (self.qkv, self.out, *self.gates, self.down))
        shape = (self.heads, self.key_heads, self.head_width, self.scale)
        return native.Block(
            self.norm.struct, self.second_norm.struct, query, key, *matrices, *shape
        )

    @property
    def bytes(self) -> int:
        """Weights that one token reads."""
        return sum(matrix.bytes for matrix in (self.qkv, self.out, *self.gates, self.down))

    def __call__(
        self,
        h: Float[Tensor, "tokens width"],
        angles: Angles,
        attend: Callable[[Tensor, Tensor, Tensor, float], Tensor],
    ) -> Float[Tensor, "tokens width"]:
        """States after the block. attend: from queries, keys, values and their scale."""
        mixed = self.qkv(self.norm(h)).view(len(h), -1, self.head_width)
        turned, values = mixed[:, : -self.key_heads], mixed[:, -self.key_heads :]
        if self.head_norms:
            parts = turned.split([self.heads, self.key_heads], 1)
            turned = torch.cat(
                [norm(part) for norm, part in zip(self.head_norms, parts, strict=True)], 1
            )
        turned = turn(turned, angles)
        h = h + self.out(
            attend(turned[:, : self.heads], turned[:, self.heads :], values, self.scale)
        )
        (gates,) = self.gates
        gate, up = gates(self.second_norm(h)).chunk(2, -1)
        return h + self.down(self.activation(gate) * up)


@final
class FastInput:
    """What stands between embeddings and the first block, where a plan has several towers."""

    def __init__(self, modules: Sequence[InputProjection]) -> None:
        self.modules = modules

    def __call__(self, h: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
        """Embeddings through all of them."""
        return project(h[None], [(module, None) for module in self.modules])[0]

    @cached_property
    def stage(self) -> native.Stage:
        """As the compiled step takes it."""
        form = Form(int8=False, compiled=True)
        self._matrices = [Matrix([layer], form) for layer in _side_by_side(self.modules)]
        residual = self.modules[0].kind == "residual"
        layers = native.array(native.Matrix, [matrix.struct for matrix in self._matrices])
        return native.Stage(input=pointer(native.Input(layers, len(layers), residual)))


@final
class FastLink:
    """`Link.forward` for tokens that all see something. turns, key_turns: what the rotary positions
    of queries and keys go by, if there are any: their rate, and the width of a head."""

    def __init__(self, link: Link, form: Form) -> None:
        self.link, self.norm = link, layer_norm(link.norm)
        rotary, width = link.config.rotary, link.config.head_width
        self.turns, self.key_turns = (
            (rate, width) if rotary else None for rate in (link.position_scale, 1.0)
        )
        self.query, self.out = (
            Matrix([link.query], form),
            Matrix([link.out], form, float(link.gate.detach().tanh())),
        )
        self.reads = [Matrix([part], form._replace(int8=False)) for part in _reads(link)]
        self._dtype = torch.float32 if form.compiled else link.key.weight.dtype
        self.source_norm = copy.deepcopy(link.source_norm).to(self._dtype)
        self.first = None
        if link.feedforward is not None:
            norm, first, _, second = link.feedforward
            assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
            # gelu(x) = x (1 + erf(x / sqrt(2))) / 2: with its constants and the gates in the
            # matrices, two small kernels are left.
            half, gate = 2**-0.5, float(link.feedforward_gate.detach().tanh())
            self.second_norm = layer_norm(norm)
            self.first, self.second = (
                Matrix([first], form, half),
                Matrix([second], form, half * gate),
            )

    @property
    def bytes(self) -> int:
        """Weights that one token reads."""
        read = [self.query, self.out]
        if self.first:
            read += [self.first, self.second]
        return sum(matrix.bytes for matrix in read)

    @property
    def shape(self) -> Shape:
        """Of its keys and values."""
        return Shape(
            1,
            self.link.heads,
            self.link.config.head_width,
            kept_as(self.link.query.weight.detach()[:0]),
        )

    @cached_property
    def struct(self) -> native.Link:
        """As the compiled step reads it."""
        found = native.Link(
            norm=self.norm.struct,
            query=self.query.struct,
            out=self.out.struct,
            heads=self.link.heads,
            head_width=self.link.config.head_width,
            reads=native.array(native.Matrix, [part.struct for part in self.reads]),
            depth=len(self.reads),
            half=self.link.query.weight.dtype == torch.bfloat16,
        )
        if self.first:
            found.second, found.up = self.second_norm.struct, self.first.struct
            found.down = self.second.struct
        if isinstance(self.link.source_norm, nn.LayerNorm):
            self._source = layer_norm(self.link.source_norm)
            found.source = self._source.struct
        return found

    def stage(self, seen: int, angles: tuple[Tensor, Tensor] | None, last: bool) -> native.Stage:
        """The link in a compiled step. seen: its number among those that are read there. last: of
        its junction."""
        stage = native.Stage(link=self._pointer, seen=seen, last=last)
        if angles is not None:
            stage.cos, stage.sin = map(native.pointer, angles)
        return stage

    def unread(
        self,
        memory: Cache,
        states: Float[Tensor, "tokens source_width"],
        angles: tuple[Tensor, Tensor] | None,
    ) -> native.Unread:
        """What `read` does, for `native.read`. The states must live until then."""
        past, tokens = memory.length, len(states)
        memory.reserve(tokens)
        memory.length += tokens
        tensors = states, memory.held, *(angles or (None, None))
        room = memory.held.shape[3]
        return native.Unread(self._pointer, *map(native.pointer, tensors), tokens, room, past)

    def read(self, memory: Cache | Row, states: Float[Tensor, "tokens source_width"]) -> None:
        """`Link.read` of source states that come behind those in `memory`, and into it."""
        first, *others = self.reads
        h = first(self.source_norm(states.to(self._dtype)))
        for part in others:
            h = part(F.relu(h))
        keys, values = h.view(1, len(h), 2, self.link.heads, -1).permute(2, 0, 3, 1, 4)
        past, end = memory.length, memory.length + len(h)
        if self.link.config.rotary:
            keys = rotate(keys, torch.arange(past, end, device=h.device)[None].float())
        memory.reserve(len(h))
        held, said = memory.layer(0)
        held[:, past:end], said[:, past:end] = keys[0], values[0]
        memory.length = end

    def angles(self, rate: float, length: int) -> Angles:
        """Rotary positions at a rate, as `link.rotate` has them, for the first `length`
        positions."""
        like = self.link.query.weight
        half = self.link.config.head_width // 2
        position = torch.arange(length, device=like.device, dtype=torch.float32)[:, None] * rate
        angle = position * 10_000.0 ** (
            -torch.arange(half, device=like.device, dtype=torch.float32) / half
        )
        return paired(angle.cos().to(self._dtype), angle.sin().to(self._dtype))

    def __call__(
        self,
        h: Float[Tensor, "tokens width"],
        angles: Angles | None,
        attend: Callable[[Tensor, float], Tensor],
    ) -> Float[Tensor, "tokens width"]:
        """What the link adds to these tokens. attend: from queries and their scale, to what they
        see."""
        x = h.to(self.link.query.weight.dtype)
        query = self.query(self.norm(x)).view(len(x), self.link.heads, -1)
        if angles is not None:
            query = turn(query, angles)
        added = self.out(attend(query, query.shape[-1] ** -0.5))
        if self.first is not None:
            inner = self.first(self.second_norm(x + added)).float()
            added = added + self.second(torch.addcmul(inner, inner, inner.erf()).to(x.dtype))
        return added.to(h.dtype)

    @cached_property
    def _pointer(self) -> Any:
        return pointer(self.struct)


def _side_by_side(modules: Sequence[InputProjection]) -> list[Held]:
    """Several MLPs as one whose result is what `project` makes of theirs."""
    paper = modules[0].kind == "paper"
    each = [[part for part in m.mlp if isinstance(part, nn.Linear)] for m in modules]
    found, last = [], len(each[0]) - 1
    for number, layers in enumerate(zip(*each, strict=True)):
        weights = [layer.weight.detach() for layer in layers]
        biases = [layer.bias.detach() for layer in layers]
        if number == last:
            share = 1 / len(modules) if paper else 1
            whole = torch.cat(weights, 1) * share, torch.stack(biases).sum(0) * share
        else:
            whole = torch.block_diag(*weights) if number else torch.cat(weights), torch.cat(biases)
        found.append(Held(*whole))
    return found


def _reads(link: Link) -> list[Held]:
    """The layers that make keys and values of a source's states, ReLU between them. Linear ones
    that follow one another are one, so that a step has few weights to read for a token that comes
    alone."""
    parts = [link.whiten, *(link.projection if isinstance(link.projection, nn.Sequential) else ())]
    runs: list[list[Held]] = [[]]
    for part in [*parts, nn.ReLU() if link.config.projection_relu else None]:
        if isinstance(part, nn.Linear):
            runs[-1].append(Held(part.weight.detach(), part.bias.detach()))
        elif part is not None:
            runs.append([])
    last = torch.cat([link.key.weight, link.value.weight]).detach()
    runs[-1].append(Held(last, None))
    if not runs[0]:  # nothing stands before a ReLU
        runs[0].append(Held(torch.eye(last.shape[1], dtype=last.dtype, device=last.device), None))
    return [reduce(_joined, run) for run in runs]


def _joined(first: Held, second: Held) -> Held:
    """Two linear layers as one."""
    weight, like = second.weight.double(), first.weight
    bias = None if first.bias is None else weight @ first.bias.double()
    if bias is not None and second.bias is not None:
        bias = bias + second.bias.double()
    return Held((weight @ like.double()).to(like), None if bias is None else bias.to(like))


def attention(
    query: Float[Tensor, "tokens heads head_width"],
    keys: Float[Tensor, "key_heads slots head_width"],
    values: Float[Tensor, "key_heads slots head_width"],
    scale: float,
    causal: bool,
) -> Float[Tensor, "tokens attended"]:
    """Attention of one sequence; heads that share keys become rows of one product. causal: the
    tokens are the last slots. In the dtype of the query, whatever that of the keys is."""
    tokens, heads, width = query.shape
    (shared, slots), group = keys.shape[:2], heads // len(keys)
    dtype, query = query.dtype, query.to(keys.dtype)
    if tokens == 1:
        rows = query.view(1, shared, group, width)
        return (
            F.scaled_dot_product_attention(rows, keys[None], values[None], scale=scale)
            .reshape(1, heads * width)
            .to(dtype)
        )
    rows = (
        query.view(tokens, shared, group, width)
        .permute(1, 2, 0, 3)
        .reshape(1, shared, group * tokens, width)
    )
    plain, mask = causal and tokens == slots and group == 1, None
    if causal and not plain:
        mask = (
            torch.ones(tokens, slots, dtype=torch.bool, device=query.device)
            .tril(slots - tokens)
            .repeat(group, 1)
        )
    found = F.scaled_dot_product_attention(
        rows, keys[None], values[None], mask, is_causal=plain, scale=scale
    )
    return (
        found.view(shared, group, tokens, width)
        .permute(2, 0, 1, 3)
        .reshape(tokens, heads * width)
        .to(dtype)
    )


def masked(
    query: Float[Tensor, "rows heads head_width"],
    scale: float,
    keys: Float[Tensor, "rows key_heads slots head_width"],
    values: Float[Tensor, "rows key_heads slots head_width"],
    mask: Bool[Tensor, "rows 1 1 slots"],
) -> Float[Tensor, "rows attended"]:
    """Attention of one token a row, as `attend`."""
    wide = query.to(keys.dtype).unflatten(1, (keys.shape[1], -1))
    return (
        F.scaled_dot_product_attention(wide, keys, values, mask, scale=scale)
        .flatten(1)
        .to(query.dtype)
    )
