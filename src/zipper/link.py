"""Links: how one tower reads another, and the projections that stand before them.

A link is gated cross-attention from a source tower's hidden states into a target tower's stream,
then a gated feed-forward (Zipper, arXiv:2405.18669, sec. 3; the gates are Flamingo's,
arXiv:2204.14198). It sees tensors and a mask; it knows nothing of modalities, tokens or time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zipper.errors import ZipperError
from zipper.saving.files import settle

#: A mask of FlexAttention, whose import takes a third of torch's own time (sympy, from torch 2.15
#: on): it is left to those that ask for it.
BlockMask = Any

#: What a link may ask for, in a program as in a file: (least, most).
LIMITS = {
    "width": (1, 1 << 20),
    "head_width": (1, 1 << 16),
    "feedforward": (0.0, 64.0),
    "projection_depth": (0, 64),
    "gate_init": (-100.0, 100.0),
    "dropout": (0.0, 0.999),
    "rate": (1e-6, 1e6),
}

InputKind = Literal["residual", "paper", "none"]


@dataclass(frozen=True)
class LinkConfig:
    """What every link of a zip looks like. By default a new zip is exactly its towers; recipes open
    the gates (docs/log.md).

    width: attention width of a link; None = the target tower's width.
    head_width: width of one attention head; the number of heads is width // head_width.
    feedforward: width of the gated feed-forward as a multiple of the target's width; 0 leaves it
    out.
    projection_depth: linear layers of the cross projection (source width -> target width); 0 =
    none, keys and values read the source directly. The paper's text says a linear map, its appendix
    a 3-layer MLP (sec. 3 against A.3).
    projection_relu: a ReLU after the cross projection, as in the paper's formula h = ReLU(g(m));
    without it the source is layer-normalised before the projection.
    rotary: rotary positions on queries and keys, the target's positions scaled to the source's
    rate. A diagonal prior that is ours, not the paper's (Flamingo has no positions here).
    gate_init: both gates at birth, before the tanh. 0 = the new model is exactly its towers
    (Flamingo).
    dropout: on both branches, in training.
    whiten: a fixed affine map before the projection; `calibrate` adds and sets it.
    rate: source tokens per target token; None = by the usual tokens of both towers.
    """

    width: int | None = None
    head_width: int = 32
    feedforward: float = 1.0
    projection_depth: int = 1
    projection_relu: bool = False
    rotary: bool = True
    gate_init: float = 0.0
    dropout: float = 0.0
    whiten: bool = False
    rate: float | None = None

    def __post_init__(self) -> None:
        settle(self, LIMITS)


#: The paper to the letter: 3-layer projections with a final ReLU (A.3), no positions, Flamingo's
#: feed-forward of factor 4.
PAPER_LINK = LinkConfig(
    head_width=64,
    feedforward=4.0,
    projection_depth=3,
    projection_relu=True,
    rotary=False,
    gate_init=0.0,
)


class Memory(NamedTuple):
    """Keys and values of the source tokens that a link has read so far."""

    keys: Float[Tensor, "batch heads source head_width"]
    values: Float[Tensor, "batch heads source head_width"]


def block_mask(mask: Bool[Tensor, "batch target source"]) -> BlockMask:
    """A mask as FlexAttention wants it: blocks in which nothing is visible are passed over. Made
    once for all links of a pair."""
    from torch.nn.attention.flex_attention import create_block_mask

    size = (mask.shape[0], None, mask.shape[1], mask.shape[2])
    return create_block_mask(
        lambda batch, head, target, source: mask[batch, target, source], *size, device=mask.device
    )


@contextmanager
def any_lengths() -> Iterator[None]:
    """Attention by kernels that need no preparing for a new shape. cuDNN's, torch's first choice on
    a Hopper GPU, plans each new shape for tens of milliseconds: steps of training, whose batches
    have lengths of their own each, took five times as long (docs/log.md)."""
    if not torch.cuda.is_initialized():
        yield
        return
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield


@cache
def _flex(compiled: bool) -> Any:
    """FlexAttention (arXiv:2412.05496); uncompiled it is slow, and only good to compare with.
    Compiled for any lengths: batches differ in all of them, and torch.compile gives a function up
    for good after eight versions.
    """
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


def mlp(width_in: int, width_out: int, depth: int, hidden: int) -> nn.Sequential:
    """`depth` linear layers with ReLU between them: width_in -> hidden -> ... -> width_out."""
    widths = [width_in, *[hidden] * (depth - 1), width_out]
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Linear(widths[i], widths[i + 1])] + ([nn.ReLU()] if i < depth - 1 else [])
    return nn.Sequential(*layers)


class InputProjection(nn.Module):
    """Stands between a tower's embeddings and its first block, on multi-modal input only (sec. 3,
    h^0 = ReLU(MLP(embed))).

    `paper` is that formula, which replaces the embeddings; `residual` is h + MLP(h) with a last
    layer of zeros, so that the model starts as its towers.
    """

    def __init__(self, width: int, kind: InputKind, depth: int = 3) -> None:
        super().__init__()
        if kind not in ("residual", "paper"):
            raise ZipperError(
                f"Input projection {kind!r} is unknown; it must be 'residual', 'paper' or 'none'."
            )
        self.kind = kind
        self.mlp = mlp(width, width, depth, width)
        if kind == "residual":
            last = self.mlp[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(
        self, h: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch length width"]:
        """Project embeddings; same shape out. Runs in its own dtype, returns the input's."""
        return project(h, [(self, None)])


