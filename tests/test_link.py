"""Links against laws and plain arithmetic: nothing to see changes nothing, gradients are
differences, rotary positions turn."""

import math
from dataclasses import replace
from itertools import product
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from laws import unchecked
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zipper.errors import ZipperError
from zipper.fast.reader import Fused
from zipper.link import PAPER_LINK, InputProjection, Link, LinkConfig, Memory, mlp, project, rotate
from zipper.model import Zipper
from zipper.strand import Strand
from zipper.testing import tiny_tower

SMALL = LinkConfig(head_width=4)
CONFIGS = {
    "default": SMALL,
    "paper": replace(PAPER_LINK, head_width=4),
    "bare": LinkConfig(head_width=4, feedforward=0.0, projection_depth=0, rotary=False),
    "narrow": LinkConfig(width=4, head_width=2, projection_depth=2, feedforward=0.5),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

WIDTH, SOURCE_WIDTH = 8, 6
# Rows of target tokens; a dot is a source token that cannot be seen. Two rows see nothing, in one
# batch row nobody does.
MASK = torch.tensor(
    [
        [[c == "x" for c in row] for row in rows]
        for rows in (["....", "x...", ".x.x", "...."], ["...."] * 4, ["xxxx"] * 4)
    ]
)
EMPTY = ~MASK.any(-1)


def link(config: LinkConfig = SMALL, scale: float = 1.0, awake: bool = True) -> Link:
    torch.manual_seed(0)
    made = Link(WIDTH, SOURCE_WIDTH, config, scale)
    if awake:
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                parameter.copy_(
                    torch.tensor([0.8])
                    if name.endswith("gate")
                    else parameter + 0.3 * torch.randn_like(parameter)
                )
    return made.eval()


def states(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ranks(rows: int, length: int) -> Tensor:
    return torch.arange(length).expand(rows, -1)


def added(module: Link, x: Tensor, source: Tensor, mask: Tensor = MASK) -> Tensor:
    memory = module.read(source, ranks(*source.shape[:2]).to(x.device))
    return module(x, memory, mask.to(x.device), ranks(*x.shape[:2]).to(x.device))


@every_config
def test_a_link_adds_exactly_nothing_at_birth(config: LinkConfig) -> None:
    module = link(config, awake=False)
    assert not added(module, states(3, 4, WIDTH), states(3, 4, SOURCE_WIDTH, seed=1)).any()


@every_config
def test_only_the_gates_are_zero_at_birth_and_they_can_learn_at_once(config: LinkConfig) -> None:
    module = link(config, awake=False)
    for name, parameter in module.named_parameters():
        assert name.endswith("bias") or bool(parameter.any()) != name.endswith("gate")
    x = states(3, 4, WIDTH)
    (x + added(module, x, states(3, 4, SOURCE_WIDTH, seed=1))).square().sum().backward()
    for name, parameter in module.named_parameters():
        if name.endswith("gate"):
            assert parameter.grad is not None and parameter.grad.abs() > 1e-3


@every_dtype
@every_config
def test_a_row_with_nothing_to_see_gets_exactly_nothing_forwards_and_backwards(
    config: LinkConfig, dtype: torch.dtype, device: torch.device
) -> None:
    module = link(config).to(device, dtype)
    x = states(3, 4, WIDTH, dtype=dtype).to(device).requires_grad_()
    source = states(3, 4, SOURCE_WIDTH, seed=1, dtype=dtype).to(device).requires_grad_()
    out = added(module, x, source)
    assert not out[EMPTY].any()
    assert (out[~EMPTY].abs().sum(-1) > 0).all()

    out[EMPTY].sum().backward(retain_graph=True)  # of empty rows alone: exactly nothing learns
    for leaf in [x, source, *module.parameters()]:
        assert leaf.grad is None or not leaf.grad.any()
    out.square().sum().backward()  # of all rows: finite, and nothing comes through the empty ones
    for leaf in [x, source, *(p for p in module.parameters() if p.requires_grad)]:
        assert leaf.grad is not None and leaf.grad.isfinite().all()
    assert x.grad is not None and source.grad is not None
    assert not x.grad[EMPTY].any()
    assert not source.grad[0, 2].any()  # a source token that nobody sees
    assert not source.grad[1].any()


@every_dtype
@every_config
def test_what_is_not_seen_changes_no_bit(
    config: LinkConfig, dtype: torch.dtype, device: torch.device
) -> None:
    module = link(config).to(device, dtype)
    x, source = (
        states(3, 4, w, seed=n, dtype=dtype).to(device) for n, w in enumerate((WIDTH, SOURCE_WIDTH))
    )
    other = source.clone()
    other[0, 2], other[1] = 1e4, -1e4
    assert torch.equal(added(module, x, source), added(module, x, other))
    other[0, 0] = 1e4
    assert not torch.equal(added(module, x, source), added(module, x, other))


@every_dtype
@pytest.mark.parametrize("kernel", ["MATH", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"])
def test_every_kernel_of_a_gpu_gives_nothing_where_nothing_is_seen(
    kernel: str, dtype: torch.dtype, gpu: torch.device
) -> None:
    if kernel == "CUDNN_ATTENTION" and dtype == torch.float32:
        pytest.skip("it takes 16 bits only")
    torch.manual_seed(0)
    module = Link(64, 48, LinkConfig(head_width=32, gate_init=0.8)).to(gpu, dtype)
    x, source = (
        states(3, 4, w, seed=n, dtype=dtype).to(gpu).requires_grad_()
        for n, w in enumerate((64, 48))
    )
    with sdpa_kernel(getattr(SDPBackend, kernel)):
        try:
            out = added(module, x, source)
        except RuntimeError as error:
            pytest.skip(f"it does not take this: {error}")
        out.float().square().sum().backward()
    assert not out[EMPTY].any() and (out[~EMPTY].abs().sum(-1) > 0).all()
    assert x.grad is not None and source.grad is not None
    assert x.grad.isfinite().all() and source.grad.isfinite().all()
    assert not x.grad[EMPTY].any() and not source.grad[0, 2].any() and not source.grad[1].any()


@pytest.mark.parametrize("name", ["default", "paper"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    torch.manual_seed(0)
    module = Link(
        4,
        3,
        replace(CONFIGS[name], head_width=2, feedforward=1.0, gate_init=0.8),
        position_scale=0.7,
    ).double()
    names, weights = zip(
        *((name, p.detach().clone().requires_grad_()) for name, p in module.named_parameters()),
        strict=True,
    )

    def run(x: Tensor, source: Tensor, *weights: Tensor) -> Tensor:
        given = {f"link.{name}": weight for name, weight in zip(names, weights, strict=True)}
        return torch.func.functional_call(Whole(module), given, (x, source))

    x = states(2, 3, 4, dtype=torch.double).requires_grad_()
    source = states(2, 4, 3, seed=1, dtype=torch.double).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, source, *weights), eps=1e-6, atol=1e-8, rtol=1e-6)


class Whole(nn.Module):
    """A link as one function of target and source, some rows of which see nothing."""

    def __init__(self, module: Link) -> None:
        super().__init__()
        self.link = module

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        return added(self.link, x, source, MASK[:2, :3])


def test_attention_for_looking_at_is_the_attention_that_is_used() -> None:
    # One head: weights and values give back the output.
    module = link(LinkConfig(head_width=WIDTH, feedforward=0.0))
    x, source = states(3, 4, WIDTH), states(3, 4, SOURCE_WIDTH, seed=1)
    memory = module.read(source, ranks(3, 4))
    weights = module.attention(x, memory, MASK, ranks(3, 4))
    assert not weights[~MASK].any()
    torch.testing.assert_close(weights.sum(-1), (~EMPTY).float())
    rebuilt = torch.tanh(module.gate) * (weights @ memory.values[:, 0]) @ module.out.weight.T
    torch.testing.assert_close(added(module, x, source), rebuilt, atol=1e-5, rtol=0)


@every_config
def test_reading_a_source_in_parts_is_reading_it_whole(config: LinkConfig) -> None:
    module = link(config)
    source, position = states(2, 7, SOURCE_WIDTH), ranks(2, 7)
    whole = module.read(source, position)
    parts = [
        module.read(source[:, part], position[:, part])
        for part in (slice(0, 3), slice(3, 4), slice(4, 7))
    ]
    together = Memory(*(torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True)))
    torch.testing.assert_close(together, whole, atol=1e-6, rtol=0)


def test_a_wide_link_runs_in_its_own_precision_inside_a_narrow_stream() -> None:
    module = link()
    x, source = (
        states(3, 4, WIDTH, dtype=torch.bfloat16),
        states(3, 4, SOURCE_WIDTH, seed=1, dtype=torch.bfloat16),
    )
    out = added(module, x, source)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, added(module, x.float(), source.float()).bfloat16())


def test_rotary_positions_are_turns_of_complex_numbers() -> None:
    x, position = states(1, 2, 3, 4), torch.tensor([[0.0, 1.0, 7.5]])
    turned = rotate(x, position)
    for head in range(2):
        for slot in range(3):
            for pair in range(2):
                angle = float(position[0, slot]) / 10_000 ** (pair / 2)
                number = complex(x[0, head, slot, pair], x[0, head, slot, pair + 2]) * complex(
                    math.cos(angle), math.sin(angle)
                )
                found = complex(turned[0, head, slot, pair], turned[0, head, slot, pair + 2])
                assert abs(found - number) < 1e-6


def test_only_the_distance_of_positions_matters_in_the_rate_of_the_source() -> None:
    x, source = states(3, 4, WIDTH), states(3, 4, SOURCE_WIDTH, seed=1)
    module = link(scale=2.5)  # 2.5 source tokens to a target token

    def shifted(target_by: int, source_by: int) -> Tensor:
        return module(
            x, module.read(source, ranks(3, 4) + source_by), MASK, ranks(3, 4) + target_by
        )

    torch.testing.assert_close(shifted(4, 10), shifted(0, 0), atol=1e-5, rtol=0)
    assert (shifted(4, 4) - shifted(0, 0)).abs().max() > 1e-3


def test_without_rotary_positions_do_not_matter() -> None:
    module = link(CONFIGS["bare"])
    x, source = states(3, 4, WIDTH), states(3, 4, SOURCE_WIDTH, seed=1)
    moved = module(x, module.read(source, ranks(3, 4) * 9), MASK, ranks(3, 4) + 5)
    assert torch.equal(moved, added(module, x, source))


def test_dropout_acts_in_training_only() -> None:
    module = link(replace(SMALL, dropout=0.5))
    x, source = states(3, 4, WIDTH), states(3, 4, SOURCE_WIDTH, seed=1)
    still = added(module, x, source)
    assert torch.equal(still, added(module, x, source))
    module.train()
    assert not torch.equal(still, added(module, x, source))
    assert not added(module, x, source)[EMPTY].any()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_projection_has_as_many_linear_layers_as_asked_with_relu_between(depth: int) -> None:
    torch.manual_seed(0)
    module = mlp(6, 8, depth, 10)
    x = wanted = states(5, 6)
    linear = [layer for layer in module if isinstance(layer, nn.Linear)]
    assert len(linear) == depth
    for i, layer in enumerate(linear):
        wanted = wanted @ layer.weight.T + layer.bias
        if i < depth - 1:
            wanted = wanted * (wanted > 0)
    torch.testing.assert_close(module(x), wanted)


@pytest.mark.parametrize("name", ["default", "paper", "narrow"])
def test_a_calibrated_link_reads_every_direction_alike_and_computes_the_same(name: str) -> None:
    module = link(CONFIGS[name])
    typical = states(500, SOURCE_WIDTH, seed=2) * torch.tensor([1, 1, 1, 0.1, 0.1, 3]) + 5
    x, source = states(3, 4, WIDTH), typical[:12].reshape(3, 4, SOURCE_WIDTH)
    before = added(module, x, source)
    module.calibrate(module.moments(typical[:200]) + module.moments(typical[200:]))
    torch.testing.assert_close(added(module, x, source), before, atol=1e-4, rtol=0)
    white = module.whiten(module.source_norm(typical))
    # All variances are 1 but for the floor under the small ones; layer normalisation has taken one
    # direction away.
    variance = torch.linalg.eigvalsh(torch.cov(white.T))
    assert (variance[1:] > 0.8).all() and variance.max() < 1.01
    assert white.mean(0).abs().max() < 1e-3
    assert not any(p.requires_grad for p in module.whiten.parameters())


def test_a_link_without_projection_cannot_be_calibrated() -> None:
    with pytest.raises(ZipperError, match="without a projection cannot be calibrated"):
        link(CONFIGS["bare"]).calibrate(torch.eye(SOURCE_WIDTH + 1))


def test_a_residual_input_projection_is_the_identity_at_birth_and_can_learn() -> None:
    h = states(2, 3, WIDTH)
    projection = InputProjection(WIDTH, "residual")
    assert torch.equal(projection(h), h)
    projection(h).square().sum().backward()
    last = projection.mlp[-1]
    assert (
        isinstance(last, nn.Linear)
        and last.weight.grad is not None
        and last.weight.grad.abs().max() > 1e-3
    )


def test_the_papers_input_projection_replaces_the_embeddings_by_three_layers_and_relu() -> None:
    h = states(2, 3, WIDTH)
    projection = InputProjection(WIDTH, "paper")
    wanted, layers = h, [layer for layer in projection.mlp if isinstance(layer, nn.Linear)]
    assert len(layers) == 3
    for layer in layers:
        wanted = (wanted @ layer.weight.T + layer.bias).clamp(min=0)
    torch.testing.assert_close(projection(h), wanted)


@pytest.mark.parametrize("kind", ["residual", "paper"])
def test_where_several_input_projections_say_something_they_add_up_or_are_averaged(
    kind: Literal["residual", "paper"],
) -> None:
    h, projections = states(2, 2, WIDTH), [InputProjection(WIDTH, kind) for _ in range(2)]
    for n, projection in enumerate(projections):
        with torch.no_grad():
            for parameter in projection.parameters():  # the last layers are of zeros
                parameter.copy_(states(*parameter.shape, seed=n))
    masks = torch.tensor([[[True, True], [False, False]], [[True, False], [True, False]]])
    found = project(h, [*zip(projections, masks, strict=True)])
    for row, slot in product(range(2), repeat=2):
        here = h[row, slot]
        said = [p.mlp(here) for p, mask in zip(projections, masks, strict=True) if mask[row, slot]]
        wanted = here + sum(said) if kind == "residual" else torch.stack(said or [here]).mean(0)
        if kind == "paper" and said:
            wanted = wanted.clamp(min=0)
        torch.testing.assert_close(found[row, slot], wanted)


def test_an_input_projection_returns_the_precision_it_was_given() -> None:
    assert (
        InputProjection(WIDTH, "residual")(states(2, 3, WIDTH, dtype=torch.bfloat16)).dtype
        == torch.bfloat16
    )


@pytest.mark.parametrize(
    "config",
    [
        LinkConfig(head_width=3),
        LinkConfig(width=9, head_width=3),
        LinkConfig(width=10, head_width=4),
    ],
)
def test_heads_that_do_not_fit_are_refused_in_one_sentence(config: LinkConfig) -> None:
    with pytest.raises(
        ZipperError, match=r"cannot be cut into heads of .* Set LinkConfig\(head_width=...\)"
    ):
        Link(WIDTH, SOURCE_WIDTH, config)


def test_heads_of_an_odd_width_and_a_part_of_a_neuron() -> None:
    """Heads that nobody turns may be of an odd width; of neurons there is at least half a one."""
    assert Link(9, SOURCE_WIDTH, LinkConfig(head_width=3, rotary=False)).heads == 3
    made = Link(WIDTH, SOURCE_WIDTH, replace(SMALL, feedforward=0.45))
    assert made.feedforward is not None and made.feedforward[1].out_features == 4
    with pytest.raises(ZipperError, match=r"feedforward is 0\.05: of a width of 8 that leaves no"):
        Link(WIDTH, SOURCE_WIDTH, replace(SMALL, feedforward=0.05))


def test_numbers_of_few_bits_are_turned_by_exact_angles_and_looked_at_like_others() -> None:
    half = states(3, 2, 4, 4, dtype=torch.bfloat16)
    far = ranks(3, 4) + 10_001.0
    torch.testing.assert_close(
        rotate(half, far).float(), rotate(half.float(), far), atol=0.05, rtol=0
    )
    module, x = link(), states(3, 4, WIDTH, dtype=torch.bfloat16)
    memory = module.read(states(3, 4, SOURCE_WIDTH, seed=1), ranks(3, 4))
    found = [module.attention(given, memory, MASK, ranks(3, 4)) for given in (x, x.float())]
    assert torch.equal(*found)


def test_an_unknown_input_projection_is_refused() -> None:
    with unchecked(), pytest.raises(ZipperError, match="'residual', 'paper' or 'none'"):
        InputProjection(WIDTH, "gated")


def test_attention_of_any_lengths_asks_no_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's kernels are asked neither by the whole pass nor by ragged steps, and what a program
    has set is as it was afterwards."""
    model = Zipper.from_towers(
        {name: tiny_tower("llama", n) for n, name in enumerate(("text", "speech"))},
        link=LinkConfig(head_width=8),
    )
    fused, asked = Fused(model.eval()), list[bool]()

    def look(*given: Any, **named: Any) -> Tensor:
        asked.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*given, **named)

    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", look)
    session = fused.open(["text", "speech"], ["text"])
    strands = {name: Strand.alone(torch.tensor([[3, 4, 5]])) for name in ("text", "speech")}
    for on_gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda on_gpu=on_gpu: on_gpu)
        model(strands)
        fused.read({"text": [(session, [3, 4])]})
        assert len(asked) > 8 and set(asked) == {not on_gpu}
        assert torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
        asked.clear()


@pytest.mark.parametrize("closed", ["gate", "feedforward_gate"])
def test_dropout_acts_on_both_branches(closed: str) -> None:
    module = link(replace(SMALL, dropout=0.5)).train()
    with torch.no_grad():
        getattr(module, closed).zero_()  # the other branch alone
    x, source = states(3, 4, WIDTH), states(3, 4, SOURCE_WIDTH, seed=1)
    assert not torch.equal(added(module, x, source), added(module, x, source))


def test_a_link_that_was_calibrated_before_is_whitened_anew_and_computes_the_same() -> None:
    module = link()
    first = states(500, SOURCE_WIDTH, seed=2) * torch.tensor([1, 1, 1, 0.1, 0.1, 3]) + 5
    second = states(500, SOURCE_WIDTH, seed=3) * torch.tensor([0.1, 2, 1, 1, 1, 0.3]) - 1
    x, source = states(3, 4, WIDTH), second[:12].reshape(3, 4, SOURCE_WIDTH)
    before = added(module, x, source)
    module.calibrate(module.moments(first))
    module.calibrate(module.moments(second))
    torch.testing.assert_close(added(module, x, source), before, atol=1e-4, rtol=0)
    white = module.whiten(module.source_norm(second))
    variance = torch.linalg.eigvalsh(torch.cov(white.T))
    assert (variance[1:] > 0.8).all() and variance.max() < 1.01
