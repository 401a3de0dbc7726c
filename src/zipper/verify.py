"""Verify: the promises that any zipped model must keep, tried on the model itself.

Nothing is assumed of how it was trained, of its towers or of what its ids mean. All but the frozen
tensors is tried on a model that
shares the towers but whose links and input projections are wide awake: a closed gate hides every
fault behind it.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from inspect import signature
from itertools import permutations
from typing import Any, cast, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from zipper.errors import ZipperError
from zipper.generation import Engine, generate
from zipper.link import Chooser, InputProjection, Link, Memory, project
from zipper.model import Zipper
from zipper.reading import Model, Stepwise, Walk
from zipper.sampling import Sampling
from zipper.saving.zips import TowerSource
from zipper.strand import PADDING, Segment, Strand, collate
from zipper.tower import ROWS, Tower
from zipper.towers.proof import Rows

LENGTH = 3  # random tokens per segment; fewer where a tower reads few
ALONE = 12  # tokens that a tower reads alone
OPEN = 1.0  # what gates are forced to

#: The largest difference between two ways to the same logits, relative to the largest logit of the
#: token: matrices of other shapes round otherwise. Sound zips came to 3e-6, 9e-3 and 4e-2 in 32,
#: float16 and bfloat16; faults mostly to more than 8e-2, so that 16 bits hide small ones and
#: `zipper verify` works in 32. In 16 bits nothing more can be promised of any model: where the two
#: likeliest tokens are closer than twice this, cached decoding may take the other. A trained one is
#: surer, see tests/test_preservation.py: the likeliest is the same for at least 99 % of all tokens.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

#: What a fault may raise. A check that cannot be run to its end is a broken promise too.
FAILURES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

Found = tuple[bool, str]


@dataclass(frozen=True)
class Check:
    """One promise: whether it held, and what was measured."""

    promise: str
    held: bool
    measured: str


@torch.inference_mode()
def verify(
    model: Zipper,
    seed: int = 0,
    bases: Mapping[str, TowerSource] | None = None,
    only: str = "",
    pinned: Mapping[str, str] | None = None,
) -> list[Check]:
    """Try preservation, leaks, packing, cached decoding and closed segments on random ids; the
    model is not changed.

    bases: where the bases of frozen towers lie: the tensors that differ are named, and a tower is
    held against its base also where it was turned into a smaller dtype than it was pinned in, which
    changes its hash. only: try the promises that begin with this. pinned: the hashes of towers as
    the zip was saved with them, where loading allowed others (default its own). Raises ZipperError
    where a tower can read too few tokens to be tried, and where no promise begins with `only`.
    """
    training = model.training
    model.eval()
    try:
        promises = _promises(model, _Trial.of(model, seed), bases or {}, pinned or {})
        chosen = {name: measure for name, measure in promises.items() if name.startswith(only)}
        if not chosen:
            raise ZipperError(
                f"This model makes no promise that begins with {only!r}: "
                f"give the beginning of one of {', '.join(map(repr, promises))}."
            )
        return [_tried(promise, measure) for promise, measure in chosen.items()]
    finally:
        model.train(training)


def _promises(
    model: Zipper,
    trial: "_Trial",
    bases: Mapping[str, TowerSource],
    pinned: Mapping[str, str],
) -> dict[str, Callable[[], Found]]:
    """What there is to try of this model, by what it promises."""
    tries: dict[str, Callable[[], Found]] = {}
    for name, tower in model.config.towers.items():
        tries[f"unimodal {name} is the bare tower"] = partial(_unimodal, trial, name, 0)
        if _tower(model, name).rows != "unpadded":
            tries[f"unimodal {name} is the bare tower, left-padded"] = partial(
                _unimodal, trial, name, ALONE // 3
            )
        tries[f"{name} alone writes what the bare tower writes"] = partial(_writes, trial, name)
        tries[f"buffers of {name} are those of its configuration"] = partial(_buffers, model, name)
        dtype = next(_tower(model, name).parameters()).dtype
        if not tower.train and (
            name in bases or torch.promote_types(dtype, getattr(torch, tower.dtype)) == dtype
        ):
            wanted = pinned.get(name, tower.digest)
            tries[f"frozen {name} is its base"] = partial(
                _frozen, model, name, bases.get(name), wanted
            )
    for order in permutations(model.towers):
        at = f"order {' '.join(order)}"
        tries[f"every produced segment is closed, {at}"] = partial(_closed, trial, order)
        if len(order) > 1:
            tries[f"no leak, {at}"] = partial(_leaks, trial, order, False)
            if trial.rows == "packed":
                tries[f"no leak in packed rows, {at}"] = partial(_leaks, trial, order, True)
                tries[f"packed neighbours do not see each other, {at}"] = partial(
                    _neighbours, trial, order
                )
            for source, target in permutations(order, 2):
                if any((key.source, key.target) == (source, target) for key in model.config.links):
                    tries[f"{target} sees {source}, {at}"] = partial(
                        _sees, trial, order, source, target
                    )
            tries[f"rows of a batch are the zip by its definition, {at}"] = partial(
                _defined, trial, order
            )
            tries[f"cached is full, {at}"] = partial(_cached, trial, order)
        if model.config.chooses:
            tries[f"what comes next is chosen by what came before, {at}"] = partial(
                _chooses, trial, order
            )
    return tries


def _tried(promise: str, measure: Callable[[], Found]) -> Check:
    try:
        return Check(promise, *measure())
    except FAILURES as error:
        return Check(promise, False, f"it fails by {type(error).__name__}: {error}")


@final
@dataclass(frozen=True)
class _Trial:
    """A model wide awake, and what to feed it. length: random tokens per segment. rows: what all
    towers can read. tolerance: see TOLERANCE."""

    model: Zipper
    length: int
    rows: Rows
    tolerance: float
    random: torch.Generator

    @classmethod
    def of(cls, model: Zipper, seed: int) -> "_Trial":
        """The towers are shared, links and projections are copied, forced open and off the
        identity."""
        random = torch.Generator().manual_seed(seed)
        awake = copy.deepcopy(model, {id(model.towers): model.towers})
        for link in awake.links.values():
            assert isinstance(link, Link)
            link.gate.fill_(OPEN)
            if link.feedforward is not None:
                link.feedforward_gate.fill_(OPEN)
        for chooser in awake.choosers.values():
            assert isinstance(chooser, Chooser)
            weight = chooser.out.weight
            if not weight.any():
                weight.copy_(torch.randn(weight.shape, generator=random))
        for projection in awake.inputs.values():
            assert isinstance(projection, InputProjection)
            last = projection.mlp[-1].get_parameter("weight")
            if not last.any():
                last.copy_(torch.randn(last.shape, generator=random) * len(last) ** -0.5)
        rooms = {name: _room(model, name) for name in model.towers}
        # No check reads more than three segments of a tower.
        length = min(LENGTH, min(rooms.values()) // 3 - 2)
        if length < 1:
            raise ZipperError(
                f"Towers can read {rooms} tokens; to be verified a tower must be able to read 9."
            )
        rows = min((_tower(model, name).rows for name in model.towers), key=ROWS.index)
        return cls(
            awake,
            length,
            rows,
            max(TOLERANCE[p.dtype] for p in awake.parameters() if p.is_floating_point()),
            random,
        )

    def ids(self, name: str, n: int) -> list[int]:
        """Random ids that are neither begin nor end."""
        allowed = [
            i
            for i in range(self.model.config.towers[name].vocabulary)
            if i not in self.model.ends()[name]
        ]
        return [allowed[i] for i in torch.randint(len(allowed), (n,), generator=self.random)]

    def sample(self, names: Sequence[str], shorter: int = 0) -> list[Segment]:
        """A segment of random ids for each name."""
        return [Segment(name, self.ids(name, self.length - shorter)) for name in names]

    def strands(
        self,
        samples: Sequence[Sequence[Segment]],
        packed: Sequence[Sequence[int]] | None = None,
        left: bool = True,
    ) -> dict[str, Strand]:
        """Samples as rows, padded on the left as generation does where towers can read that, or
        packed."""
        return collate(
            samples, self.model.ends(), left=left and self.rows != "unpadded", packed=packed
        ).strands

    def logits(
        self, strands: Mapping[str, Strand]
    ) -> dict[str, Float[Tensor, "batch length vocabulary"]]:
        """What the model says of strands, wherever its towers are."""
        return {name: logits.cpu() for name, logits in self.model(strands).items()}

    def replaced(self, name: str, strand: Strand, where: Bool[Tensor, "batch length"]) -> Strand:
        """The strand with other ids where asked: moved by a random step through the vocabulary, so
        that they surely differ."""
        vocabulary = self.model.config.towers[name].vocabulary
        step = torch.randint(1, vocabulary, strand.ids.shape, generator=self.random)
        return dataclasses.replace(
            strand, ids=torch.where(where, (strand.ids + step) % vocabulary, strand.ids)
        )

    def changed(
        self,
        strands: Mapping[str, Strand],
        hidden: Mapping[str, Tensor],
        watched: Mapping[str, Tensor],
    ) -> dict[str, int]:
        """How many `watched` tokens get other logits, in any bit if towers are `exact`, when the
        `hidden` tokens are replaced."""
        before = self.logits(strands)
        after = self.logits(
            {name: self.replaced(name, strand, hidden[name]) for name, strand in strands.items()}
        )
        slack = 0.0 if self.exact else self.tolerance
        return {
            name: int((_gaps(after[name], before[name])[watched[name]] > slack).sum())
            for name in strands
        }

    @cached_property
    def exact(self) -> bool:
        """Whether the towers, each alone, give a row the same bits whatever the other row holds.
        Mixtures of experts do not: how many tokens an expert gets at once decides how it rounds."""
        for name in self.model.towers:
            ids = torch.tensor([self.ids(name, 2 * self.length) for _ in range(2)])
            strand, second = Strand.alone(ids), torch.tensor([[False], [True]])
            rows = [
                self.logits({name: self.replaced(name, strand, second)})[name][0] for _ in range(5)
            ]
            if any(not torch.equal(rows[0], row) for row in rows):
                return False
        return True


def _unimodal(trial: _Trial, name: str, padding: int) -> Found:
    """The logits of a plan of one tower are those of the transformers model, bit for bit."""
    length = min(ALONE, _room(trial.model, name))
    ids = torch.tensor([trial.ids(name, length) for _ in range(2)])
    document = torch.zeros_like(ids)
    document[1, : min(padding, length - 1)] = PADDING
    strand, valid = Strand.alone(ids, document), document >= 0
    given: dict[str, Tensor] = {}
    if padding:
        given["attention_mask"] = valid.long()
        if "position_ids" in signature(trial.model.tower(name).forward).parameters:
            given["position_ids"] = strand.position + _first_position(trial.model, name, ids)
    bare = _bare(trial.model, name, ids, given)[valid]
    wrong = int((bare != trial.logits({name: strand})[name][valid]).sum())
    return wrong == 0, f"{wrong} of {bare.numel()} logits differ"


def _bare(
    model: Zipper, name: str, ids: Tensor, given: Mapping[str, Tensor]
) -> Float[Tensor, "batch length vocabulary"]:
    """What the transformers model says by itself."""
    device, own = _tower(model, name).device, model.tower(name)
    logits: Tensor = own(
        ids.to(device), use_cache=False, **{key: value.to(device) for key, value in given.items()}
    ).logits
    return logits.cpu()


def _first_position(model: Zipper, name: str, ids: Tensor) -> int:
    """What a transformers model counts positions from where it is not told any: 0, or what comes
    after its padding id."""
    padding = model.tower(name).config.get_text_config().pad_token_id
    slots = torch.arange(ids.shape[1]).expand_as(ids)
    if padding is None or torch.equal(
        _bare(model, name, ids, {}), _bare(model, name, ids, {"position_ids": slots})
    ):
        return 0
    return int(padding) + 1


def _writes(trial: _Trial, name: str) -> Found:
    """Greedy generation by a plan of one tower, against a greedy loop over the transformers model
    and its own cache."""
    prompt = trial.ids(name, trial.length)
    most = min(ALONE, _room(trial.model, name) - len(prompt) - 4)
    recorder: Any = _Recorder(trial.model)
    ((found,),) = generate(recorder, [[Segment(name, prompt)]], [name], Sampling(), {name: most})

    begin, end = trial.model.ends()[name]
    own, cache, tower = trial.model.tower(name), DynamicCache(), _tower(trial.model, name)

    def read(ids: list[int]) -> Tensor:
        given = torch.tensor([ids], device=tower.device)
        logits: Tensor = own(given, **{tower.cache_argument: cache}, use_cache=True).logits
        return logits[:, -1:].cpu()

    read([begin, *prompt, end])
    said, written = [read([begin])], list[int]()
    while len(written) < most:
        logits = said[-1][0, 0].clone()
        if begin != end and begin < len(logits):
            logits[begin] = -torch.inf  # a segment begins once
        if (token := int(logits.argmax())) == end:
            break
        written.append(token)
        said.append(read([token]))
    _, *heard = recorder.said  # the first are those behind the prompt: a product of another shape
    wrong = -1
    if len(said) == len(heard):
        wrong = int((torch.cat(said) != torch.cat(heard)).sum())
    return (
        found.content == written and wrong == 0,
        f"wrote {found.content}, bare {written}; {wrong} logits differ",
    )


def _buffers(model: Zipper, name: str) -> Found:
    """Buffers that no checkpoint holds (rotary frequencies, scales) are those that transformers
    makes from the configuration."""
    own = model.tower(name)
    with _weightless(), torch.random.fork_rng(devices=[]):
        fresh = dict(type(own)(own.config).named_buffers())
    mine = {key: buffer for key, buffer in own.named_buffers() if key not in own.state_dict()}
    wrong = [key for key, buffer in mine.items() if not torch.equal(buffer, fresh[key].to(buffer))]
    return not wrong, f"{len(wrong)} of {len(mine)} differ" + (
        f": {', '.join(wrong[:3])}" if wrong else ""
    )


@contextmanager
def _weightless() -> Iterator[None]:
    """Modules that are made meanwhile have parameters without memory, and real buffers."""
    register = nn.Module.register_parameter

    def empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(
            module,
            name,
            parameter
            if parameter is None
            else nn.Parameter(parameter.to("meta"), parameter.requires_grad),
        )

    nn.Module.register_parameter = empty  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _frozen(model: Zipper, name: str, base: TowerSource | None, pinned: str) -> Found:
    """What is frozen has the content that the zip pins, in the precision in which it was pinned; a
    base tells what differs."""
    dtype = getattr(torch, model.config.towers[name].dtype)
    if base is None:
        found = model.pin(name, dtype)
        return found == pinned, f"hash {found[:12]}, pinned {pinned[:12]}"
    source = base if isinstance(base, Tower) else Tower.load(base, dtype=dtype)
    mine, wanted, found = _tower(model, name).base(), source.base(), source.pin()
    wrong = [
        key
        for key in sorted(wanted)
        if key not in mine or not torch.equal(mine[key], wanted[key].to(mine[key]))
    ]
    listed = f": {', '.join(wrong[:3])}" if wrong else ""
    differ = f"{len(wrong)} of {len(wanted)} tensors differ from the base given{listed}"
    return (
        not wrong and found == pinned,
        f"{differ}; the hash of that base is {found[:12]}, pinned {pinned[:12]}",
    )


def _leaks(trial: _Trial, order: Sequence[str], packed: bool) -> Found:
    """In row t every token after time t is replaced, padding too: no logit up to t may change."""
    times = 2 * len(order) * (trial.length + 2)
    samples = [trial.sample((*order, *order), shorter=t % 2) for t in range(times)]
    rows = [[t] for t in range(times)]
    if packed:
        samples += [trial.sample((*order[::-1], *order[::-1])) for _ in range(times)]
        rows = [[t, times + t] for t in range(times)]
    strands = trial.strands(samples, rows)
    cut = torch.arange(times)[:, None]
    known = {
        name: (strand.document >= 0) & (strand.time <= cut) for name, strand in strands.items()
    }
    leaks = sum(
        trial.changed(strands, {name: ~up_to for name, up_to in known.items()}, known).values()
    )
    return leaks == 0, f"{leaks} of {_total(known)} tokens change with what comes after them"


def _neighbours(trial: _Trial, order: Sequence[str]) -> Found:
    """Two documents in a row: in row r document r is replaced, the other one may not change."""
    strands = trial.strands(
        [trial.sample((*order, *order)), trial.sample((*order[::-1], *order))], [[0, 1], [0, 1]]
    )
    row = torch.arange(2)[:, None]
    hidden = {name: strand.document == row for name, strand in strands.items()}
    others = {name: ~where for name, where in hidden.items()}
    leaks = sum(trial.changed(strands, hidden, others).values())
    return leaks == 0, f"{leaks} of {_total(others)} tokens change with a neighbour"


def _sees(trial: _Trial, order: Sequence[str], source: str, target: str) -> Found:
    """The positive control: tokens of the target change with the first segment of the source, which
    they may see."""
    strands = trial.strands([trial.sample((*order, *order))])
    end = (order.index(source) + 1) * (trial.length + 2)
    hidden = {name: (strand.time < end) & (name == source) for name, strand in strands.items()}
    later = {name: strand.time >= end for name, strand in strands.items()}
    changed = trial.changed(strands, hidden, later)[target]
    return (
        changed > 0,
        f"{changed} of {int(later[target].sum())} tokens change with what they may see",
    )


def _defined(trial: _Trial, order: Sequence[str]) -> Found:
    """Padded and packed rows, the last of one tower only, have the logits that each sample has
    alone by `_definition`."""
    samples = [
        trial.sample((*order, *order)),
        trial.sample((*order, *order), shorter=1),
        trial.sample([order[0]]),
    ]
    wanted = [_definition(trial.model, trial.strands([sample])) for sample in samples]
    worst = 0.0
    for rows, left in (([[0], [1], [2]], True), ([[0, 1], [2]], False))[
        : 2 if trial.rows == "packed" else 1
    ]:
        strands = dict(reversed(trial.strands(samples, rows, left).items()))
        logits = trial.logits(strands)
        for number, sample in enumerate(wanted):
            row = next(r for r, numbers in enumerate(rows) if number in numbers)
            for name, alone in sample.items():
                found = logits[name][row][strands[name].document[row] == rows[row].index(number)]
                worst = max(worst, float(_gaps(found, alone[0]).max()))
    return (
        worst <= trial.tolerance,
        f"largest relative difference {worst:.1e}, {trial.tolerance:.0e} allowed",
    )


def _chooses(trial: "_Trial", order: Sequence[str]) -> Found:
    """The state behind an end token, step by step, is that of the whole, whatever comes later."""
    model, worst = trial.model, 0.0
    ids = {name: list(range(2, 2 + trial.length)) for name in order}
    free = {n: [i for i in ids[n] if i not in model.config.towers[n].ends] for n in order}
    segments = [Segment(name, free[name]) for name in order]
    whole = collate([segments], model.ends()).strands
    hidden = model.hidden(whole, order, order)
    reader = Stepwise(model)
    session = reader.open(order, order)
    for name in order:
        begin, end = model.ends()[name]
        reader.read({name: [(session, [begin, *free[name], end])]})
        told = [hidden[name][0, -1], reader.state(session, name)]
        wanted, found = (model.choice(name, state.to(told[0].device)) for state in told)
        open_to = wanted.isfinite()
        gap = (found[open_to] - wanted[open_to]).abs().max() / wanted[open_to].abs().max()
        worst = max(worst, float(gap.nan_to_num(torch.inf)))
    return worst <= trial.tolerance, f"largest difference {worst:.2g}"


def _definition(
    model: Zipper, strands: Mapping[str, Strand]
) -> dict[str, Float[Tensor, "1 length vocabulary"]]:
    """Logits of one sample by the definition of a zip (sec. 3), without mask, cache, batch, padding
    or order of running: a state behind a block is what the block makes of the fused state before
    it; a fused state is that and what links add, which read earlier tokens' states before fusion.
    A sample of one tower is that tower's alone.
    """
    if len(strands) == 1:
        return {name: _bare(model, name, strand.ids, {}) for name, strand in strands.items()}
    towers = {name: _tower(model, name) for name in strands}
    strands = {name: strand.to(towers[name].device) for name, strand in strands.items()}
    inputs = {}
    for name, tower in towers.items():
        h = tower.embed(strands[name])
        entrances = model.config.inputs[name]
        used = [model.inputs[key] for key, company in entrances.items() if {*company} & {*strands}]
        inputs[name] = project(h, [(cast(InputProjection, part), None) for part in used])
    passes = {name: tower.start(strands[name], inputs[name]) for name, tower in towers.items()}

    @cache
    def state(name: str, depth: int) -> Tensor:
        """Behind so many blocks of a tower, before it is fused there."""
        if not depth:
            return inputs[name]
        return towers[name].run(fused(name, depth - 1), range(depth - 1, depth), passes[name])

    @cache
    def fused(name: str, depth: int) -> Tensor:
        """The same, and what its links add there."""
        h = whole = state(name, depth)
        for key in model.config.links:
            if key.target == name and key.source in towers and model.config.fused(key) == depth:
                source = state(key.source, model.config.shown(key))
                added = _added(model.link(*key), source, h, strands[key.source], strands[name])
                whole = whole + added
        return whole

    # The last block is behind the last depth at which a tower may be fused.
    return {name: tower.unembed(state(name, tower.layers)).cpu() for name, tower in towers.items()}


def _added(
    link: Link, source: Tensor, x: Tensor, read: Strand, at: Strand
) -> Float[Tensor, "1 length width"]:
    """What a link adds to one sample: every token reads the tokens of the source that came before
    it, and no others."""
    keys, values = link.read(source, read.position)
    added = torch.zeros_like(x)
    # Times rise: what is seen is the first so many.
    seen = (read.time[0].to(at.time) < at.time[0, :, None]).sum(-1)
    for count in seen.unique().tolist():
        if count:
            slots, memory = seen == count, Memory(keys[:, :, :count], values[:, :, :count])
            mask = torch.ones(1, int(slots.sum()), count, dtype=torch.bool, device=keys.device)
            added[:, slots] = link(x[:, slots], memory, mask, at.position[:, slots])
    return added


def _cached(trial: _Trial, order: Sequence[str]) -> Found:
    """Two rows of unequal length, read token by token and in chunks with caches: the logits of one
    full forward."""
    samples = [trial.sample((*order, *order)), trial.sample((*order, *order), shorter=1)]
    # Rows that read in turn have padding inside.
    batch = trial.strands(samples[: 2 if trial.rows == "packed" else 1])
    wanted = trial.logits(batch)
    worst = 0.0
    for size in (1, trial.length + 4):  # a chunk goes over the end of a segment
        state = trial.model.start(order, order)
        for piece in _pieces(batch, size):
            for name in piece:
                state = state.compact(name)
            hidden, state = trial.model.step(
                {name: part for name, (part, _) in piece.items()}, state
            )
            for name, (part, slots) in piece.items():
                valid = part.document >= 0
                full = wanted[name].take_along_dim(slots[:, :, None], 1)
                worst = max(
                    [
                        worst,
                        *_gaps(trial.model.unembed(name, hidden[name]).cpu(), full)[valid].tolist(),
                    ]
                )
    return (
        worst <= trial.tolerance,
        f"largest relative difference {worst:.1e}, {trial.tolerance:.0e} allowed",
    )


def _pieces(
    strands: Mapping[str, Strand], size: int
) -> Iterator[dict[str, tuple[Strand, Int[Tensor, "batch length"]]]]:
    """The next `size` tokens of every row, padded on the left, and the slots where they were."""
    for start in range(0, 1 + max(int(strand.time.max()) for strand in strands.values()), size):
        piece = {}
        for name, strand in strands.items():
            chosen = (strand.document >= 0) & (strand.time >= start) & (strand.time < start + size)
            if chosen.any():
                # Those not chosen sort first.
                slots = torch.sort(chosen, stable=True).indices[:, -int(chosen.sum(1).max()) :]
                fields = (
                    getattr(strand, field.name).gather(1, slots)
                    for field in dataclasses.fields(Strand)
                )
                part = Strand(*fields)
                document = torch.where(chosen.gather(1, slots), part.document, PADDING)
                piece[name] = (dataclasses.replace(part, document=document), slots)
        yield piece


def _closed(trial: _Trial, order: Sequence[str]) -> Found:
    """What is read of a segment, given or produced, is begin ... end, once, wherever it was cut; no
    gaps in positions and times."""
    rows = 3 if trial.rows == "packed" else 1  # rows that end in turn have padding inside
    prompts = [
        [Segment(order[-1], trial.ids(order[-1], trial.length - row % 2))] for row in range(rows)
    ]
    plan: list[str | Segment] = [Segment(order[0], trial.ids(order[0], 1)), *order[1:], *order]
    recorder: Any = _Recorder(trial.model, trial.random)
    limits = dict.fromkeys(order, trial.length)
    produced = Engine(recorder, _Held(recorder), rows).generate(
        prompts, plan, Sampling(temperature=1.0), limits
    )
    ends = trial.model.ends()
    wrong = cut = 0
    for row, segments in enumerate(produced):
        wanted: list[tuple[int, str, int, int]] = []
        rank = dict.fromkeys(order, 0)
        for segment in (*prompts[row], *segments):
            for token in (ends[segment.tower].begin, *segment.content, ends[segment.tower].end):
                wanted.append((len(wanted), segment.tower, rank[segment.tower], token))
                rank[segment.tower] += 1
        read = recorder.heard(row)
        wrong += read not in (
            wanted,
            wanted[:-1],
        )  # the end of the last segment is of use to nobody
        wrong += any(
            {*ends[s.tower]} & {*s.content} or len(s.content) > trial.length for s in segments
        )
        cut += sum(not segment.ended for segment in segments)
    return (
        wrong == 0,
        f"{wrong} of {rows} rows are not; {cut} segments were cut, {len(plan) * rows - cut} ended",
    )


@final
class _Held(Stepwise):
    """A reader by steps whose sequences stay the rows that they were, also when they are done."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self._opened: list[Walk] = []

    def open(self, towers: Sequence[str], outputs: Sequence[str]) -> Walk:
        self._opened.append(super().open(towers, outputs))
        return self._opened[-1]