class Chooser(nn.Module):
    """From the state of a segment's end token, what comes next: one of some towers, or that it is
    over. All are alike until it has learnt: it is born of zeros."""

    def __init__(self, width: int, towers: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, towers + 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, h: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens choices"]:
        """Logits, the last that it is over."""
        logits: Tensor = self.out(self.norm(h.to(self.out.weight.dtype)))
        return logits


def project(
    h: Float[Tensor, "batch length width"],
    projections: Sequence[tuple[InputProjection, Bool[Tensor, "batch length"] | None]],
) -> Float[Tensor, "batch length width"]:
    """Embeddings through the input projections of a tower, each where its mask says; None:
    everywhere. What several add adds up; those of the paper are averaged before their ReLU.
    """
    used: Any = torch.zeros((), dtype=torch.int, device=h.device)
    added = torch.zeros_like(h)
    for projection, mask in projections:
        where = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device) if mask is None else mask
        out = projection.mlp(h.to(next(projection.mlp.parameters()).dtype)).to(h.dtype)
        added = added + torch.where(where[..., None], out, 0)
        used = used + where[..., None]
    if not projections or projections[0][0].kind == "residual":
        return h + added
    return torch.where(used > 0, F.relu(added / used.clamp(min=1)), h)


def rotate(
    x: Float[Tensor, "batch heads length head_width"], position: Float[Tensor, "batch length"]
) -> Float[Tensor, "batch heads length head_width"]:
    """Rotary embedding (RoFormer, arXiv:2104.09864) at real-valued positions, base 10,000, halves
    paired."""
    half = x.shape[-1] // 2
    inverse = 10_000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = position[:, None, :, None].float() * inverse
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _identity(width: int) -> nn.Linear:
    """A fixed affine map, the identity for now."""
    fixed = nn.Linear(width, width).requires_grad_(False)
    with torch.no_grad():  # nn.init.eye_ without memory imports torch._dynamo, for a second
        fixed.weight.zero_().diagonal().fill_(1)
    nn.init.zeros_(fixed.bias)
    return fixed


