"""`zipper bench train`: training steps of zips, of the decoder with an extended vocabulary and of
the bare tower, side by side.

Random weights from configurations: speed does not depend on them. What zips are compared with runs
in stock transformers, as anyone would train it. The task is recognition: speech is given, text
carries the loss.
"""

import json
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from zipper.errors import ZipperError
from zipper.link import LinkConfig
from zipper.model import Zipper
from zipper.strand import Batch, Segment, Target, collate
from zipper.tower import Tower
from zipper.training import Objective
from zipper.training import cost as plan
from zipper.training.packing import lengths, pack
from zipper_lab.bench import (
    QWEN,
    SPEECH,
    Here,
    Turn,
    head,
    limits,
    llama,
    losses,
    machine,
    ratio,
    resident,
    serve,
    stopwatch,
    take_turns,
    take_turns_here,
)

Pair = dict[str, int]  # {tower: tokens, begin and end included}

#: Each arm, and what it is.
ARMS = {
    "bare": "the text tower's own step in stock transformers, on rows as long as a pair",
    "frozen": "zip, both towers frozen",
    "trained": "zip, both towers trained",
    "expanded": "the text tower with the units in its vocabulary, all trained, in stock "
    "transformers",
    "padded": "frozen zip, lengths of the mix, a sample a row",
    "packed": "frozen zip, lengths of the mix, packed rows",
    "flex": "the same, links by FlexAttention",
}
#: Arms that exist on CUDA only: on a CPU FlexAttention has no backward.
ONLY = {"flex": "cuda"}
#: (what is compared, arm, arm below it, the target of the project)
RATIOS = (
    ("pairs/s", "frozen", "trained", 1.8),
    ("pairs/s", "frozen", "expanded", 4.0),
    ("pairs/s", "packed", "padded", 1.5),
    ("pairs/s", "flex", "packed", 1.0),
    ("FLOP/s", "frozen", "bare", 0.85),
    ("FLOP/s", "trained", "bare", 0.85),
)
EQUAL = {"speech": 350, "text": 50}  # seven seconds of speech; no arm pads
LONGEST = 1002  # tokens of speech in `mix`: 20 seconds


#: Name -> towers and the blocks between their junctions.
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {
        "text": llama(64, 4, 2, 96, 96),
        "speech": llama(32, 3, 2, 64, 40),
        "every": {"text": 1, "speech": 1},
    },
    "30m": {
        "text": llama(384, 10, 6, 1024, 32_000),
        "speech": llama(320, 8, 5, 864, 1028),
        "every": {"text": 3, "speech": 2},
    },
    "0.5b": {
        "text": llama(896, 24, 14, 4864, 151_936, **QWEN),
        "speech": SPEECH,
        "every": {"text": 6, "speech": 4},
    },
    "1.5b": {
        "text": llama(1536, 28, 12, 8960, 151_936, **QWEN),
        "speech": SPEECH,
        "every": {"text": 7, "speech": 4},
    },
}


@dataclass(frozen=True)
class Settings:
    """What an arm is told. pairs: in a step. room: tokens of speech in a packed row. precision:
    "float32", or "bf16": autocast, and frozen towers in bfloat16. attention: of the links, see
    `Zipper`. threads: 0 = as many as torch takes.
    """

    arm: str
    size: str = "30m"
    pairs: int = 16
    room: int = 1024
    device: str = "cpu"
    precision: str = "float32"
    attention: str = "sdpa"
    threads: int = 0


def mix(pairs: int, seed: int) -> list[Pair]:
    """Utterances at 50 units and about 3.3 tokens of text a second. Half are like LibriSpeech's
    training parts: most between 11 and 17 seconds, the others anywhere below. Half are like
    LibriTTS: log-normal around 4.4 seconds, a mean of 5.8, at most 20.
    """
    dice, made = random.Random(seed), []
    for number in range(pairs):
        if number % 2:
            seconds = min(20.0, max(0.8, dice.lognormvariate(1.48, 0.75)))
        elif dice.random() < 0.7:
            seconds = dice.triangular(10, 16.7, 15)
        else:
            seconds = dice.uniform(1.5, 11)
        words = max(2, round(3.3 * seconds * dice.gauss(1, 0.12)))
        made.append({"speech": round(50 * seconds) + 2, "text": words + 2})
    return made


