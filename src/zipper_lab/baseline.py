"""The paper's baseline: one decoder that reads every modality as one stream ("Single Decoder",
arXiv:2405.18669, sec. 4).

A pre-trained tower gets more ids in its vocabulary, one block of them for each other modality, and
all of it is trained. From outside it looks like a zip: strands in, states of each modality out,
every modality's ids counted from 0. Nothing here knows how it is trained, nor what the ids mean.
"""

import copy
import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from zipper import loss
from zipper.config import TowerConfig, default_limit
from zipper.data.rows import Row
from zipper.errors import ZipperError
from zipper.generation import Limits, generate
from zipper.modality import Modality
from zipper.pipeline import check_pinned
from zipper.sampling import Sampling, check_seed
from zipper.saving import checkpoint, hub
from zipper.saving.zips import TowerSource
from zipper.strand import Ends, Produced, Segment, read_ids
from zipper.tower import Past, PreTrainedModel, Strand, Tower
from zipper.training import TrainConfig
from zipper.training.building import mean_tokens

KIND = "baseline"  # tells its saved configuration from that of a zip
# What configurations call it; the first that is there counts.
FEEDFORWARD_WIDTHS = ("ffn_dim", "n_inner", "intermediate_size")
# Logits at birth against the bare tower's, relative to the largest: wider matrices round otherwise.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class BaselineConfig:
    """What a baseline knows of its modalities.

    towers: the first is the pre-trained one, the others are blocks of ids behind its vocabulary, in
    this order. `vocabulary` counts a modality's own ids; width and layers are those of the one
    decoder.
    """

    towers: dict[str, TowerConfig]
    junctions: tuple[dict[str, int], ...] = ()  # a single decoder has none

    def __post_init__(self) -> None:
        for name in self.towers:
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in dir(nn.ModuleDict()):
                raise ZipperError(
                    f"{name!r} cannot name a modality; use lower-case letters, digits and _, e.g. "
                    "'speech'."
                )

    @property
    def base(self) -> str:
        """The modality whose tower was extended."""
        return next(iter(self.towers))

    @property
    def shifts(self) -> dict[str, int]:
        """What the id 0 of each modality is in the stream."""
        starts = accumulate((tower.vocabulary for tower in self.towers.values()), initial=0)
        return dict(zip(self.towers, starts, strict=False))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON. There the first tower has the ids of all, as the decoder that lies
        beside it does."""
        data = dataclasses.asdict(self)
        every = sum(tower.vocabulary for tower in self.towers.values())
        data["towers"][self.base]["vocabulary"] = every
        return {"kind": KIND, **data}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "BaselineConfig":
        """The inverse of `to_dict`; anything else is a ZipperError."""
        try:
            if data["kind"] != KIND:
                raise KeyError("kind")
            (base, decoder), *added = (
                (name, TowerConfig(**tower)) for name, tower in data["towers"].items()
            )
            own = decoder.vocabulary - sum(tower.vocabulary for _, tower in added)
            return cls({base: dataclasses.replace(decoder, vocabulary=own), **dict(added)})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ZipperError(f"This is not the configuration of a baseline: {error}.") from error


@dataclass(frozen=True)
class Stream:
    """What a baseline has read so far, all modalities in one; a value that `Baseline.step` takes
    and returns."""

    towers: tuple[str, ...]
    outputs: tuple[str, ...]
    past: Past

    def compact(self, tower: str) -> "Stream":
        """Close the gaps that rows which ended early left in the cache."""
        self.past.compact()
        return self

    def select(self, rows: Tensor) -> "Stream":
        """Keep, reorder or repeat rows of the batch; `rows` are indices."""
        self.past.select(rows)
        return self


class Baseline(nn.Module):
    """One decoder for several modalities. Build it with `from_tower`, load it with
    `from_pretrained`; use it like a `Zipper`.

    There is one vocabulary and in training one softmax over it (`nll`). Which modality comes next
    is part of the plan, in generation too, so `unembed` gives the logits of one modality's ids.
    """

    def __init__(self, tower: Tower, config: BaselineConfig) -> None:
        super().__init__()
        wanted = sum(t.vocabulary for t in config.towers.values())
        if tower.vocabulary != wanted:
            raise ZipperError(
                f"The decoder knows {tower.vocabulary} ids, its modalities "
                f"{sorted(config.towers)} have {wanted}."
            )
        self.config = config
        # One and the same under every name.
        self.towers = nn.ModuleDict(dict.fromkeys(config.towers, tower))
        self.links = nn.ModuleDict()  # none: for those who list a model's gates
        self.train(False)

    @classmethod
    def from_tower(
        cls,
        tower: Mapping[str, TowerSource],
        added: Mapping[str, int],
        ends: Mapping[str, tuple[int, int]],
        tokens: Mapping[str, float] | None = None,
        rows: Mapping[str, TowerSource] | None = None,
        parameters: int | None = None,
        positions: int = 0,
        seed: int = 0,
    ) -> "Baseline":
        """Extend a copy of a pre-trained tower. What it did with its own ids it does at birth,
        whatever the options.

        tower: {name of its modality: hub id, folder or loaded causal LM}. added: other modality ->
        number of its ids. ends: name -> (begin id, end id) among its own ids; the tower's own only
        where its configuration does not say. tokens: name -> mean tokens per segment, for caps.
        positions: tokens that a row must have room for, if that is more than the tower was made
        for.

        rows: added modality -> a tower of its own, whose embedding and head the new rows start
        from: their principal components, turned at random into the width of this tower, with the
        mean and the spread of its rows. So distances between rows stay, up to one factor, as far as
        this tower is wide enough. Without: every coordinate is drawn with the mean and the spread
        it has in the tower's own rows.

        parameters: how many the whole is to have, for a comparison at equal size, to the nearest
        neuron: the feed-forwards get more neurons, which nothing reads yet. Raises ZipperError:
        names or ids that do not fit, a tower that cannot be extended.
        """
        check_seed(seed)
        if len(tower) != 1 or tower.keys() & added.keys():
            raise ZipperError(
                f"A baseline extends one tower by other modalities; given are {sorted(tower)} and "
                f"{sorted(added)}."
            )
        ((name, source),) = tower.items()
        base = _load(source).eval()
        sizes, tokens = {name: base.vocabulary, **added}, tokens or {}
        known: dict[str, tuple[Any, Any]] = {name: (base.begin, base.end), **ends}
        own = {other: _load(start) for other, start in (rows or {}).items()}
        _check_names("ends", known, sizes)
        _check_names("tokens", tokens, sizes)
        _check_names("rows", own, added)
        _check_ends(known, sizes)
        _check_sizes(own, sizes)

        origin = hub.absolute(source) if isinstance(source, str | Path) else ""
        config = BaselineConfig(
            {
                other: TowerConfig(
                    source=origin if other == name else "",
                    width=base.width,
                    layers=base.layers,
                    vocabulary=size,
                    begin=known[other][0],
                    end=known[other][1],
                    train=True,
                    input_projection="none",
                    tokens=tokens.get(other, 0.0),
                    dtype=_dtype(base),
                )
                for other, size in sizes.items()
            }
        )

        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            grown = _grown(base, sum(sizes.values()), positions, parameters)
            for other, n in added.items():
                likes: Sequence[Tensor | None] = (None, None)
                if other in own:
                    likes = _tables(own[other].model)
                for new, like in zip(_tables(grown.model), likes, strict=True):
                    new[config.shifts[other] :][:n] = _rows(new[: base.vocabulary], n, like)
        _same(base, grown)
        grown.check()
        return cls(grown, config)

    def forward(
        self, strands: Mapping[str, Strand], outputs: Sequence[str] | None = None
    ) -> dict[str, Float[Tensor, "batch length vocabulary"]]:
        """Logits of every modality in `outputs` (default: all that take part), over its own ids."""
        return {name: self.unembed(name, h) for name, h in self.hidden(strands, outputs).items()}

    def hidden(
        self, strands: Mapping[str, Strand], outputs: Sequence[str] | None = None
    ) -> dict[str, Float[Tensor, "batch length width"]]:
        """States after the last block, before the head, each modality's in the layout of its
        strand. What stands in padding means nothing."""
        wanted = tuple(strands) if outputs is None else tuple(outputs)
        for name in (*strands, *wanted):
            self._shift(name)
        if absent := sorted({*wanted} - {*strands}):
            raise ZipperError(
                f"The outputs {absent} read nothing here; the input has tokens for "
                f"{sorted(strands)} only."
            )
        return self._advance(strands, wanted, None)

    def start(self, towers: Sequence[str], outputs: Sequence[str]) -> Stream:
        """An empty state for a plan that reads and writes `towers`; only `outputs` will be asked
        for logits."""
        for name in (*towers, *outputs):
            self._shift(name)
        return Stream(tuple(towers), tuple(outputs), Past())

    def step(
        self, strands: Mapping[str, Strand], state: Stream
    ) -> tuple[dict[str, Float[Tensor, "batch length width"]], Stream]:
        """Read more tokens, from any device, all later than those read before: states of each
        modality in the plan's outputs, and the state, whose cache is extended in place."""
        if foreign := sorted(strands.keys() - {*state.towers}):
            raise ZipperError(
                f"{foreign} are not in this plan; start one that names them, beside "
                f"{list(state.towers)}."
            )
        device = next(self.parameters()).device
        moved = {name: strand.to(device) for name, strand in strands.items()}
        return self._advance(moved, state.outputs, state.past), state

    def unembed(
        self, tower: str, hidden: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch length vocabulary"]:
        """Logits of one modality's own ids: what comes next, given that it is of this modality."""
        start = self._shift(tower)
        return self._decoder.unembed(hidden)[
            ..., start : start + self.config.towers[tower].vocabulary
        ]

    def nll(
        self,
        tower: str,
        hidden: Float[Tensor, "batch length width"],
        targets: Int[Tensor, "batch length"],
    ) -> Float[Tensor, "batch length"]:
        """-log p(target) in nats by the one softmax over all ids of all modalities; targets are the
        modality's own ids."""
        decoder, wanted = self._decoder, targets + self._shift(tower)
        flat = loss.nll(
            lambda h: decoder.unembed(h[None])[0],
            hidden.flatten(0, 1),
            wanted.flatten(),
            decoder.vocabulary,
        )
        return flat.view_as(targets)

    def ends(self) -> dict[str, Ends]:
        """Begin and end ids of every modality, among its own ids."""
        return {name: Ends(tower.begin, tower.end) for name, tower in self.config.towers.items()}

    def limit(self, tower: str, given: Mapping[str, int], wanted: int | None = None) -> int:
        """The cap on a produced segment, from the tokens of each modality so far; `wanted` where
        there is room for so many. Raises ZipperError where there is none at all: all modalities
        share the decoder's positions.
        """
        room = _positions(self._decoder) - sum(given.values()) - 2
        if room < 1:
            raise ZipperError(
                f"{sum(given.values())} of {_positions(self._decoder)} tokens are read: no room "
                "for another segment."
            )
        if wanted is not None:
            return min(wanted, room)
        usual = {
            name: (count, self.config.towers[name].tokens)
            for name, count in given.items()
            if name != tower
        }
        return default_limit(self.config.towers[tower].tokens, usual, room)

    def check(self, segments: Sequence[Segment]) -> None:
        """Raises ZipperError for a sample this model cannot read: unknown modality, contents that
        `read_ids` refuses, more than its positions."""
        for segment in segments:
            self._shift(segment.tower)
            tower = self.config.towers[segment.tower]
            read_ids(segment.content, segment.tower, Ends(tower.begin, tower.end), tower.vocabulary)

        read = sum(len(segment.content) + 2 for segment in segments)
        room = _positions(self._decoder)
        if read > room:
            raise ZipperError(
                f"The decoder would read {read} tokens, begin and end of segments included, but "
                f"it can read at most {room}. Give it shorter pieces, or build it with more "
                "positions=..."
            )

    def pads(self, tower: str) -> bool:
        """Whether rows may have padding on their left."""
        return self._decoder.rows != "unpadded"

    def choices(self, among: Sequence[str]) -> tuple[str, ...]:
        """Raises a ZipperError: what comes next is not learnt here."""
        raise ZipperError(
            "A single decoder was not taught which modality comes next. Name the outputs."
        )

    def choice(self, tower: str, state: Tensor) -> Tensor:
        """Raises a ZipperError, as `choices`."""
        self.choices(())
        return state

    def tower(self, name: str) -> PreTrainedModel:
        """The extended decoder as the transformers model it is, the same for every modality."""
        self._shift(name)
        return self._decoder.model

    def generate(
        self,
        segments: Sequence[Segment],
        outputs: Sequence[str | Segment],
        sampling: Sampling | None = None,
        limits: Limits | None = None,
    ) -> list[Produced]:
        """Read `segments`, then produce one segment per name in `outputs`, in that order; see
        `Zipper.generate`."""
        return generate(self, [segments], outputs, sampling or Sampling(), limits)[0]

    def save_pretrained(
        self,
        folder: str | Path,
        include: Sequence[str] = (),
        record: Mapping[str, Any] | None = None,
    ) -> None:
        """Save the whole model in a folder, which appears whole or not at all. record: anything
        JSON to keep beside it."""
        with checkpoint.whole(Path(folder), self.prove) as temporary:
            self.write(temporary, include, record)

    def prove(self, folder: Path) -> None:
        """Raises the ZipperError in which loading what `write` wrote would end; takes no memory for
        tensors."""
        BaselineConfig.from_dict(checkpoint.examine(folder)[0])

    def inside(self, folder: Path) -> list[str]:
        """Frozen towers that lie in a folder: there are none."""
        return []

    def write(
        self, folder: Path, include: Collection[str] = (), record: Mapping[str, Any] | None = None
    ) -> None:
        """The files of `save_pretrained`, written into an existing folder. include: as for a zip;
        here all is inside anyway."""
        for name in include:
            self._shift(name)
        base = self.config.base
        decoder = dataclasses.replace(
            self.config.towers[base],
            source=f"towers/{base}",
            dtype=_dtype(self._decoder),
            digest=self._decoder.pin(),
        )
        towers = {**self.config.towers, base: decoder}
        self._decoder.save(folder / "towers" / base)
        checkpoint.save(
            folder,
            dataclasses.replace(self.config, towers=towers).to_dict(),
            {},
            dict(record or {}),
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None) -> "Baseline":
        """Load what `save_pretrained` wrote. dtype: default as saved. Raises ZipperError for a
        damaged or foreign folder."""
        local = hub.fetch(folder)
        folder = local.folder
        config = BaselineConfig.from_dict(checkpoint.load(folder, local.root)[0])
        model = cls(Tower.load(folder / "towers" / config.base), config)
        if dtype is not None:
            model.cast(dtype)
        return model

    def cast(self, dtype: torch.dtype) -> None:
        """Turn all parameters into `dtype`, in place; not the buffers."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)

    def new_parameters(self) -> dict[str, Tensor]:
        """The rows of the ids that were added, in the embedding and in an untied head; not the
        neurons of a wider feed-forward."""
        own = self.config.towers[self.config.base].vocabulary
        head, embedding = (table[own:] for table in _tables(self._decoder.model))
        tied = head.data_ptr() == embedding.data_ptr()
        return {"embedding": embedding} | ({} if tied else {"head": head})

    @property
    def _decoder(self) -> Tower:
        tower = self.towers[self.config.base]
        assert isinstance(tower, Tower)
        return tower

    def _shift(self, name: str) -> int:
        if name not in self.config.towers:
            raise ZipperError(
                f"This model has no tower {name!r}; it has {sorted(self.config.towers)}."
            )
        return self.config.shifts[name]

    def _advance(
        self, strands: Mapping[str, Strand], outputs: Sequence[str], past: Past | None
    ) -> dict[str, Tensor]:
        """Merge the strands into one stream by time, run it, hand the states back.

        A token's position in the stream is its time. Documents of a packed row mix; the mask keeps
        them apart. Columns that are padding in all rows are left out; the rest of the padding is on
        the left while decoding, where the cache is cheapest, else on the right, where no row of a
        causal mask is empty.
        """
        ids = torch.cat([strand.ids + self._shift(name) for name, strand in strands.items()], 1)
        document = torch.cat([strand.document for strand in strands.values()], 1)
        valid = document >= 0
        time = torch.where(valid, torch.cat([strand.time for strand in strands.values()], 1), 0)

        padded = -1 if past is not None else int(time.max()) + 1
        order = torch.where(valid, time, padded).argsort(dim=1, stable=True)
        width = int(valid.sum(1).max())
        first = ids.shape[1] - width if past is not None else 0
        kept = order[:, first : first + width]
        time = time.gather(1, kept)
        stream = Strand(ids.gather(1, kept), time, time, document.gather(1, kept))

        h = self._decoder.embed(stream, past)
        h = self._decoder.run(h, range(self._decoder.layers), self._decoder.start(stream, h, past))

        place = (order.argsort(dim=1) - first).clamp(0, width - 1)
        parts = place.split([strand.ids.shape[1] for strand in strands.values()], dim=1)
        return {
            name: h.take_along_dim(part[..., None], 1)
            for name, part in zip(strands, parts, strict=True)
            if name in outputs
        }


@final
@dataclass(frozen=True)
class Extend:
    """Builds a baseline instead of a zip (`zipper.training.train(config, build=Extend("text"))`);
    all of it learns.

    base: the tower that is extended. rows: towers whose embeddings the new rows start from.
    parameters, positions: see `Baseline.from_tower`.
    """

    base: str
    rows: tuple[str, ...] = ()
    parameters: int | None = None
    positions: int = 0

    @property
    def course(self) -> Mapping[str, Any]:
        """What it adds to a recipe."""
        said: dict[str, Any] = {"base": self.base}
        if self.rows:
            said["rows"] = list(self.rows)
        if self.parameters is not None:
            said["parameters"] = self.parameters
        if self.positions:
            said["positions"] = self.positions
        return {"baseline": said}

    def __call__(
        self, config: TrainConfig, modalities: Mapping[str, Modality], rows: Sequence[Row]
    ) -> Baseline:
        """See `zipper.training.building.Build`. Raises a ZipperError for a recipe that is one of a
        zip."""
        named = (self.base, *self.rows)
        if unknown := sorted({*named} - {*config.towers}):
            raise ZipperError(
                f"The baseline names {unknown}; this recipe has the towers {sorted(config.towers)}."
            )
        if any(isinstance(config.towers[name], Mapping) for name in named):
            raise ZipperError("A baseline starts from pre-trained towers: give folders or hub ids.")
        if config.freeze or config.calibrate or config.lora or config.frozen_dtype:
            raise ZipperError(
                "A baseline has no links and no frozen tower: leave out freeze, calibrate, lora "
                "and frozen_dtype."
            )
        for name in named:
            check_pinned(name, config.towers[name], modalities[name])

        if config.start:
            return _continued(config.start, modalities, self.base)
        added = {name: modality.vocabulary for name, modality in modalities.items()}
        del added[self.base]
        return Baseline.from_tower(
            {self.base: Tower.load(config.towers[self.base], dtype=torch.float32)},
            added=added,
            ends={name: (modality.begin, modality.end) for name, modality in modalities.items()},
            tokens=mean_tokens(config, rows),
            rows={name: config.towers[name] for name in self.rows},
            parameters=self.parameters,
            positions=self.positions,
            seed=config.seed,
        )


def _continued(start: str, modalities: Mapping[str, Modality], base: str) -> Baseline:
    """A saved baseline to go on from. Raises a ZipperError where it is one of others."""
    model = Baseline.from_pretrained(start, torch.float32)
    sizes = {name: tower.vocabulary for name, tower in model.config.towers.items()}
    wanted = {name: modality.vocabulary for name, modality in modalities.items()}
    own = sizes.pop(model.config.base)
    if own < wanted.pop(base) or sizes != wanted:
        raise ZipperError(
            f"start={start!r} extends {model.config.base!r} by {sizes}, this recipe {base!r} by "
            f"{wanted}."
        )
    for name, modality in modalities.items():
        check_pinned(name, Path(start) / "towers" / name, modality)
    return model


def _check_names(option: str, given: Collection[str], possible: Collection[str]) -> None:
    if unknown := sorted({*given} - {*possible}):
        raise ZipperError(f"{option} names {unknown}; it can name {sorted(possible)} here.")


def _check_ends(ends: Mapping[str, tuple[Any, Any]], sizes: Mapping[str, int]) -> None:
    """Every modality has a begin and an end among its own ids."""
    if unended := [name for name in sizes if None in ends.get(name, (None,))]:
        raise ZipperError(
            f"No begin and end token is known for {unended}. Pass "
            f"ends={{{unended[0]!r}: (begin, end)}}."
        )
    for name, pair in ends.items():
        if outside := [token for token in pair if not 0 <= token < sizes[name]]:
            raise ZipperError(
                f"The token {outside[0]} that begins or ends {name!r} is outside its "
                f"{sizes[name]} ids."
            )


def _check_sizes(rows: Mapping[str, Tower], sizes: Mapping[str, int]) -> None:
    for name, start in rows.items():
        if start.vocabulary != sizes[name]:
            raise ZipperError(
                f"The tower that the rows of {name!r} start from has {start.vocabulary} ids, "
                f"not {sizes[name]}."
            )


def _load(source: TowerSource) -> Tower:
    return source if isinstance(source, Tower) else Tower.load(source)


def _dtype(tower: Tower) -> str:
    return str(tower.model.dtype).removeprefix("torch.")


def _positions(tower: Tower) -> int:
    """Positions a tower was made for; models without a limit say so by a large number."""
    return int(getattr(tower.config, "max_position_embeddings", None) or 1 << 30)


def _tables(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Head and embedding, one and the same parameter where they are tied."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    return head.weight, embedding.weight


def _rows(
    old: Float[Tensor, "vocabulary width"], n: int, like: Float[Tensor, "n other"] | None
) -> Float[Tensor, "n width"]:
    """Rows for new ids, see `Baseline.from_tower`."""
    mean, width = old.float().mean(0), old.shape[1]
    if like is None:
        return (mean + old.float().std(0) * torch.randn(n, width, device=old.device)).to(old.dtype)
    u, s, _ = torch.linalg.svd(like.float() - like.float().mean(0), full_matrices=False)
    parts = (u * s)[:, :width]  # the largest first
    turn = torch.linalg.qr(torch.randn(width, parts.shape[1])).Q.T
    new = parts @ turn.to(parts.device)
    spread = (old.float() - mean).square().mean().sqrt() / new.square().mean().sqrt()
    return (mean + spread * new.to(old.device)).to(old.dtype)


def _grown(base: Tower, vocabulary: int, positions: int, parameters: int | None) -> Tower:
    """A larger model of the same kind, what the old one was in a corner of it: new rows of tables
    as transformers draws them, new neurons of a feed-forward drawn but not read yet."""
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    config = copy.deepcopy(base.model.config)
    text = config.get_text_config()
    text.vocab_size = vocabulary
    if positions > _positions(base):
        text.max_position_embeddings = positions
    if parameters is not None:
        _widen(config, parameters)

    attention = base.model.config._attn_implementation
    model = AutoModelForCausalLM.from_config(
        config, dtype=base.model.dtype, attn_implementation=attention
    ).to(base.model.device)
    old = dict(base.model.named_parameters(remove_duplicate=False))
    for owner, module in model.named_modules():
        reads = None  # the side of a matrix that it reads
        if isinstance(module, nn.Linear):
            reads = 1
        elif isinstance(module, Conv1D):
            reads = 0
        for name, new in module.named_parameters(owner, recurse=False):
            if reads is not None and new.ndim == 2 and new.shape[reads] > old[name].shape[reads]:
                new.zero_()
            new[tuple(slice(n) for n in old[name].shape)] = old[name]
    return Tower(model.eval())


def _widen(config: Any, parameters: int) -> None:
    """Set the width of the feed-forwards so that the model has so many parameters; their number is
    linear in it."""
    from transformers import AutoModelForCausalLM

    text = config.get_text_config()
    name = next((name for name in FEEDFORWARD_WIDTHS if name in text.to_dict()), None)
    if name is None:
        raise ZipperError(
            f"The configuration of {type(config).__name__} names no width of its feed-forwards: "
            "cannot widen them."
        )

    def count(width: int | None) -> int:
        setattr(text, name, width)
        with torch.device("meta"):
            return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())

    now, narrow = count(getattr(text, name)), count(8)
    neuron = (count(16) - narrow) / 8
    if parameters < now:
        raise ZipperError(
            f"parameters={parameters}, but the extended tower has {now} already. Ask for more, or "
            "for None."
        )
    setattr(text, name, 8 + round((parameters - narrow) / neuron))


def _same(base: Tower, grown: Tower) -> None:
    """Raises ZipperError unless the grown tower says of the old ids what the bare one says, up to
    rounding."""
    chance = torch.Generator().manual_seed(0)
    ids = torch.randint(base.vocabulary, (2, 8), generator=chance)
    strand = Strand.alone(ids.to(base.model.device))
    with torch.no_grad():
        wanted, found = (tower(strand)[..., : base.vocabulary].float() for tower in (base, grown))
    gap = float((found - wanted).abs().max() / wanted.abs().max())
    if not gap <= TOLERANCE:
        raise ZipperError(
            f"{base.name} cannot be extended: its logits of its own ids change by {gap:.1e}. "
            "Leave out parameters=..., or use another model."
        )
