"""-log p(target) over a large vocabulary, a few logits at a time. Nothing here knows what
towers are made of."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from zipper.strand import NO_CHOICE, Batch, Segment, Target, collate

#: Most logits made at once, 128 MB in float32. Up to here the loss is computed in one piece.
MOST = 1 << 25

UNSAID = -100  # the target of a token that no head can say
CHOICE = "choice"  # what a loss is called that is of no tower

Head = Callable[[Tensor], Tensor]


def nll(
    head: Head,
    hidden: Float[Tensor, "tokens width"],
    targets: Int[Tensor, " tokens"],
    vocabulary: int,
) -> Float[Tensor, " tokens"]:
    """-log softmax(head(hidden))[target] of every token, in nats and float32; 0 for a target that
    the head has no logit of, as ImageGPT's has none of an end: there the length says it.

    head: states [tokens, width] -> logits [tokens, vocabulary], of each token by its own state
    alone. Where these would be more than MOST, they are made in pieces that do not outlive one
    another. A frozen head costs no more for it: each piece is turned into the gradient of its
    states at once. A head that learns makes its logits a second time in the backward.
    """
    rows = max(1, MOST // vocabulary)
    if len(targets) <= rows:
        return _whole(head, hidden, targets)
    pieces = list(zip(hidden.split(rows), targets.split(rows), strict=True))
    if torch.is_grad_enabled() and head(hidden[:1].detach()).requires_grad:
        parts = [
            checkpoint(_whole, head, h, t, use_reentrant=False, preserve_rng_state=False)
            for h, t in pieces
        ]
    elif torch.is_grad_enabled() and hidden.requires_grad:
        parts = [_Frozen.apply(head, h, t) for h, t in pieces]
    else:
        parts = [_whole(head, h, t) for h, t in pieces]
    return torch.cat(parts)


def batch_losses(model: Any, batch: Batch) -> dict[str, Tensor]:
    """Per tower the weighted sum of -log p(target) in nats, and under CHOICE that of what was
    chosen; logits only where there is something to predict.

    model: has `hidden` and `nll`. A weight below 0 counts as 0, but its logits are computed, as
    where processes have to meet.
    """
    losses: dict[str, Tensor] = {}
    wanted = {name: weight != 0 for name, weight in batch.weights.items() if (weight != 0).any()}
    outputs = tuple(dict.fromkeys([*wanted, *batch.choices]))
    plan = (batch.company,) if batch.company else ()
    hidden = model.hidden(batch.strands, outputs, *plan)
    for name, came in batch.choices.items():
        states = hidden[name]
        where = came.to(states.device) != NO_CHOICE
        right = came.to(states.device)[where]
        said = model.choice(name, states[where])
        each = F.cross_entropy(said, torch.where(right < 0, -2 - right, right), reduction="none")
        losses[CHOICE] = losses.get(CHOICE, 0.0) + (each * (right >= 0)).sum()
    for name, where in wanted.items():
        states = hidden[name]
        where, targets, weights = (
            x.to(states.device) for x in (where, batch.targets[name], batch.weights[name])
        )
        each = model.nll(name, states[where][None], targets[where][None])[0]
        losses[name] = (each * weights[where].clamp(min=0)).sum()
    return losses


def per_token(losses: Callable[[Batch], Mapping[str, Any]], batches: Iterable[Batch]) -> float:
    """Nats a token of all that is produced in these batches, choices among it. losses: of a batch,
    summed, as from `batch_losses`."""
    total, count = 0.0, 0.0
    for batch in batches:
        total += sum(float(loss) for loss in losses(batch).values())
        count += sum(float(weight.clamp(min=0).sum()) for weight in batch.weights.values())
        count += sum(int((came >= 0).sum()) for came in batch.choices.values())
    return total / count


@torch.no_grad()
def scores(model: Any, samples: Sequence[Sequence[Segment]], rows: int = 16) -> list[list[float]]:
    """log p in nats of each target of each sample: of its ids and its end, all before it given. So
    `Produced.score` says it of what was generated, where the begin id, of which a trained model
    thinks nothing, is ruled out.

    rows: so many samples are read at once, of like length; a sample's company changes no more than
    the rounding.
    """
    found: list[list[float]] = [[] for _ in samples]
    order = sorted(range(len(samples)), key=lambda n: sum(len(s.content) for s in samples[n]))
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), rows):
            some = order[start : start + rows]
            for number, each in zip(some, _scores(model, [samples[n] for n in some]), strict=True):
                found[number] = each
    finally:
        model.train(training)
    return found


def _scores(model: Any, samples: Sequence[Sequence[Segment]]) -> list[list[float]]:
    batch = collate(samples, model.ends()).to(next(model.parameters()).device)
    wanted = {name: weight != 0 for name, weight in batch.weights.items() if weight.any()}
    hidden = model.hidden(batch.strands, tuple(wanted))
    each = {name: torch.zeros(where.shape) for name, where in wanted.items()}
    for name, where in wanted.items():
        said = model.nll(name, hidden[name][where][None], batch.targets[name][where][None])
        each[name][where.cpu()] = -said[0].cpu()
    found: list[list[float]] = [[] for _ in samples]
    for row, sample in enumerate(samples):
        slot = dict.fromkeys(batch.strands, 0)
        for segment in sample:
            tower, begun = segment.tower, slot[segment.tower]
            slot[tower] += len(segment.content) + 2
            if isinstance(segment, Target) and segment.weight:
                found[row].append(float(each[tower][row, begun : slot[tower] - 1].sum()))
    return found


def _whole(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = head(hidden).float()
    said = targets.masked_fill(targets >= logits.shape[-1], UNSAID)
    return F.cross_entropy(logits, said, ignore_index=UNSAID, reduction="none")


class _Frozen(torch.autograd.Function):
    """`_whole` by a head that does not learn. A token's loss depends on its own state alone, so its
    gradient for any loss on top is this one's times a number: no logits need to be kept or made
    again.
    """

    @staticmethod
    def forward(ctx: Any, head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
        with torch.enable_grad():
            state = hidden.detach().requires_grad_()
            losses = _whole(head, state, targets)
            ctx.save_for_backward(*torch.autograd.grad(losses.sum(), state))
        return losses.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return None, gradient * upstream[:, None].to(gradient.dtype), None