@final
class _Recorder:
    """A model that writes down what generation has it read and what it says. With `random` it now
    and then wants to end a segment: a model that never ends by itself, or always does, would hide
    faults.
    """

    def __init__(self, model: Zipper, random: torch.Generator | None = None) -> None:
        self.model = model
        self.random = random
        self.read: list[tuple[str, Strand]] = []
        self.said: list[Float[Tensor, "batch 1 vocabulary"]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def step(self, strands: Mapping[str, Strand], state: Any) -> tuple[dict[str, Tensor], Any]:
        self.read += strands.items()
        return self.model.step(strands, state)

    def unembed(self, tower: str, hidden: Tensor) -> Tensor:
        logits = self.model.unembed(tower, hidden)
        self.said.append(logits.to("cpu", copy=True))
        if self.random is not None and (end := self.ends()[tower].end) < logits.shape[-1]:
            wants = (torch.rand(len(logits), generator=self.random) < 0.3).to(logits)
            logits[:, -1, end] += 1000 * wants
        return logits

    def heard(self, row: int) -> list[tuple[int, str, int, int]]:
        """What a row has read so far: (time, tower, position, id), in order of time."""
        tokens = []
        for name, strand in self.read:
            valid = strand.document[row] >= 0
            columns = (x[row][valid].tolist() for x in (strand.time, strand.position, strand.ids))
            tokens += [
                (time, name, position, token)
                for time, position, token in zip(*columns, strict=True)
            ]
        return sorted(tokens)


def _tower(model: Zipper, name: str) -> Tower:
    tower = model.towers[name]
    assert isinstance(tower, Tower)
    return tower


def _room(model: Zipper, name: str) -> int:
    """Tokens that a tower can read."""
    return model.limit(name, {}, 1 << 20) + 2


def _gaps(
    found: Float[Tensor, "*tokens vocabulary"], wanted: Float[Tensor, "*tokens vocabulary"]
) -> Float[Tensor, "*tokens"]:
    """The largest difference of logits, relative to the largest logit of the token; infinite where
    it is not a number."""
    return ((found - wanted).abs().amax(-1) / wanted.abs().amax(-1)).nan_to_num(torch.inf)


def _total(where: Mapping[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in where.values())
