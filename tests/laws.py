"""What a zip must obey, as functions that raise AssertionError where it does not, and the tiny zips
to try it on.

tests/test_model.py and tests/test_generation.py hold many zips to these laws; tests/test_mutants.py
shows that a zip with a fault breaks one of them. Samples are drawn and laid out here without
zipper's own collate: lists of tokens, one strand each.
"""

import copy
import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import jaxtyping
import reference
import torch
from torch import Tensor

from zipper.link import InputKind, LinkConfig
from zipper.model import Zipper
from zipper.reading import Reader
from zipper.strand import Segment
from zipper.testing import tiny_tower
from zipper.tower import Past, Strand, Tower

# Nothing of one tower fits another: a mix-up is an error of shapes, or of ids.
WIDTH = {"text": 16, "speech": 24, "image": 32, "motion": 40}
LAYERS = {"text": 5, "speech": 4, "image": 3, "motion": 2}
VOCABULARY = {"text": 31, "speech": 23, "image": 17, "motion": 19}
TOKENS = {"text": 4.0, "speech": 10.0, "image": 3.0, "motion": 5.0}
SEED = {"text": 1, "speech": 2, "image": 3, "motion": 4}
ENDS = {
    "text": (0, 19),
    "speech": (0, 14),
    "image": (0, 11),
    "motion": (0, 7),
}  # tokens that these towers like to say, so that segments end
SMALL = LinkConfig(head_width=8)
LLAMAS = {"text": "llama", "speech": "llama"}


class Token(NamedTuple):
    """A token of a linear sequence: position among those of its tower, time among all of its
    document."""

    tower: str
    id: int
    position: int
    time: int
    document: int = 0


Row = list[Token]


def zipped(
    families: Mapping[str, str],
    every: Mapping[str, int] | None = None,
    *,
    junctions: Sequence[Mapping[str, int]] | None = None,
    shows: Mapping[str, Any] | None = None,
    links: Sequence[tuple[str, int, str, int]] | None = None,
    attention: Literal["sdpa", "eager"] = "sdpa",
    dtype: torch.dtype = torch.float32,
    train: Sequence[str] = (),
    preset: Literal["default", "paper"] = "default",
    link: LinkConfig = SMALL,
    input_projection: InputKind | Mapping[str, InputKind] | None = None,
    awake: bool = True,
    gates: bool = True,
) -> Zipper:
    """A zip of tiny towers, each the same for the same name and family. awake: gates (or not) and
    projections moved off birth."""
    key = repr(
        (
            families,
            every,
            junctions,
            shows,
            links,
            attention,
            dtype,
            train,
            preset,
            link,
            input_projection,
        )
    )
    if key not in _BORN:
        towers = {
            name: tiny_tower(
                family,
                SEED[name],
                WIDTH[name],
                LAYERS[name],
                VOCABULARY[name],
                dtype=dtype,
                attention=attention,
            )
            for name, family in families.items()
        }
        tokens = {name: TOKENS[name] for name in families}
        ends = {name: ENDS[name] for name in families}
        options = {"input_projection": input_projection, "tokens": tokens, "ends": ends}
        options |= {"shows": shows, "links": links}
        _BORN[key] = Zipper.from_towers(towers, every, junctions, train, preset, link, **options)
    model = copy.deepcopy(_BORN[key])
    if awake:
        wake(model, gates)
    return model


_BORN: dict[str, Zipper] = {}  # a copy costs a seventh of building and checking a zip


def wake(model: Zipper, gates: bool = True) -> None:
    """Every new parameter random, gates between 0.5 and 1.5 on either side of 0: nothing is off,
    nothing is the identity."""
    numbers = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.new_parameters().items()):
            noise = torch.randn(parameter.shape, generator=numbers)
            if name.endswith("gate"):
                parameter.copy_(gates * noise.sign() * (0.5 + noise.abs().clamp(max=1)))
            else:
                parameter.add_(0.3 * noise)


def number(sequence: Sequence[tuple[str, int]], document: int = 0) -> Row:
    """Tokens of one document from its linear sequence of (tower, id)."""
    ranks: dict[str, int] = {}
    row = []
    for time, (tower, i) in enumerate(sequence):
        ranks[tower] = ranks.get(tower, -1) + 1
        row.append(Token(tower, i, ranks[tower], time, document))
    return row


def draw(
    dice: random.Random, towers: Sequence[str], segments: int, most: int = 4
) -> list[tuple[str, int]]:
    """A random linear sequence of so many segments of 1 to `most` tokens, any tower after any but
    not always the same; without the tokens that begin and end segments, which no content holds."""
    chosen = dice.choices(towers, k=segments)
    if segments > 1 and len(towers) > 1 and len({*chosen}) == 1:
        chosen[dice.randrange(segments)] = dice.choice(
            [tower for tower in towers if tower != chosen[0]]
        )
    sequence = []
    for tower in chosen:
        ids = [i for i in range(VOCABULARY[tower]) if i not in ENDS[tower]]
        sequence += [(tower, dice.choice(ids)) for _ in range(dice.randint(1, most))]
    return sequence