def bench(
    size: str,
    rounds: int,
    warm: int = 2,
    arms: Sequence[str] = (),
    pairs: int = 16,
    room: int = 1024,
    device: str = "cpu",
    precision: str = "float32",
    attention: str = "sdpa",
    threads: int = 0,
    hardware: str = "",
    here: Here | None = None,
) -> dict[str, Any]:
    """Measure; the result is plain data for JSON, `markdown` shows it. arms: default all that the
    device has. here: in this process, where an arm may be lost; default for CUDA, one arm after the
    other. Raises ZipperError for unknown names.
    """
    known = [arm for arm in ARMS if device.startswith(ONLY.get(arm, ""))]
    arms = arms or known
    if unknown := sorted({*arms} - {*known}):
        raise ZipperError(f"There are no arms {unknown} on {device}; there are {', '.join(known)}.")
    if size not in SIZES:
        raise ZipperError(f"There is no size {size!r}; there are {', '.join(SIZES)}.")
    if room < LONGEST:
        raise ZipperError(
            f"The mix has up to {LONGEST} tokens of speech, a packed row has room for {room}. "
            f"Give --room {LONGEST}."
        )

    shared = Settings("", size, pairs, room, device, precision, attention, threads)
    settings = {arm: replace(shared, arm=arm) for arm in arms}
    said = {name: value for name, value in asdict(shared).items() if name != "arm"}
    about = {**machine(hardware), "settings": said}
    if here is None and not device.startswith("cpu"):
        here = Here(apart=True)
    if here is None:
        plain = {arm: asdict(one) for arm, one in settings.items()}
        return about | _found(take_turns("zipper_lab.bench.train", plain, rounds, warm), {})

    told, about["limits"] = here.told, limits(device)

    def tell(turns: Mapping[str, Sequence[Turn]], lost: Mapping[str, str]) -> None:
        told(about | _found(turns, lost))

    return about | _found(*take_turns_here(_turns, settings, rounds, warm, here, tell))


def _found(turns: Mapping[str, Sequence[Turn]], lost: Mapping[str, str]) -> dict[str, Any]:
    """What the turns say. lost: why arms took none."""
    ratios = []
    for what, above, below, target in RATIOS:
        if above in turns and below in turns:
            unit = "pairs" if what == "pairs/s" else "flops"
            rates = [
                [turn[unit] / turn["seconds"] for turn in turns[arm]] for arm in (above, below)
            ]
            row = {"what": what, "above": above, "below": below, "target": target}
            ratios.append(row | ratio(*rates)._asdict())
    return {
        "rounds": min(map(len, turns.values()), default=0),
        "arms": {arm: _summary(said) for arm, said in turns.items()},
        "ratios": ratios,
        "lost": dict(lost),
    }


def _summary(turns: Sequence[Turn]) -> dict[str, Any]:
    seconds = [turn["seconds"] for turn in turns]
    return {
        "pairs_per_s": statistics.median(turn["pairs"] / turn["seconds"] for turn in turns),
        "gflop_per_pair": statistics.mean(turn["flops"] / turn["pairs"] for turn in turns) / 1e9,
        "gflop_per_s": statistics.median(turn["flops"] / turn["seconds"] for turn in turns) / 1e9,
        "padding": statistics.mean(turn["padding"] for turn in turns),
        "peak_memory": max(turn["peak_memory"] for turn in turns),
        "trained_parameters": turns[0]["trained_parameters"],
        "seconds": seconds,
    }


