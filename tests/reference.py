"""A zip again, the slow way: token by token, head by head, from the formulas. Nothing of zipper is
imported.

One document at a time, given as its linear sequence of (tower, id). The blocks of the towers are
those of transformers' Llama; everything that zipping adds is spelt out: input projection,
junctions, cross projection, attention, gates and feed-forward (Zipper, arXiv:2405.18669, sec. 3;
the gated block is Flamingo's, arXiv:2204.14198; rotary positions are RoFormer's, arXiv:2104.09864).
Only the names of the weights are taken from zipper.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

Token = tuple[str, int]  # (tower, id); its rank in the list is its time
State = list[Tensor]  # one vector per token of a tower


@dataclass(frozen=True)
class Shape:
    """What the weights do not say. junctions: {tower that is fused: blocks before}. shows: {tower
    that is read: blocks before}. paper: ReLU on projections, an input projection without residual,
    no rotary positions. tokens: per tower, its usual tokens of a segment (a rate).
    """

    junctions: Sequence[Mapping[str, int]]
    shows: Sequence[Mapping[str, int]]
    head_width: int
    paper: bool
    tokens: Mapping[str, float]


def logits(
    towers: Mapping[str, LlamaForCausalLM],
    weights: Mapping[str, Tensor],
    sequence: Sequence[Token],
    shape: Shape,
) -> dict[str, Tensor]:
    """Logits "token vocabulary" of each tower's tokens, in order. towers: those that the sequence
    names, two at least."""
    ids = {name: [i for tower, i in sequence if tower == name] for name in towers}
    time = {name: [t for t, (tower, _) in enumerate(sequence) if tower == name] for name in towers}
    h: dict[str, State] = {}
    for name, tower in towers.items():
        mlp = _part(weights, f"inputs.{name}.mlp")
        h[name] = []
        for i in ids[name]:
            e = tower.model.embed_tokens.weight[i]
            h[name].append(_relu(_mlp(mlp, e)) if shape.paper else e + _mlp(mlp, e))

    @cache
    def shown(name: str, depth: int) -> State:
        """States behind so many blocks of a tower, before they are fused there."""
        return _blocks(towers[name], fused(name, depth - 1), depth - 1, depth) if depth else h[name]

    @cache
    def fused(name: str, depth: int) -> State:
        """The same once the tower has read, at that depth, what it reads there."""
        before = shown(name, depth)
        after = list(before)
        for n, (targets, sources) in enumerate(zip(shape.junctions, shape.shows, strict=True)):
            if targets.get(name) != depth:
                continue
            for source in sources:
                if source == name or source not in towers:
                    continue
                w = _part(weights, f"links.{n}:{source}>{name}")
                rate = shape.tokens[source] / shape.tokens[name]
                read = shown(source, sources[source])
                for i, x in enumerate(before):
                    seen = [j for j in range(len(read)) if time[source][j] < time[name][i]]
                    if seen and w:  # else there is nothing to read and x stays what it is
                        found = _cross(w, x, i * rate, [(j, read[j]) for j in seen], shape)
                        after[i] = after[i] + (found - x)
        return after

    out = {}
    for name, tower in towers.items():
        states = shown(name, len(tower.model.layers))
        out[name] = torch.stack([tower.lm_head.weight @ _rms_norm(tower, x) for x in states])
    return out


def _cross(
    w: Mapping[str, Tensor],
    x: Tensor,
    place: float,
    source: Sequence[tuple[int, Tensor]],
    shape: Shape,
) -> Tensor:
    """Flamingo's gated block for one token: x' = x + tanh(a) attention, x'' = x' + tanh(b)
    feed-forward(x')."""
    query = w["query.weight"] @ _layer_norm(w, "norm", x)
    read = []
    for j, s in source:
        s = s if shape.paper else _layer_norm(w, "source_norm", s)
        if "whiten.weight" in w:  # ours, where the link was calibrated
            s = w["whiten.weight"] @ s + w["whiten.bias"]
        s = _mlp(_part(w, "projection"), s)
        s = _relu(s) if shape.paper else s
        read.append((j, w["key.weight"] @ s, w["value.weight"] @ s))
    heads = []
    for first in range(0, len(query), shape.head_width):
        head = slice(first, first + shape.head_width)
        q = query[head] if shape.paper else _turn(query[head], place)
        scores, total = [], torch.zeros((), dtype=x.dtype)
        for j, key, _ in read:
            k = key[head] if shape.paper else _turn(key[head], j)
            scores.append(torch.exp((q * k).sum() / math.sqrt(shape.head_width)))
            total = total + scores[-1]
        found = torch.zeros(shape.head_width, dtype=x.dtype)
        for score, (_, _, value) in zip(scores, read, strict=True):
            found = found + score / total * value[head]
        heads.append(found)
    x = x + torch.tanh(w["gate"]) * (w["out.weight"] @ torch.cat(heads))
    wide = w["feedforward.1.weight"] @ _layer_norm(w, "feedforward.0", x)
    wide = wide * (1 + torch.erf(wide / math.sqrt(2))) / 2  # GELU
    return x + torch.tanh(w["feedforward_gate"]) * (w["feedforward.3.weight"] @ wide)


def _blocks(tower: LlamaForCausalLM, states: State, first: int, last: int) -> State:
    if not states:
        return states
    n = len(states)
    h = torch.stack(states)[None]
    mask = torch.full((1, 1, n, n), -torch.inf, dtype=h.dtype).triu(1)
    rotary = tower.model.rotary_emb(h, torch.arange(n)[None])
    for block in tower.model.layers[first:last]:
        h = block(h, attention_mask=mask, position_embeddings=rotary)
    return list(h[0])


def _mlp(w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Linear layers with ReLU between them, none after the last."""
    numbers = sorted({int(name.split(".")[0]) for name in w})
    for number in numbers:
        x = w[f"{number}.weight"] @ x + w[f"{number}.bias"]
        if number != numbers[-1]:
            x = _relu(x)
    return x


def _relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.zeros_like(x))


def _layer_norm(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    x = x - x.mean()
    return x / torch.sqrt((x * x).mean() + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def _rms_norm(tower: LlamaForCausalLM, x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean() + tower.config.rms_norm_eps) * tower.model.norm.weight


def _turn(x: Tensor, place: float) -> Tensor:
    """Pairs (i, i + half) as complex numbers, turned by place / 10000^(i / half) radians."""
    half = len(x) // 2
    turned = [
        torch.complex(x[i], x[i + half])
        * complex(math.cos(angle := place / 10_000 ** (i / half)), math.sin(angle))
        for i in range(half)
    ]
    return torch.stack([z.real for z in turned] + [z.imag for z in turned])


def _part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names start with `prefix.`, without it."""
    return {
        name.removeprefix(f"{prefix}."): w
        for name, w in weights.items()
        if name.startswith(f"{prefix}.")
    }