def lay(rows: Sequence[Row], left: bool = False) -> dict[str, Strand]:
    """One padded strand per tower that any row names. Padding holds ids that would show if anything
    read them."""
    strands = {}
    for tower in dict.fromkeys(token.tower for row in rows for token in row):
        own = [[token[1:] for token in row if token.tower == tower] for row in rows]
        length = max(map(len, own))
        pads = [[(7, 0, 0, -1)] * (length - len(row)) for row in own]
        filled = [pad + row if left else row + pad for row, pad in zip(own, pads, strict=True)]
        strands[tower] = Strand(*torch.tensor(filled).unbind(-1))
    return strands


def by_token(
    strands: Mapping[str, Strand], values: Mapping[str, Tensor]
) -> dict[tuple[int, int, int], Tensor]:
    """(row, document, time) -> what `values` holds for that token."""
    found = {}
    for tower, value in values.items():
        strand = strands[tower]
        for row, slot in (strand.document >= 0).nonzero().tolist():
            found[row, int(strand.document[row, slot]), int(strand.time[row, slot])] = value[
                row, slot
            ]
    return found


def assert_close(
    found: Mapping[Any, Tensor], wanted: Mapping[Any, Tensor], tolerance: float
) -> None:
    """The same keys, and no number further apart than `tolerance`."""
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        gap = (value.double() - wanted[key].double()).abs().max() if value.numel() else 0.0
        assert gap <= tolerance, f"{key} is off by {gap:.2g}"