def markdown(found: Mapping[str, Any]) -> str:
    """The results, for people."""
    most = {name: rate for name, rate in found.get("limits", {}).items() if rate and name != "copy"}
    shares = "".join(f" of the {name} |" for name in most)
    lines = [
        *head("Training steps", "zipper bench train", found),
        f"| arm | pairs/s | GFLOP a pair | GFLOP/s |{shares} padding | trains | peak memory, MB |",
        "|---" * (7 + len(most)) + "|",
    ]
    for name, arm in found["arms"].items():
        shares = "".join(f"{1e11 * arm['gflop_per_s'] / rate:.1f} % | " for rate in most.values())
        lines.append(
            f"| {name}: {ARMS[name]} | {arm['pairs_per_s']:.2f} | {arm['gflop_per_pair']:.2f} | "
            f"{arm['gflop_per_s']:,.1f} | {shares}{100 * arm['padding']:.1f} % | "
            f"{arm['trained_parameters'] / 1e6:.1f}M | {arm['peak_memory'] / 1e6:,.0f} |"
        )

    lines += ["", "| ratio | median of the rounds | 95 % interval | target |", "|---|---|---|---|"]
    for row in found["ratios"]:
        verdict = "held" if row["median"] >= row["target"] else "missed"
        lines.append(
            f"| {row['what']}: {row['above']} / {row['below']} | {row['median']:.2f} | "
            f"{row['low']:.2f} to {row['high']:.2f} | {row['target']} ({verdict}) |"
        )

    lines += [
        "",
        "GFLOP by formula, of what cannot be left out: tokens without padding, frozen parts as "
        "far as a gradient goes",
        "through them. Memory is what a process has over its imports (on CUDA, what torch "
        "allocated). Pairs of the first",
        f"arms: {EQUAL['speech']} tokens of speech, {EQUAL['text']} of text; of the mix: "
        "`zipper_lab.bench.train.mix`.",
    ]
    if most:
        lines += [
            "",
            "Peak: operations in bfloat16 by the name of the card, which says nothing of its "
            "clocks; matmul: as measured here",
            f"({found['limits']['matmul'] / 1e12:.0f} TFLOP/s). The arms one after the other, "
            "data made before a step begins.",
        ]
    return "\n".join([*lines, *losses(found)]) + "\n"


class Given(NamedTuple):
    """What a step is made on: the pairs in it, the share of its slots that is padding, ids or a
    batch."""

    pairs: Sequence[Pair]
    padding: float
    data: Any


class Arm(NamedTuple):
    """What takes a step. given: its number -> what it is made on. flops: of such pairs."""

    model: nn.Module
    given: Callable[[int], Given]
    step: Callable[[Given], None]
    flops: Callable[[Sequence[Pair]], float]


def build(settings: Settings) -> Arm:
    """An arm by its settings, with random weights."""
    torch.manual_seed(0)
    half = torch.bfloat16 if settings.precision == "bf16" else None
    if settings.arm in ("bare", "expanded"):
        return _stock(settings, half)
    return _zipped(settings, half)


def _stock(settings: Settings, half: torch.dtype | None) -> Arm:
    """The text tower in stock transformers, or one whose vocabulary has the units too."""
    shapes, device = SIZES[settings.size], torch.device(settings.device)
    shape = dict(shapes["text"])
    if settings.arm == "expanded":
        shape["vocab_size"] += shapes["speech"]["vocab_size"]
    model: Any = _made(shape, device, torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters())
    row = sum(EQUAL.values())

    def given(number: int) -> Given:
        ids = torch.randint(2, model.config.vocab_size, (settings.pairs, row), device=device)
        return Given([EQUAL] * settings.pairs, 0.0, ids)

    def step(given: Given) -> None:
        ids: Tensor = given.data
        labels = ids.clone()
        if settings.arm == "expanded":
            labels[:, : EQUAL["speech"] + 1] = -100  # of the text, all but its begin
        with torch.autocast(device.type, torch.bfloat16, enabled=half is not None):
            loss = model(ids, labels=labels).loss
        _learn(model, optimizer, loss)

    # Every token reads itself and those before it; stock makes logits at every position.
    tokens, reads = {"text": float(row)}, {"text": row * (row + 1) / 2.0}
    each = plan.Load(1.0, tokens, tokens, reads)
    alone = Zipper.from_towers({"text": Tower(model)}, train=("text",))

    def flops(pairs: Sequence[Pair]) -> float:
        return plan.cost(alone, each * float(len(pairs))).flops

    return Arm(model, given, step, flops)


