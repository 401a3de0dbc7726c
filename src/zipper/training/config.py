"""What decides a run, checked before anything is built."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

from zipper.config import Adapter
from zipper.data.extraction import Policy
from zipper.errors import ZipperError
from zipper.junctions import Directed
from zipper.link import InputKind, LinkConfig
from zipper.loss import CHOICE
from zipper.saving.files import MOST_INTEGER, parse, settle
from zipper.tasks import Task, tower_of

#: What a recipe may ask for: (least, most) by field.
LIMITS = {
    **dict.fromkeys(
        ("steps", "rows", "eval_every", "save_every", "log_every", "keep", "eval_rows"),
        (1, MOST_INTEGER),
    ),
    **dict.fromkeys(("warmup", "patience", "calibrate", "seed", "least_ids"), (0, MOST_INTEGER)),
    **dict.fromkeys(("batch", "accumulate"), (1, 1 << 20)),
    "workers": (0, 1024),
    **dict.fromkeys(("lr_new", "lr_gate", "lr_tower", "weight_decay"), (0.0, 1e3)),
    **dict.fromkeys(("lr_final", "corrupt", "most_bad"), (0.0, 1.0)),
    "most_ids": (1, MOST_INTEGER),
    "clip": (1e-12, 1e12),
    "betas": (0.0, 1 - 1e-9),
    "loss_weight": (0.0, 1e6),
}


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run; saved as config.json beside its results.

    The run.
    output: its folder. seed: of all that is drawn. steps, batch: optimizer steps and samples in
        each, over all processes and micro-batches.

    Data.
    towers: name -> folder or hub id of a pre-trained tower, or the configuration of a fresh one
        ({"model_type": "llama", "hidden_size": 128, ...}). modalities: name -> folder.
    data, dev: sources (`zipper.data.layouts`: a JSONL manifest, a folder of unit files,
        "librispeech:FOLDER" ...); data may be {source: weight}, a mixture.
    rows: use only the first so many of each source of `data`.
    bad, most_bad: what becomes of samples that cannot be read (`Policy`).
    least_ids, most_ids: rows with fewer or more ids, over all fields, are left out.
    tasks: {"speech -> text": share of samples}, see `Task`. "text -> voice~speech": speech behind
        the voice that its row names. A source may lack the fields of some tasks (text without
        speech, say): its rows are for the others, by their shares.
    pack: {tower: most tokens in a row}: samples of a task share rows; the loss stays the same.
    corrupt: per tower, the chance that a token of a segment with loss is read as a random one while
        the targets stay: against overfitting and exposure bias.
    loss_weight: per tower.

    Model.
    train: towers that learn; with one tower it always does. With `start`, none means those that
        learned there.
    freeze: towers that learned in `start` and stay as they are now.
    every, junctions, links, link, input_projection, lora: see `Zipper.from_towers`. Dropout of
        links stands in `link`.
    shows: where others read a tower, see `Zipper.from_towers`. "kind": as each modality's kind says
        (text shows its embeddings); None: where it is fused, as in the paper.
    start: a saved zip of these towers to go on from; the shape is then its own, but for adapters
        (`lora`) on towers that have none.
    calibrate: rows of each source, at most 1,000, on which links are calibrated before the first
        step (`Link.calibrate`, 0 = not).

    Rates.
    lr_new, lr_gate, lr_tower: peak learning rates of new parts, of gates and of trained towers;
        linear warm-up over `warmup` steps, then a cosine down to lr_final of the peak.
    clip: of the gradient's norm. betas, weight_decay: of AdamW.

    Compute.
    accumulate: micro-batches into which a process cuts its part of a step; the gradient stays that
        of the whole batch, up to rounding.
    mixed_precision: "bf16" computes in it. frozen_dtype: "bfloat16" keeps frozen weights, and the
        states between the blocks of such a tower, in half the bytes and to 8 bits of precision. Dev
        losses are then those of a slightly other tower (the shipped zip's: 0.0963 -> 0.0962 and
        0.1825 -> 0.1826 nats); what is saved names the tower as it was given.
    shard: where several processes run, each keeps a piece of every parameter (FSDP2) instead of all
        of them (DDP); where a task has no sample for a process, that one runs a sample of another
        for nothing.
    recompute: blocks are run again in the backward pass instead of keeping what they computed: less
        memory, more time, the same bits.
    compile: the blocks by torch.compile, each for itself; a slow start, other rounding.
    together: samples of all tasks in one batch: more of it is padding, and half as many kernels
        run; for models so small that a GPU waits for the next one.
    workers: processes that make batches ahead of time; the same ones.
    attention: of links, "sdpa" or "flex", which is for packed rows on CUDA.

    Saving.
    eval_every, eval_rows, patience: dev loss on so many rows every so many steps; stop after that
        many evaluations without a new best (0 = never). The best model by mean dev loss is what the
        run returns.
    save_every, keep: steps between checkpoints and how many are kept.
    save_dtype: "float16" or "bfloat16" halves the returned model on disk; training itself is in
        float32 (and `mixed_precision`).
    log_every, trackers: steps between rows of metrics, and who else is told.
    """

    output: str
    towers: Mapping[str, Any]
    modalities: Mapping[str, str]
    data: str | Mapping[str, float]
    dev: str
    tasks: Mapping[str, float]
    steps: int
    rows: int | None = None
    bad: str = "error"
    most_bad: float = 0.01
    least_ids: int = 0
    most_ids: int | None = None
    batch: int = 32
    accumulate: int = 1
    train: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()
    every: Mapping[str, int] | None = None
    junctions: Sequence[Mapping[str, int]] | None = None
    shows: Literal["kind"] | Mapping[str, Any] | None = "kind"
    links: Sequence[Directed] | None = None
    link: LinkConfig = field(default_factory=LinkConfig)
    start: str | None = None
    calibrate: int = 0
    input_projection: InputKind | Mapping[str, InputKind] = "residual"
    lora: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    lr_new: float = 3e-3
    lr_gate: float = 3e-3
    lr_tower: float = 1e-3
    lr_final: float = 0.02
    warmup: int = 40
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.99)  # the paper's, A.3
    weight_decay: float = 0.01
    loss_weight: Mapping[str, float] = field(default_factory=dict)
    corrupt: Mapping[str, float] = field(default_factory=dict)
    pack: Mapping[str, int] = field(default_factory=dict)
    mixed_precision: str = "no"
    frozen_dtype: str | None = None
    shard: bool = False
    recompute: bool = False
    compile: bool = False
    together: bool = False
    workers: int = 0
    attention: str = "sdpa"
    eval_every: int = 200
    eval_rows: int = 128
    patience: int = 0
    save_every: int = 500
    keep: int = 2
    log_every: int = 20
    save_dtype: str | None = None
    trackers: tuple[str, ...] = ("tensorboard",)
    seed: int = 0

    def __post_init__(self) -> None:
        settle(self, LIMITS)
        if not self.tasks or min(self.tasks.values()) < 0 or sum(self.tasks.values()) <= 0:
            raise ZipperError(
                f"tasks is {dict(self.tasks)}; it needs at least one task with a positive share."
            )
        Policy(self.bad, self.most_bad)
        if not isinstance(self.data, str) and (
            not self.data or min(self.data.values()) < 0 or sum(self.data.values()) <= 0
        ):
            raise ZipperError(
                f"data is {dict(self.data)}; it needs at least one source with a positive weight."
            )
        if self.most_ids is not None and self.least_ids > self.most_ids:
            raise ZipperError(
                f"least_ids is {self.least_ids}, most_ids {self.most_ids}: no row has so many and "
                "so few."
            )
        known = {
            "mixed_precision": ("no", "bf16"),
            "save_dtype": (None, "float32", "float16", "bfloat16"),
            "frozen_dtype": (None, "bfloat16"),
            "attention": ("sdpa", "flex"),
        }
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ZipperError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {choices}."
                )
        if set(self.modalities) != set(self.towers):
            raise ZipperError(
                f"The towers are {sorted(self.towers)}, the modalities {sorted(self.modalities)}. "
                "Give one for each."
            )
        for name in ("train", "freeze", "lora", "loss_weight", "corrupt", "pack"):
            if unknown := sorted({*getattr(self, name)} - {*self.towers}):
                raise ZipperError(
                    f"{name} names {unknown}; this recipe has the towers {sorted(self.towers)}."
                )
        for name, source in self.towers.items():
            if isinstance(source, Mapping) and len(self.towers) > 1 and name not in self.train:
                raise ZipperError(
                    f"The tower {name!r} is a fresh one that would never learn. Name it in train, "
                    "or give a folder."
                )
        if self.pack and min(self.pack.values()) < 1:
            raise ZipperError(f"pack is {dict(self.pack)}; a row needs room for at least 1 token.")
        for task in self.tasks:
            for tower in Task.parse(task).towers:
                if tower not in self.towers:
                    raise ZipperError(
                        f"The task {task!r} names the tower {tower!r}; this recipe has "
                        f"{sorted(self.towers)}."
                    )
        for name, adapter in self.lora.items():
            parse(Adapter, adapter, f"lora[{name!r}]")
        self._check_use()

    def _check_use(self) -> None:
        """Raises a ZipperError for a setting that would do nothing."""
        tasks = [Task.parse(task) for task, share in self.tasks.items() if share]
        named = set(chain.from_iterable(task.towers for task in tasks))
        lanes = [*chain.from_iterable(task.segments_produced for task in tasks)]
        items = chain.from_iterable(lane.among or (lane.item,) for lane in lanes)
        produced = {*map(tower_of, items)} | (
            {CHOICE} if any(lane.among for lane in lanes) else set()
        )
        for option, used, what in (
            ("train", named, "named by"),
            ("lora", named, "named by"),
            ("pack", named, "named by"),
            ("corrupt", produced, "produced in"),
            ("loss_weight", produced, "produced in"),
        ):
            if idle := sorted({*getattr(self, option)} - used):
                raise ZipperError(
                    f"{option} names {idle[0]!r}, which is {what} no task: it would do nothing. "
                    "Leave it out."
                )
        if not any(self.loss_weight.get(tower, 1.0) for tower in produced):
            raise ZipperError(
                f"loss_weight is {dict(self.loss_weight)}: nothing that is produced has a loss. "
                "Raise one."
            )
        learns = {*self.train, *self.lora}
        for task in tasks if len(self.towers) > 1 and not self.start else ():
            if len(task.towers) == 1 and not learns & {*task.towers}:
                raise frozen_alone(task)
        for option in ("every", "junctions", "shows", "links", "calibrate"):
            if len(self.towers) == 1 and (said := getattr(self, option)) and said != "kind":
                raise ZipperError(f"{option} is {said}, but one tower has no links: leave it out.")
        if self.freeze and not self.start:
            raise ZipperError(
                f"freeze names {sorted(self.freeze)}: it is for towers that learned in `start`, "
                "and there is none. A tower that is not in train is frozen."
            )
        if self.calibrate and not self.start and not self.link.projection_depth:
            raise ZipperError(
                "A link without a projection cannot be calibrated: set link.projection_depth to 1 "
                "or more."
            )
        if self.frozen_dtype and (len(self.towers) == 1 or {*self.towers} <= {*self.train}):
            raise ZipperError(
                "frozen_dtype is for frozen towers, and here every tower learns: it would do "
                "nothing. Leave it out."
            )


#: Fields that name files: a run is made of what lies there, wherever that is.
PATHS = ("towers", "modalities", "start", "data", "dev")
#: Fields that say where a run lies and how it is computed, not what: a resumed run may change them.
FREE = (
    "freeze",  # which parameters learn is compared itself
    "output",
    "log_every",
    "save_every",
    "keep",
    "save_dtype",
    "trackers",
    "accumulate",
    "shard",
    "recompute",
    "compile",
    "together",
    "workers",
    "attention",
)


def frozen_alone(task: Task) -> ZipperError:
    """What to say of a task of one tower that does not learn."""
    return ZipperError(
        f"The task {str(task)!r} is for {task.towers[0]!r} alone, which is frozen: nothing would "
        "learn by it. Leave it out, or name the tower in train."
    )
