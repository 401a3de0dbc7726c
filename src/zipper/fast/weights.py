"""Weights as they are multiplied: matrices, norms and rotary positions, laid out once for many
small products."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from zipper.fast import native
from zipper.fast.plain import Held
from zipper.tower import UnsupportedTower

#: With AMX a product with one row in bfloat16 is slow as a matrix product, without AMX as a
#: matrix-vector product (docs/log.md).
AMX = torch.cpu._is_amx_tile_supported()
#: What oneDNN multiplies by weights that it has packed: one row in bfloat16 in half of the time,
#: eight rows also in float32.
PACKED: set[torch.dtype] = set()
if torch.backends.mkldnn.is_available():
    PACKED = {torch.float32} | (
        {torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set()
    )


class Form(NamedTuple):
    """How weights are kept. int8: in 8 bits, one scale a row; not where rows are no multiple of 32.
    compiled: for `native`."""

    int8: bool
    compiled: bool


@final
class Matrix:
    """x -> x W^T + b of one or several linear layers that read the same; on a CPU by whatever
    kernel is fastest there."""

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
        # Torch's kernel reads beyond the end of other rows.
        if form.int8 and weight.shape[1] % 32 == 0:
            self.scale = weight.float().abs().amax(1).clamp(min=1e-12) / 127
            weight = (weight.float() / self.scale[:, None]).round().to(torch.int8)
        self.bytes = sum(
            t.numel() * t.element_size() for t in (weight, self.bias, self.scale) if t is not None
        )
        self._compiled = form.compiled
        if form.compiled:
            self._held = native.laid_out(weight), single(self.scale), single(self.bias)
            self.struct = native.matrix(*self._held, *weight.shape)
        else:
            self._many, self._one = self._kernels(weight)

    def __call__(self, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens out"]:
        """The product, in x's dtype."""
        if self._compiled:
            return native.product(self.struct, x).to(x.dtype)
        y = self._one(x) if len(x) == 1 else self._many(x)
        return y if self.bias is None else y + self.bias

    def _kernels(
        self, weight: Tensor
    ) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """x -> x W^T by torch, for several tokens and for one."""
        if self.scale is not None and weight.device.type != "cpu":
            scale = self.scale
            return (wide := lambda x: F.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)), wide
        if self.scale is not None:
            scale = self.scale.bfloat16()
            return (
                eight := lambda x: torch._weight_int8pack_mm(x.bfloat16(), weight, scale).to(
                    x.dtype
                )
            ), eight
        if weight.device.type != "cpu" or weight.dtype not in PACKED:
            return (plain := partial(F.linear, weight=weight)), plain
        laid = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())

        def packed(x: Tensor) -> Tensor:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, laid, None, "none", [], "")
            return product

        if weight.dtype == torch.float32 and weight.shape[0] > weight.shape[1]:
            long = weight.T.contiguous()  # along its longer side, twice as fast
            return packed, lambda x: torch.mm(x, long)
        if weight.dtype == torch.bfloat16 and AMX:
            return packed, lambda x: torch.mv(weight, x[0])[None]
        return packed, packed


def single(part: Tensor | None) -> Tensor | None:
    """In float32, laid out for the compiled step."""
    return None if part is None else part.float().contiguous()


class Angles(NamedTuple):
    """Rotary positions of tokens, laid out for `turn`."""

    cos: Float[Tensor, "tokens 1 head_width"]
    sin: Float[Tensor, "tokens 1 head_width"]


@final
class Norm:
    """A layer norm, or transformers' root-mean-square norm (arXiv:1910.07467), in few kernels."""

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float) -> None:
        self.weight, self.eps = weight.detach(), eps
        self.bias = None if bias is None else bias.detach()
        if bias is None:
            # sqrt(mean + eps) is the hypotenuse of norm and floor, up to a factor that goes into
            # the weight.
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
        self._held = [single(self.weight), single(self.bias)]
        return native.Norm(*map(native.pointer, self._held), self.eps)


def layer_norm(module: nn.Module) -> Norm:
    """Of a module of torch."""
    assert isinstance(module, nn.LayerNorm)
    return Norm(module.weight, module.bias, module.eps)


@final
class Table:
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


def paired(cos: Float[Tensor, "tokens half"], sin: Float[Tensor, "tokens half"]) -> Angles:
    """Cosine and signed sine of both halves of a head, for `turn`."""
    return Angles(torch.cat([cos, cos], -1)[:, None], torch.cat([-sin, sin], -1)[:, None])


def turn(
    x: Float[Tensor, "tokens heads head_width"], angles: Angles
) -> Float[Tensor, "tokens heads head_width"]:
    """Rotary positions, halves paired: the two halves of `sin` have opposite signs."""
    return torch.addcmul(x * angles.cos, x.roll(x.shape[-1] // 2, -1), angles.sin)