class Link(nn.Module):
    """One direction of one junction: `target` reads `source`. Both gates are `gate_init` at birth;
    only they may be zero, for two zeros in series pass no gradient."""

    def __init__(
        self, width: int, source_width: int, config: LinkConfig, position_scale: float = 1.0
    ) -> None:
        """`position_scale`: source tokens per target token, the rate that rotary positions of the
        target are scaled to."""
        super().__init__()
        inner = config.width or width
        if inner % config.head_width or (config.rotary and config.head_width % 2):
            raise ZipperError(
                f"A link of width {inner} cannot be cut into heads of {config.head_width}"
                f"{' (rotary needs an even width)' if config.rotary else ''}. Set "
                "LinkConfig(head_width=...) to a divisor."
            )
        self.config = config
        self.heads = inner // config.head_width
        self.position_scale = position_scale
        projected = width if config.projection_depth else source_width
        self.source_norm = nn.Identity() if config.projection_relu else nn.LayerNorm(source_width)
        self.projection = (
            mlp(source_width, width, config.projection_depth, width)
            if config.projection_depth
            else nn.Identity()
        )
        self.whiten = _identity(source_width) if config.whiten else None
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, inner, bias=False)
        self.key = nn.Linear(projected, inner, bias=False)
        self.value = nn.Linear(projected, inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)
        self.gate = nn.Parameter(torch.tensor([float(config.gate_init)]))
        self.feedforward: nn.Sequential | None = None
        if config.feedforward:
            hidden = round(config.feedforward * width)
            if hidden < 1:
                raise ZipperError(
                    f"feedforward is {config.feedforward}: of a width of {width} that leaves no "
                    "neuron. Set it to 0 or larger."
                )
            self.feedforward = nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, hidden, bias=False),
                nn.GELU(),
                nn.Linear(hidden, width, bias=False),
            )
            self.feedforward_gate = nn.Parameter(torch.tensor([float(config.gate_init)]))

    @torch.no_grad()
    def moments(
        self, source: Float[Tensor, "tokens source_width"]
    ) -> Float[Tensor, "moments moments"]:
        """For `calibrate`: the products of what is read of source states, with a 1 behind each,
        summed over tokens. Those of several pieces add up."""
        x = F.pad(self.source_norm(source.to(self.key.weight)).double(), (0, 1), value=1.0)
        return x.T @ x

    @torch.no_grad()
    def calibrate(self, moments: Float[Tensor, "moments moments"]) -> None:
        """Whiten what the projection reads, from the moments of typical source states; the link
        goes on computing the same function.

        A frozen LM keeps words that mean the same to it (the digits, say) close together; along
        those directions a link learns many times slower than along others (docs/log.md). A fixed
        affine map gives every direction the same variance, and the projection is multiplied by its
        inverse.
        """
        first = self.projection[0] if isinstance(self.projection, nn.Sequential) else None
        if not isinstance(first, nn.Linear):
            raise ZipperError(
                "A link without a projection cannot be calibrated. Set "
                "LinkConfig(projection_depth=1) or more."
            )
        if self.whiten is None:
            self.config, self.whiten = (
                replace(self.config, whiten=True),
                _identity(first.in_features).to(first.weight),
            )
        count, mean = moments[-1, -1], moments[-1, :-1] / moments[-1, -1]
        products = moments[:-1, :-1] - count * torch.outer(mean, mean)
        variance, directions = torch.linalg.eigh(products / (count - 1))
        deviation = (variance.clamp(min=0) + 1e-3 * variance.mean()).sqrt()
        # projection(whiten(x)) stays what it is: the old map in the coordinates of the new one.
        old_weight, old_bias = self.whiten.weight.double(), self.whiten.bias.double()
        weight, bias = first.weight.double(), first.bias.double()
        first.bias.copy_(bias + weight @ (old_bias + old_weight @ mean))
        first.weight.copy_(weight @ old_weight @ directions * deviation)
        self.whiten.weight.copy_((directions / deviation).T)
        self.whiten.bias.copy_(-(directions / deviation).T @ mean)

    def read(
        self,
        source: Float[Tensor, "batch source source_width"],
        position: Int[Tensor, "batch source"],
    ) -> Memory:
        """Keys and values of source states; computed once per source token (sec. 3: h = ReLU(g(m)),
        K = V = h)."""
        h = self.source_norm(source.to(self.key.weight.device, self.key.weight.dtype))
        h = self.projection(h if self.whiten is None else self.whiten(h))
        if self.config.projection_relu:
            h = F.relu(h)
        keys, values = self._heads(self.key(h)), self._heads(self.value(h))
        if self.config.rotary:
            keys = rotate(keys, position.to(keys.device).float())
        return Memory(keys, values)

    def forward(
        self,
        x: Float[Tensor, "batch target width"],
        memory: Memory,
        mask: Bool[Tensor, "batch target source"],
        position: Int[Tensor, "batch target"],
        blocks: BlockMask | None = None,
    ) -> Float[Tensor, "batch target width"]:
        """What the link adds to x: tanh(a) * attend(x) and, on top of it, tanh(b) * ffw. A row of
        the mask with nothing visible gets exactly 0 from both, forwards and backwards. blocks:
        `block_mask(mask)`, to attend by FlexAttention.
        """
        visible = mask.any(-1, keepdim=True)
        x_in = x.to(self.query.weight.dtype)
        query = self._query(x_in, position)
        # An empty row attends to everything and is then discarded: finite on every kernel, where a
        # fully masked softmax may be NaN and poison the gradients of the whole batch (pytorch
        # #103963).
        if blocks is None:
            attended = F.scaled_dot_product_attention(
                query, memory.keys, memory.values, (mask | ~visible)[:, None]
            )
        else:
            attended = _flex(query.is_cuda)(query, *memory, block_mask=blocks)
        added = torch.tanh(self.gate) * self._drop(self.out(attended.transpose(1, 2).flatten(2)))
        if self.feedforward is not None:
            added = added + torch.tanh(self.feedforward_gate) * self._drop(
                self.feedforward(x_in + added)
            )
        return torch.where(visible, added, torch.zeros_like(added)).to(x.dtype)

    def attention(
        self,
        x: Float[Tensor, "batch target width"],
        memory: Memory,
        mask: Bool[Tensor, "batch target source"],
        position: Int[Tensor, "batch target"],
    ) -> Float[Tensor, "batch target source"]:
        """The attention weights that `forward` uses, averaged over heads; rows with nothing visible
        are 0. For looking at."""
        query = self._query(x.to(self.query.weight.dtype), position)
        scores = query @ memory.keys.transpose(-1, -2) / query.shape[-1] ** 0.5
        weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1).mean(1)
        return torch.where(mask.any(-1, keepdim=True), weights, torch.zeros_like(weights))

    def _query(self, x: Tensor, position: Tensor) -> Tensor:
        query = self._heads(self.query(self.norm(x)))
        return (
            rotate(query, position.float() * self.position_scale) if self.config.rotary else query
        )

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training)
