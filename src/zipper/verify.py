"""Verify: the promises that any zipped model must keep, tried on the model itself.

Nothing is assumed of how it was trained. Leaks are looked for with all gates forced open, because a closed gate hides every fault
behind it.
"""

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from jaxtyping import Bool
from torch import Tensor

from zipper.generation import generate
from zipper.link import Link
from zipper.model import Zipper
from zipper.sampling import Sampling
from zipper.sequence import Segment, collate
from zipper.tower import Strand

LENGTH = 5  # random tokens per segment
OPEN = 1.0  # what gates are forced to
TOLERANCE = 1e-4  # cached against full, relative to the largest logit: other matrix shapes round otherwise


@dataclass(frozen=True)
class Check:
    """One promise: whether it held, and what was measured."""

    promise: str
    held: bool
    measured: str


@torch.inference_mode()
def verify(model: Zipper, seed: int = 0) -> list[Check]:
    """Try preservation, leaks, packing, cached decoding and closed segments on random ids; the model is not changed."""
    random = torch.Generator().manual_seed(seed)
    checks = [check for name in model.towers for check in _preserved(model, name, random)]
    if len(model.towers) > 1:
        opened = _opened(model)
        for order in permutations(model.towers):
            checks += _leaks(opened, order, random)
        checks.append(_packed(opened, random))
        checks.append(_cached(model, random))
        checks.append(_closed(model, random))
    return checks


def _preserved(model: Zipper, name: str, random: torch.Generator) -> list[Check]:
    """The unimodal path is the bare tower bit for bit; what is frozen has the content that the zip pins."""
    ids = _ids(model, name, random, 12)[None]
    bare = model.tower(name)(input_ids=ids).logits
    path = model({name: Strand.alone(ids)})[name]
    checks = [_count(f"unimodal {name} is the bare tower", bare, path)]
    tower = model.config.towers[name]
    if not tower.train:
        found = model.pin(name, getattr(torch, tower.dtype))
        checks.append(Check(f"frozen {name} is its base", found == tower.digest, f"hash {found[:12]}, pinned {tower.digest[:12]}"))
    return checks


def _leaks(model: Zipper, order: Sequence[str], random: torch.Generator) -> list[Check]:
    """Replace every token after each time; nothing up to it may change, and something that sees a changed token must."""
    sample = [Segment(name, _ids(model, name, random, LENGTH).tolist()) for name in (*order, *order)]
    times = sum(len(segment.content) + 2 for segment in sample)
    strands = collate([sample] * times, model.ends()).strands  # row t: everything after time t is replaced
    cut = torch.arange(times)[:, None]
    changed = {name: _replaced(model, name, strand, strand.time > cut, random) for name, strand in strands.items()}
    before, after = model(strands), model(changed)
    label = " ".join(order)
    leaks = sum(int((before[n] != after[n]).any(-1)[strands[n].time <= cut].sum()) for n in strands)
    checks = [Check(f"no leak, order {label}", leaks == 0, f"{leaks} logits up to a time changed with tokens after it")]
    first, last = order[0], order[-1]
    seen = {**strands, first: _replaced(model, first, strands[first], strands[first].time < LENGTH + 2, random)}
    moved = float((model(seen)[last] - before[last]).abs().max())
    return [*checks, Check(f"{last} sees {first}, order {label}", moved > 1e-4, f"largest change of a logit {moved:.1e}")]


def _packed(model: Zipper, random: torch.Generator) -> Check:
    """Two documents in one row: what the second holds changes nothing in the first."""
    documents = [[Segment(name, _ids(model, name, random, LENGTH).tolist()) for name in model.towers] for _ in range(2)]
    strands = collate(documents, model.ends(), packed=[[0, 1]]).strands
    changed = {name: _replaced(model, name, strand, strand.document == 1, random) for name, strand in strands.items()}
    before, after = model(strands), model(changed)
    leaks = sum(int((before[n] != after[n]).any(-1)[strands[n].document == 0].sum()) for n in strands)
    return Check("packed documents do not see each other", leaks == 0, f"{leaks} logits changed with the neighbour")


def _cached(model: Zipper, random: torch.Generator) -> Check:
    """Token by token with caches gives what one full forward gives."""
    order = (*model.towers, *model.towers)
    sample = [Segment(name, _ids(model, name, random, LENGTH).tolist()) for name in order]
    strands = collate([sample], model.ends()).strands
    full = model(strands)
    state = model.start(tuple(strands), tuple(strands))
    worst = 0.0
    for time in range(sum(s.ids.shape[1] for s in strands.values())):
        name = next(n for n, s in strands.items() if (s.time == time).any())
        slot = int((strands[name].time == time).nonzero()[0, 1])
        one = Strand(*(getattr(strands[name], f.name)[:, slot : slot + 1] for f in dataclasses.fields(Strand)))
        hidden, state = model.step({name: one}, state)
        want = full[name][:, slot]
        worst = max(worst, float((model.unembed(name, hidden[name])[:, 0] - want).abs().max() / want.abs().max()))
    return Check("cached is full", worst <= TOLERANCE, f"largest relative difference {worst:.1e}")


def _closed(model: Zipper, random: torch.Generator) -> Check:
    """Every produced segment stops, by its end token or at its cap, and holds no end token inside."""
    names = list(model.towers)
    wrong = 0
    for given in names:
        outputs = [name for name in names if name != given]
        prompt = [Segment(given, _ids(model, given, random, LENGTH).tolist())]
        limits = dict.fromkeys(outputs, 2 * LENGTH)
        for segment in generate(model, [prompt], outputs, Sampling(temperature=1.0), limits)[0]:
            end = model.ends()[segment.tower].end
            wrong += end in segment.content or len(segment.content) > 2 * LENGTH
    return Check("every produced segment ends", wrong == 0, f"{wrong} segments did not")


def _opened(model: Zipper) -> Zipper:
    """A copy with every gate forced open."""
    opened = copy.deepcopy(model)
    for link in opened.links.values():
        assert isinstance(link, Link)
        link.gate.fill_(OPEN)
        if link.feedforward is not None:
            link.feedforward_gate.fill_(OPEN)
    return opened


def _ids(model: Zipper, name: str, random: torch.Generator, n: int) -> Tensor:
    """Random ids that are neither begin nor end."""
    ends = model.ends()[name]
    allowed = torch.tensor([i for i in range(model.config.towers[name].vocabulary) if i not in ends])
    return allowed[torch.randint(len(allowed), (n,), generator=random)]


def _replaced(model: Zipper, name: str, strand: Strand, where: Bool[Tensor, "batch length"], random: torch.Generator) -> Strand:
    """The strand with other ids where asked: each is moved by a random step through the vocabulary, so that it surely differs."""
    vocabulary = model.config.towers[name].vocabulary
    step = torch.randint(1, vocabulary, strand.ids.shape, generator=random)
    return dataclasses.replace(strand, ids=torch.where(where, (strand.ids + step) % vocabulary, strand.ids))


def _count(promise: str, wanted: Tensor, found: Tensor) -> Check:
    changed = int((wanted != found).sum())
    return Check(promise, changed == 0, f"{changed} of {wanted.numel()} logits differ")