@contextmanager
def unchecked() -> Iterator[None]:
    """Inside, types and shapes are not checked: bad arguments meet the errors that users meet."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@contextmanager
def embeddings(model: Zipper) -> Iterator[dict[str, Tensor]]:
    """Inside, what every tower embeds is a leaf that gradients can be asked of; the last ones are
    in the value."""
    made: dict[str, Tensor] = {}

    def leaf(name: str, tower: Tower) -> Any:
        def embed(strand: Strand, past: Past | None = None) -> Tensor:
            made[name] = Tower.embed(tower, strand, past).detach().requires_grad_()
            return made[name]

        return embed

    for name in model.config.towers:
        tower = model.towers[name]
        object.__setattr__(tower, "embed", leaf(name, tower))
    try:
        yield made
    finally:
        for name in model.config.towers:
            object.__delattr__(model.towers[name], "embed")


def nothing_leaks(
    model: Zipper, strands: Mapping[str, Strand], row: int, document: int, time: int
) -> float | None:
    """Logits of one document up to `time` depend on nothing but its tokens up to `time`.

    Everything else is replaced: what comes later, the other documents of its row, the other rows,
    the ids of padding. The logits must be the same in every bit, and their gradient by what was
    replaced exactly 0. Returns the positive control, how much the last of these logits change with
    what they may see of other towers; None where that is nothing.
    """

    def logits(strands: Mapping[str, Strand]) -> dict[str, Tensor]:
        torch.manual_seed(0)  # the same dropout every time
        return model(strands)

    def replaced(where: Mapping[str, Tensor]) -> dict[str, Strand]:
        other = {}
        for name, strand in strands.items():
            shift = torch.randint(1, VOCABULARY[name], strand.ids.shape, generator=numbers)
            ids = torch.where(where[name], (strand.ids + shift) % VOCABULARY[name], strand.ids)
            other[name] = dataclasses.replace(strand, ids=ids)
        return other

    numbers = torch.Generator().manual_seed(time)
    kept = {}
    for name, strand in strands.items():
        kept[name] = (strand.document == document) & (strand.time <= time)
        kept[name] &= torch.arange(len(strand.ids))[:, None] == row
    with embeddings(model) as leaves:
        before = logits(strands)
        loss = sum(
            (
                before[name][kept[name]].float() * torch.randn(VOCABULARY[name], generator=numbers)
            ).sum()
            for name in kept
        )
        gradients = torch.autograd.grad(loss, [leaves[name] for name in strands], allow_unused=True)
    for name, gradient in zip(strands, gradients, strict=True):
        if gradient is not None:
            assert gradient.isfinite().all(), (
                f"a gradient by the embeddings of {name!r} is not finite"
            )
            assert not gradient[~kept[name]].any(), (
                f"a gradient by what is hidden in {name!r} is not 0"
            )
    with torch.no_grad():
        after = logits(replaced({name: ~mask for name, mask in kept.items()}))
        for name, mask in kept.items():
            assert torch.equal(before[name][mask], after[name][mask]), (
                f"logits of {name!r} change with what is hidden from them"
            )
        last = {
            name: int(strands[name].time[mask].max()) if mask.any() else -1
            for name, mask in kept.items()
        }
        reader = max(last, key=lambda name: last[name])
        seen = {name: mask & (name != reader) for name, mask in kept.items()}
        if not any(mask.any() for mask in seen.values()):
            return None
        here = kept[reader] & (strands[reader].time == last[reader])
        return float((logits(replaced(seen))[reader] - before[reader])[here].abs().max())


def is_the_reference(
    model: Zipper, sequence: Sequence[tuple[str, int]], gradients: bool = True
) -> None:
    """A zip of Llamas gives the logits of the naive reference, which runs in double precision, and
    its gradients too."""
    paper = model.config.link.projection_relu
    tokens = {name: tower.tokens for name, tower in model.config.towers.items()}
    config = model.config
    shows = config.shows or config.junctions
    width = config.link.head_width
    shape = reference.Shape(config.junctions, shows, width, paper, tokens)
    mine = model.new_parameters()
    theirs = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in mine.items()}
    towers = {
        name: tiny_tower("llama", SEED[name], WIDTH[name], LAYERS[name], VOCABULARY[name]).double()
        for name in WIDTH
    }
    wanted = reference.logits(
        {name: towers[name] for name in dict(sequence)}, theirs, sequence, shape
    )
    found = {name: logits[0] for name, logits in model(lay([number(sequence)])).items()}
    assert_close(found, wanted, 1e-5)
    if gradients:
        numbers = torch.Generator().manual_seed(0)
        weights = {
            name: torch.randn(value.shape, generator=numbers)
            for name, value in sorted(wanted.items())
        }
        losses = [
            sum((weights[name] * logits[name]).sum() for name in weights)
            for logits in (found, wanted)
        ]
        learn = [name for name, p in mine.items() if p.requires_grad]
        parts = [
            torch.autograd.grad(
                loss, [p[name] for name in learn], allow_unused=True, materialize_grads=True
            )
            for loss, p in zip(losses, (mine, theirs), strict=True)
        ]
        scale = [max(1.0, float(gradient.abs().max())) for gradient in parts[1]]
        ours, wanted = (
            {name: g / s for name, g, s in zip(learn, part, scale, strict=True)} for part in parts
        )
        assert_close(ours, wanted, 1e-4)


def bare(model: Zipper, name: str, strand: Strand, cache: bool = False) -> Tensor:
    """Logits of one tower alone, as transformers computes them; the rows may be padded on one side.

    cache: keys and values pass through one, which lays them out otherwise: eager attention then
    rounds otherwise.
    """
    ids, valid = strand.ids, strand.document >= 0
    given: dict[str, Tensor] = (
        {} if valid.all() else {"attention_mask": valid.long(), "position_ids": strand.position}
    )
    return model.tower(name)(ids, use_cache=cache, **given).logits


@torch.no_grad()
def unimodal_is_bare(model: Zipper) -> None:
    """However awake the zip is, a document of one tower has the bits of the bare tower: alone, in
    steps, and as a row of a batch in which another row reads two."""
    dice = random.Random(0)
    for name in model.config.towers:
        other = next(n for n in model.config.towers if n != name)
        alone = [number(draw(dice, [name], 3)) for _ in range(2)]
        strand = lay(alone, left=True)[name]
        valid = strand.document >= 0
        assert torch.equal(model({name: strand})[name][valid], bare(model, name, strand)[valid])
        hidden, _ = model.step({name: strand}, model.start([name], [name]))
        assert torch.equal(
            model.unembed(name, hidden[name])[valid], bare(model, name, strand, cache=True)[valid]
        )
        mixed = lay([alone[0], alone[1] + [Token(other, 5, 0, len(alone[1]))]], left=True)
        assert torch.equal(
            model(mixed)[name][0][valid[0]], bare(model, name, mixed[name])[0][valid[0]]
        )


@torch.no_grad()
def first_segment_is_bare(model: Zipper) -> None:
    """Of a zip without input projections: tokens that have nothing to see have the bits of the bare
    tower."""
    for first, second in [tuple(model.config.towers), tuple(reversed(model.config.towers))]:
        rows = [
            number([(first, 3), (first, 4), (first, 5), (second, 6), (second, 7), (first, 8)]),
            number([(first, 9), (second, 2), (second, 6), (first, 3)]),
        ]
        strands = lay(rows, left=True)
        found, own = (
            by_token(strands, model(strands)),
            by_token(strands, {first: bare(model, first, strands[first])}),
        )
        for key in [(0, 0, 0), (0, 0, 1), (0, 0, 2), (1, 0, 0)]:
            assert torch.equal(found[key], own[key]), (
                f"token {key} of {first!r} sees nothing and is not what the tower says"
            )


@torch.no_grad()
def packed_is_separate(
    model: Zipper, sequences: Sequence[Sequence[tuple[str, int]]], tolerance: float = 1e-5
) -> None:
    """Documents packed into one row, ragged in a batch padded left or right, and alone: the same
    logits."""
    alone = {}
    for i, sequence in enumerate(sequences):
        strands = lay([number(sequence)])
        alone |= {
            (i, time): value for (_, _, time), value in by_token(strands, model(strands)).items()
        }
    packed = lay([[token for d, sequence in enumerate(sequences) for token in number(sequence, d)]])
    found = by_token(packed, model(packed))
    assert_close(
        {(document, time): value for (_, document, time), value in found.items()}, alone, tolerance
    )
    for left in (True, False):
        ragged = lay([number(sequence) for sequence in sequences], left)
        found = by_token(ragged, model(ragged))
        assert_close(
            {(row, time): value for (row, _, time), value in found.items()}, alone, tolerance
        )


@torch.no_grad()
def steps_are_the_whole(
    model: Zipper,
    sequences: Sequence[Sequence[tuple[str, int]]],
    size: int,
    left: bool = False,
    shuffle: int | None = None,
) -> None:
    """Reading `size` tokens of every row at a time gives the logits of one forward over all of it,
    to 1e-5.

    Every sequence names two towers at least: a plan of several towers takes no row for a unimodal
    one.
    shuffle: after that many steps the rows are reversed and the last one is read twice from then
    on.
    """
    rows = [number(sequence) for sequence in sequences]
    whole = lay(rows)
    wanted = by_token(whole, model(whole))
    names = list(whole)
    state, order, read = model.start(names, names), list(range(len(rows))), set()
    for n, start in enumerate(range(0, max(map(len, rows)), size)):
        if n == shuffle:
            order = [*reversed(order), order[-1]]
            state = state.select(torch.tensor(order))
        strands = lay([rows[row][start : start + size] for row in order], left)
        hidden, state = model.step(strands, state)
        for name in names[: n % 3]:  # now and then
            state = state.compact(name)
        found = by_token(strands, {name: model.unembed(name, h) for name, h in hidden.items()})
        assert_close(
            found,
            {
                (slot, document, time): wanted[order[slot], document, time]
                for slot, document, time in found
            },
            1e-5,
        )
        read |= {(order[slot], document, time) for slot, document, time in found}
    assert read == wanted.keys()


@torch.no_grad()
def is_the_greedy_answer(
    model: Zipper,
    prompt: Sequence[Segment],
    outputs: Sequence[str | Segment],
    limits: Mapping[str, int],
    found: Sequence[Segment],
) -> None:
    """What was produced for one row is what greedy decoding by its definition produces.

    One forward without cache or padding reads prompt and answer; every token of the answer must be
    the likeliest after what came before it, every segment must end where its end is the likeliest
    or its limit is reached, scores must add up to 1e-4.
    """
    ends, sequence = model.ends(), []
    for segment in (*prompt, *found):
        begin, end = ends[segment.tower]
        sequence += [(segment.tower, i) for i in (begin, *segment.content, end)]
    strands = lay([number(sequence)])
    said = by_token(strands, model(strands))
    time = sum(len(segment.content) + 2 for segment in prompt)
    assert len(found) == len(outputs)
    for item, segment in zip(outputs, found, strict=True):
        wanted = item if isinstance(item, Segment) else Segment(item, [])
        (begin, end), forced, score = ends[segment.tower], len(wanted.content), 0.0
        assert segment.tower == wanted.tower and segment.content[:forced] == list(wanted.content)
        for rank, token in enumerate([*segment.content, end]):
            logits = said[0, 0, time + rank]
            if begin != end:
                logits[begin] = -torch.inf
            closed = rank == len(segment.content) and not segment.ended
            if closed:
                assert rank >= limits[segment.tower] and int(logits.argmax()) != end, (
                    "it was closed without need"
                )
            elif rank >= forced:
                assert int(logits.argmax()) == token, (
                    f"token {rank} of {segment} is not the likeliest"
                )
                score += float(logits.log_softmax(-1)[token])
        assert forced <= len(segment.content) <= max(forced, limits[segment.tower])
        assert abs(segment.score - score) < 1e-4
        time += len(segment.content) + 2


def read_one(
    reader: Reader, tower: str, pieces: Sequence[tuple[Any, Sequence[int]]]
) -> list[Tensor | None]:
    """What sequences that read one tower are given."""
    return reader.read({tower: pieces})[tower]