def _zipped(settings: Settings, half: torch.dtype | None) -> Arm:
    """A zip that learns to write down speech."""
    shapes, device = SIZES[settings.size], torch.device(settings.device)
    trained, mixed = settings.arm == "trained", settings.arm in ("padded", "packed", "flex")
    model = (_zip if trained else _frozen)(settings.size, trained, device, half)
    objective = Objective(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    contents = {
        name: torch.randint(2, shapes[name]["vocab_size"], (4096,)).tolist()
        for name in ("text", "speech")
    }

    def sample(pair: Pair) -> list[Segment]:
        speech, text = (contents[name][: pair[name] - 2] for name in ("speech", "text"))
        return [Target("speech", speech, weight=0.0), Target("text", text, weight=1.0)]

    def given(number: int) -> Given:
        pairs = mix(settings.pairs, number) if mixed else [EQUAL] * settings.pairs
        samples, rows = [sample(pair) for pair in pairs], None
        if settings.arm in ("packed", "flex"):
            rows = pack([lengths(some) for some in samples], {"speech": settings.room})
        batch = collate(samples, model.ends(), packed=rows).to(device)

        slots = sum(strand.ids.numel() for strand in batch.strands.values())
        return Given(pairs, 1 - sum(sum(pair.values()) for pair in pairs) / slots, batch)

    def step(given: Given) -> None:
        batch: Batch = given.data
        model.attention = "flex" if "flex" in (settings.arm, settings.attention) else "sdpa"
        with torch.autocast(device.type, torch.bfloat16, enabled=half is not None):
            loss = objective([batch])["text"] / batch.weights["text"].sum()
        _learn(model, optimizer, loss)

    def flops(pairs: Sequence[Pair]) -> float:
        batch = collate([sample(pair) for pair in pairs], model.ends())
        return plan.cost(model, plan.Load.of([batch])).flops

    return Arm(model, given, step, flops)


def _zip(size: str, trained: bool, device: torch.device, half: torch.dtype | None) -> Zipper:
    """A zip that learns in both towers, or in its links alone; then towers are kept in `half`, if
    there is one."""
    shapes = SIZES[size]
    kept = torch.float32 if half is None or trained else half
    towers = {name: Tower(_made(shapes[name], device, kept).eval()) for name in ("text", "speech")}
    learns = tuple(towers) if trained else ()
    link = LinkConfig(gate_init=0.5)
    model = Zipper.from_towers(
        towers, every=shapes["every"], train=learns, link=link, input_projection="none"
    )
    return model.train()


# Arms in one process share it: what they learn does not change how fast they are.
_frozen = cache(_zip)


def _made(shape: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """A tower in stock transformers, made where it is used: a billion random numbers take a CPU a
    minute."""
    with device:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=dtype)


def _learn(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def timed(arm: Arm, before: int, numbers: Iterator[int]) -> Turn:
    """One turn: a step and how long it took; `before` is what was in memory before there was a
    model."""
    device = next(arm.model.parameters()).device
    cuda = device.type == "cuda"
    if cuda:  # there a step takes as long as its data, which whoever trains makes beside it
        given, lap = arm.given(next(numbers)), stopwatch(str(device))
    else:
        lap, given = stopwatch("cpu"), arm.given(next(numbers))
    arm.step(given)
    seconds = lap()

    return {
        "seconds": seconds,
        "pairs": len(given.pairs),
        "padding": given.padding,
        "flops": arm.flops(given.pairs),
        "peak_memory": torch.cuda.max_memory_allocated() if cuda else resident()[1] - before,
        "trained_parameters": sum(p.numel() for p in arm.model.parameters() if p.requires_grad),
    }


def _turns(settings: Settings) -> Callable[[], Turn]:
    """What takes the turns of an arm."""
    before = resident()[0]
    if settings.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    return partial(timed, build(settings), before, count())


def main() -> None:
    """An arm's process."""
    settings = Settings(**json.loads(sys.argv[1]))
    if settings.threads:
        torch.set_num_threads(settings.threads)
    serve(_turns(settings))


if __name__ == "__main__":
    main()
