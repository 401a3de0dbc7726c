"""Towers as plain data: the tensors and numbers by which blocks like Llama's are run.

It is what `fused` reads. Taken from a transformers model, it goes by attribute names, and whoever
runs it compares with the tower's own logits. Written down, tensors by their names, it is what
`proofs` remembers of a tower, so that the next process need not import transformers. Nothing here
runs one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zipper.tower import Strand, Tower, UnsupportedTower

BLOCK = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
ROTARY = (
    "default",
    "linear",
    "llama3",
    "yarn",
)  # frequencies that do not depend on the length of a row
#: Where the random ids are cut by which a reader is compared with its tower: many, a few, singles.
CUTS = (0, 9, 13, 14, 15, 16, 17)

# Rotary cosine and sine, in the dtype of the states that are given, from positions.
Turns = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Linear:
    """x W^T + b."""

    weight: str
    bias: str | None


@dataclass(frozen=True)
class Norm:
    """A layer norm, or where there is no bias one by the root mean square (arXiv:1910.07467)."""

    weight: str
    bias: str | None
    eps: float


@dataclass(frozen=True)
class Block:
    """Norm, grouped-query attention with rotary positions, norm, gated feed-forward. scale: of the
    products of queries and keys."""

    norm: Norm
    second_norm: Norm
    query: Linear
    key: Linear
    value: Linear
    out: Linear
    gate: Linear
    up: Linear
    down: Linear
    query_norm: Norm | None
    key_norm: Norm | None
    head_width: int
    scale: float


@dataclass(frozen=True)
class Outline:
    """A tower by the names of its tensors. table: embeddings."""

    table: str
    blocks: tuple[Block, ...]
    norm: Norm
    head: Linear


class Held(NamedTuple):
    """The tensors of a linear layer."""

    weight: Tensor
    bias: Tensor | None


@final
@dataclass(frozen=True)
class Plain:
    """A tower for reading. activations: of the gate of each block."""

    name: str
    outline: Outline
    tensors: Mapping[str, Tensor]
    turns: Turns
    activations: Sequence[Callable[[Tensor], Tensor]]

    def linear(self, part: Linear) -> Held:
        """Its tensors."""
        return Held(
            self.tensors[part.weight], None if part.bias is None else self.tensors[part.bias]
        )

    def norm(self, part: Norm) -> tuple[Tensor, Tensor | None, float]:
        """Its tensors and its epsilon."""
        return (
            self.tensors[part.weight],
            None if part.bias is None else self.tensors[part.bias],
            part.eps,
        )

    def check(self) -> None:
        """Raises UnsupportedTower where tensors do not fit together: compiled code goes by what it
        is told of their shapes."""
        vocabulary, width = self.tensors[self.outline.table].shape
        shapes: list[tuple[Norm | Linear, tuple[int, ...]]] = []
        shapes += [(self.outline.norm, (width,)), (self.outline.head, (vocabulary, width))]
        for block in self.outline.blocks:
            attended, keys, inner = (
                len(self.tensors[part.weight]) for part in (block.query, block.key, block.gate)
            )
            size = block.head_width
            if not 0 < size <= keys or attended % size or keys % size or attended % keys:
                raise UnsupportedTower(
                    f"{self.name} has {attended} queries and {keys} keys in heads of {size}."
                )
            shapes += [(norm, (width,)) for norm in (block.norm, block.second_norm)]
            shapes += [
                (norm, (size,)) for norm in (block.query_norm, block.key_norm) if norm is not None
            ]
            shapes += [(block.query, (attended, width)), (block.out, (width, attended))]
            shapes += [(part, (keys, width)) for part in (block.key, block.value)]
            shapes += [(part, (inner, width)) for part in (block.gate, block.up)] + [
                (block.down, (width, inner))
            ]
        for part, shape in shapes:
            weight, bias = (
                None if name is None else self.tensors[name].shape
                for name in (part.weight, part.bias)
            )
            if weight != shape or bias not in (None, shape[:1]):
                raise UnsupportedTower(
                    f"{self.name}: {part.weight} has the shape {weight}, {shape} was wanted."
                )

    @property
    def silu(self) -> bool:
        """Whether all gates are x sigmoid(x), by which compiled code goes."""
        some = torch.linspace(-9, 9, 99)
        return all(
            torch.equal(activation(some), F.silu(some)) for activation in {*self.activations}
        )


@final
@dataclass(frozen=True)
class Rotary:
    """Rotary positions as transformers computes them, to the bit. inverse: frequencies, in float32.
    factor: of cosine and sine."""

    inverse: Float[Tensor, " half"]
    factor: float

    def __call__(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """See `Turns`."""
        angles = (self.inverse[None, :, None] @ position[:, None, :].float()).transpose(1, 2)
        angles = torch.cat([angles, angles], -1)
        return (angles.cos() * self.factor).to(x.dtype), (angles.sin() * self.factor).to(x.dtype)


@final
class Proved(nn.Module):
    """A tower that was proved before: its weights, and what is known of it without transformers.

    `fused` reads it; it cannot be run part way, nor trained. name, family: the class of the model,
    and what transformers calls its architecture. room: most positions. truth: what `truth` found
    then.
    """

    def __init__(
        self,
        name: str,
        family: str,
        room: int,
        outline: Outline,
        tensors: Mapping[str, Tensor],
        turns: Rotary,
        truth: Float[Tensor, "cuts vocabulary"],
    ) -> None:
        super().__init__()
        self.name, self.family, self.room, self.outline, self.turns, self.truth = (
            name,
            family,
            room,
            outline,
            turns,
            truth,
        )
        unique = {
            id(tensor): nn.Parameter(tensor, requires_grad=False) for tensor in tensors.values()
        }
        places = {key: place for place, key in enumerate(unique)}
        self.places = {
            name: places[id(tensor)] for name, tensor in tensors.items()
        }  # tied ones are one
        self.weights = nn.ParameterList(unique.values())

    def plain(self) -> Plain:
        """For reading."""
        tensors = {name: self.weights[place] for name, place in self.places.items()}
        return Plain(
            self.name, self.outline, tensors, self.turns, [F.silu] * len(self.outline.blocks)
        )


def plain(tower: nn.Module) -> Plain:
    """A tower for reading. Raises UnsupportedTower for one that is not built like Llama, as far as
    names tell."""
    if isinstance(tower, Proved):
        return tower.plain()
    assert isinstance(tower, Tower)
    model: Any = tower.model
    body, config = model.base_model, tower.config
    tensors = dict(model.named_parameters(remove_duplicate=False))
    names = {id(tensor): name for name, tensor in tensors.items()}
    try:
        windows = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None) or ["sliding" if windows else "full_attention"]
        if {*kinds} != {"full_attention"} or body.rotary_emb.rope_type not in ROTARY:
            raise UnsupportedTower(
                f"{tower.name} attends in windows, or its rotary positions depend on the length "
                "of a row."
            )
        blocks = tuple(_block(block, names) for block in tower.blocks)
        table, head = (
            names[id(model.get_input_embeddings().weight)],
            _linear(model.get_output_embeddings(), names),
        )
        outline = Outline(table, blocks, _norm(body.norm, names), head)
        return Plain(
            tower.name,
            outline,
            tensors,
            body.rotary_emb,
            [block.mlp.act_fn for block in tower.blocks],
        )
    except (AttributeError, KeyError) as error:
        raise UnsupportedTower(f"{tower.name} is not built like Llama: {error}.") from error


@torch.no_grad()
def truth(tower: nn.Module) -> Float[Tensor, "cuts vocabulary"]:
    """The tower's own logits in float32 behind every cut of `sample`, computed now; of one that was
    proved before, those of that time."""
    if isinstance(tower, Proved):
        return tower.truth
    assert isinstance(tower, Tower)
    ids = torch.tensor([sample(tower.vocabulary)], device=tower.device)
    return tower(Strand.alone(ids))[0, [stop - 1 for stop in CUTS[1:]]].float()


def sample(vocabulary: int) -> list[int]:
    """Random ids by which a reader is compared with its tower."""
    found: list[int] = torch.randint(
        vocabulary, (CUTS[-1],), generator=torch.Generator().manual_seed(0)
    ).tolist()
    return found


def _block(block: Any, names: Mapping[int, str]) -> Block:
    attention, mlp = block.self_attn, block.mlp
    for part, known in ((block, BLOCK), (attention, ATTENTION), (mlp, MLP)):
        if unknown := sorted({name for name, _ in part.named_children()} - known):
            raise UnsupportedTower(
                f"A {type(part).__name__} holds {unknown}, which the fast path does not know."
            )
    linear, norm = partial(_linear, names=names), partial(_norm, names=names)
    return Block(
        norm=norm(block.input_layernorm),
        second_norm=norm(block.post_attention_layernorm),
        query=linear(attention.q_proj),
        key=linear(attention.k_proj),
        value=linear(attention.v_proj),
        out=linear(attention.o_proj),
        gate=linear(mlp.gate_proj),
        up=linear(mlp.up_proj),
        down=linear(mlp.down_proj),
        query_norm=norm(attention.q_norm) if "q_norm" in attention._modules else None,
        key_norm=norm(attention.k_norm) if "q_norm" in attention._modules else None,
        head_width=attention.head_dim,
        scale=attention.scaling,
    )


def _linear(module: Any, names: Mapping[int, str]) -> Linear:
    return Linear(names[id(module.weight)], None if module.bias is None else names[id(module.bias)])


def _norm(module: Any, names: Mapping[int, str]) -> Norm:
    if isinstance(module, nn.LayerNorm):
        return Norm(names[id(module.weight)], names[id(module.bias)], module.eps)
    return Norm(names[id(module.weight)], None, module.variance_epsilon)
