"""`zipper bench decode`: tokens of text behind a source of speech, by a zip, by its text tower
alone, by stock transformers, by a decoder with an extended vocabulary, and by Mllama's text model
of the same sizes.

Random weights from configurations: speed does not depend on them. Every arm is given the same ids
to read instead of its own choice, so that all do the same work; before that, arms that compute the
same thing must choose the same tokens.
"""

import inspect
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    MllamaForCausalLM,
    StaticCache,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from zipper.errors import ZipperError
from zipper.fast.reader import Fused
from zipper.link import LinkConfig
from zipper.model import Zipper
from zipper.reading import Reader, Stepwise
from zipper.tower import Tower
from zipper_lab.bench import (
    QWEN,
    SPEECH,
    Here,
    Turn,
    head,
    llama,
    losses,
    machine,
    ratio,
    serve,
    stopwatch,
    take_turns,
    take_turns_here,
)

#: Each arm, and what it is.
ARMS = {
    "zip": "zip, the source read and visible",
    "blind": "zip, nothing of the other modality visible",
    "bare": "the same loop, the text tower alone",
    "torch": "zip, without the compiled step",
    "whole": "zip, its step by torch.compile and replayed as a graph",
    "steps": "zip, by Zipper.step",
    "int8": "zip, weights in 8 bits",
    "streams": "zip, eight sequences side by side",
    "lanes": "zip, text and units in the same steps, each reading the other",
    "apart": "the same text and the same units in a sequence each, one after the other",
    "stock": "the text tower in stock transformers, dynamic cache",
    "static": "the same, static cache, compiled",
    "expanded": "one decoder with the units in its vocabulary, our loop, source and text in one "
    "sequence",
    "mllama": "Mllama's text model of the same sizes, source as cross-attention states, stock",
}
#: (arm, arm below it, the target of the project): tokens per second of the first by those of the
#: second. None: as many as the bytes that they read allow, and 3 % of the time for the rest.
RATIOS = (
    ("blind", "bare", 0.99),
    ("zip", "bare", None),
    ("zip", "stock", {"float32": 1.15, "bfloat16": 1.5}),
    ("int8", "stock", 2.0),
    ("zip", "static", 1.0),
    ("zip", "expanded", 0.95),
    ("zip", "torch", 1.0),
    ("whole", "stock", 2.5),
    ("whole", "static", 1.0),
    ("zip", "steps", 1.0),
    ("zip", "mllama", 1.0),
    ("streams", "zip", 5.0),
    ("lanes", "apart", 0.91),
)
#: Arms that exist on a CPU, or on CUDA, only.
ONLY = {"torch": "cpu", "whole": "cuda"}
#: Arms that compute the same thing.
SAME = (
    ("zip", "steps"),
    ("zip", "torch"),
    ("zip", "streams"),
    ("blind", "bare"),
    ("bare", "stock"),
    ("stock", "static"),
)
STREAMS = 8
#: Numbers that are read to learn how fast memory is, beyond all caches, and how often.
MEMORY, READS = {"cpu": 1 << 25, "cuda": 1 << 29}, 3
EVERY = 2  # blocks between junctions
UNITS = 64  # ids that the speech tower of every size knows


SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {"text": llama(64, 4, 2, 96, 96), "speech": llama(64, 4, 2, 96, 64)},
    "30m": {"text": llama(384, 10, 6, 1024, 32_000), "speech": llama(320, 10, 5, 864, 1028)},
    "120m": {"text": llama(768, 12, 12, 2048, 32_000), "speech": llama(512, 12, 8, 1376, 1028)},
    "0.5b": {"text": llama(896, 24, 14, 4864, 151_936, **QWEN), "speech": SPEECH},
    "1.5b": {"text": llama(1536, 28, 12, 8960, 151_936, **QWEN), "speech": SPEECH},
    "8b": {"text": llama(4096, 32, 32, 14_336, 128_000), "speech": SPEECH},
}


@dataclass(frozen=True)
class Settings:
    """What an arm is told. source: tokens of speech. prompt, tokens: of text, read at once and then
    one by one. threads: 0 = as many as torch takes. batch: sequences side by side."""

    arm: str
    size: str = "30m"
    source: int = 128
    prompt: int = 16
    tokens: int = 32
    precision: str = "float32"
    device: str = "cpu"
    threads: int = 0
    batch: int = 1


class Arm(NamedTuple):
    """A way to decode. start: reads source and prompt, and makes a step that reads one id per
    sequence: logits of the first.
    bytes: that a step reads, prefill_flops: of source and prompt, in products with weights; 0 = not
    counted. beside: a start of what is compared with it on the same weights.
    """

    start: Callable[[], Callable[[int], Tensor]]
    streams: int = 1
    bytes: int = 0
    prefill_flops: float = 0.0
    beside: Callable[[], Callable[[int], Tensor]] | None = None


def bench(
    size: str,
    rounds: int,
    warm: int = 2,
    arms: Sequence[str] = (),
    source: int = 128,
    tokens: int = 32,
    precision: str = "float32",
    device: str = "cpu",
    threads: int = 0,
    hardware: str = "",
    batch: int = 1,
    here: Here | None = None,
) -> dict[str, Any]:
    """Measure; the result is plain data for JSON, `markdown` shows it. arms: default all that the
    device has. here: in this process, where an arm may be lost; default for CUDA. Raises
    ZipperError for unknown names, and where arms that compute the same thing choose other tokens in
    float32.
    """
    known = [arm for arm in ARMS if device.startswith(ONLY.get(arm, ""))]
    arms = arms or known
    if unknown := sorted({*arms} - {*known}):
        raise ZipperError(f"There are no arms {unknown} on {device}; there are {', '.join(known)}.")
    if size not in SIZES or precision not in ("float32", "bfloat16"):
        raise ZipperError(
            f"There is no size {size!r} in {precision}; there are {', '.join(SIZES)} in float32 "
            "and bfloat16."
        )

    shared = Settings("", size, source, 16, tokens, precision, device, threads, batch)
    settings = {arm: replace(shared, arm=arm) for arm in arms}
    said = {name: value for name, value in asdict(shared).items() if name != "arm"}
    about = {**machine(hardware), "settings": said}
    if here is None and not device.startswith("cpu"):
        here = Here()
    if here is None:
        plain = {arm: asdict(one) for arm, one in settings.items()}
        turns = take_turns("zipper_lab.bench.decode", plain, rounds, warm)
        return about | _found(turns, {}, precision)

    told = here.told

    def tell(turns: Mapping[str, Sequence[Turn]], lost: Mapping[str, str]) -> None:
        told(about | _found(turns, lost, precision))

    return about | _found(*take_turns_here(_turns, settings, rounds, warm, here, tell), precision)


def _found(
    turns: Mapping[str, Sequence[Turn]], lost: Mapping[str, str], precision: str
) -> dict[str, Any]:
    """What the turns say. lost: why arms took none."""
    if precision == "float32":
        _check_same(turns)
    return {
        "rounds": min(map(len, turns.values()), default=0),
        "arms": {arm: _summary(said) for arm, said in turns.items()},
        "ratios": list(_ratios(turns, precision)),
        "prefill": _prefill(turns),
        "lost": dict(lost),
    }


def _ratios(turns: Mapping[str, Sequence[Turn]], precision: str) -> Iterator[dict[str, Any]]:
    """What is compared, of what was measured."""
    for fast, slow, target in RATIOS:
        if fast not in turns or slow not in turns:
            continue
        rates = [[turn["tokens"] / turn["decode_s"] for turn in turns[arm]] for arm in (fast, slow)]
        first = turns[fast][0]
        if first["beside_s"]:  # rates of the arm and of what goes beside it
            rates = [[1 / turn[key] for turn in turns[fast]] for key in ("in_turn_s", "beside_s")]

        wanted = target[precision] if isinstance(target, dict) else target
        if wanted is None:
            wanted = round(1 / (first["bytes"] / turns[slow][0]["bytes"] + 0.03), 3)
        yield {"above": fast, "below": slow, "target": wanted, **ratio(*rates)._asdict()}


def _prefill(turns: Mapping[str, Sequence[Turn]]) -> dict[str, float]:
    """How fast the zip reads a source beside the decoder that reads it in its own sequence."""
    if not {"zip", "expanded"} <= turns.keys():
        return {}
    rates = [[1 / turn["prefill_s"] for turn in turns[arm]] for arm in ("zip", "expanded")]
    work = turns["expanded"][0]["prefill_flops"] / turns["zip"][0]["prefill_flops"]
    return {"work": round(work, 3), "target": round(0.9 * work, 3), **ratio(*rates)._asdict()}


def _check_same(turns: Mapping[str, Sequence[Turn]]) -> None:
    for one, other in SAME:
        if not {one, other} <= turns.keys():
            continue
        if turns[one][0]["choice"] != turns[other][0]["choice"]:
            raise ZipperError(
                f"The arms {one!r} and {other!r} choose other tokens: what they take cannot be "
                "compared."
            )


def _summary(turns: Sequence[Turn]) -> dict[str, Any]:
    step = statistics.median(turn["decode_s"] * turn["streams"] / turn["tokens"] for turn in turns)
    found = {
        "tokens_per_s": statistics.median(turn["tokens"] / turn["decode_s"] for turn in turns),
        "prefill_s": statistics.median(turn["prefill_s"] for turn in turns),
        "bytes_a_step": turns[0]["bytes"],
        "bytes_per_s": turns[0]["bytes"] / step,
        "read_bytes_per_s": statistics.median(turn["read"] for turn in turns),
    }
    return {**found, "turns": list(turns)}


def markdown(found: Mapping[str, Any]) -> str:
    """The results, for people."""
    lines = [
        *head("Decoding", "zipper bench decode", found),
        "| arm | tokens/s | prefill, ms | a step reads, MB | of the read bandwidth |",
        "|---|---|---|---|---|",
    ]
    for name, arm in found["arms"].items():
        known = "- | -"
        if arm["bytes_a_step"]:
            share = arm["bytes_per_s"] / arm["read_bytes_per_s"]
            known = f"{arm['bytes_a_step'] / 1e6:.1f} | {100 * share:.0f} %"
        lines.append(
            f"| {name}: {ARMS[name]} | {arm['tokens_per_s']:.1f} | {1000 * arm['prefill_s']:.0f} | "
            f"{known} |"
        )

    lines += ["", "| tokens/s | median of the rounds | 95 % interval | target |", "|---" * 4 + "|"]
    for row in found["ratios"]:
        lines.append(
            f"| {row['above']} / {row['below']} | {row['median']:.3f} | {row['low']:.3f} to "
            f"{row['high']:.3f} | {row['target']} ({_verdict(row)}) |"
        )

    return "\n".join([*lines, *_notes(found), *losses(found)]) + "\n"


def _verdict(row: Mapping[str, Any]) -> str:
    return "held" if row["median"] >= row["target"] else "missed"


def _notes(found: Mapping[str, Any]) -> Iterator[str]:
    """What stands below the tables."""
    if row := found["prefill"]:
        yield ""
        yield (
            f"Prefill: the zip is {row['median']:.2f} ({row['low']:.2f} to {row['high']:.2f}) "
            f"times as fast as the expanded decoder, which does {row['work']:.2f} times its work "
            f"in products with weights: {row['target']:.2f} was wanted ({_verdict(row)})."
        )

    arms = found["arms"]
    if {"zip", "bare"} <= arms.keys() and arms["bare"]["bytes_a_step"]:
        share = arms["zip"]["bytes_a_step"] / arms["bare"]["bytes_a_step"]
        yield ""
        yield (
            f"A step of the zip reads {share:.3f} times the bytes of the bare tower's: by them "
            f"zip / bare is {1 / share:.3f}."
        )

    kind = torch.device(found["settings"]["device"]).type
    how = f"sums over {4e-6 * MEMORY[kind]:.0f} MB of float32"
    if kind != "cpu":
        how = f"copies of {2e-6 * MEMORY[kind]:.0f} MB, read and written"
    yield ""
    yield (
        f"Read bandwidth: {how}, in the same process. Prefill: the source and 16 tokens of text. "
        "On a CPU blind / bare is taken on the same weights, token by token in turn, and lanes / "
        "apart everywhere: two processes with equal weights differ by 3 %."
    )


@cache
def _made(settings: Settings, tower: str, wider: int = 0) -> Any:
    """A tower in stock transformers, with random weights. wider: more ids."""
    shape = SIZES[settings.size][tower]
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**shape, "vocab_size": shape["vocab_size"] + wider})
    # Made where it is used: a billion random numbers take a CPU a minute.
    with torch.device(settings.device):
        dtype = getattr(torch, settings.precision)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@cache
def _zip(settings: Settings, *towers: str) -> Zipper:
    """A zip of towers, its gates open."""
    made = {name: _made(settings, name) for name in towers}
    model = Zipper.from_towers(
        made,
        every=dict.fromkeys(towers, EVERY),
        link=LinkConfig(gate_init=0.5),
        input_projection="none",
    )
    model.links.to(getattr(torch, settings.precision))
    return model


@cache
def _reader(settings: Settings, kind: str, *towers: str) -> Reader:
    """A zip, or one tower, laid out for decoding. kind: "", or the arm that reads otherwise."""
    model = _zip(settings, *towers)
    if kind == "steps":
        return Stepwise(model)
    return Fused(model, int8=kind == "int8", compiled=kind == "whole")


def build(settings: Settings) -> Arm:
    """An arm by its settings, with random weights; in one process arms of a size share them."""
    shapes, arm, batch = SIZES[settings.size], settings.arm, settings.batch
    numbers = torch.Generator().manual_seed(1)

    def drawn(tower: str, count: int) -> list[int]:
        ids = torch.randint(2, shapes[tower]["vocab_size"], (count,), generator=numbers)
        return list(map(int, ids))

    source, prompt = drawn("speech", settings.source), drawn("text", settings.prompt)
    alike = Settings("", settings.size, precision=settings.precision, device=settings.device)
    if arm == "mllama":
        dtype = getattr(torch, settings.precision)
        return _mllama(shapes["text"], len(source), [prompt] * batch, dtype, settings.device)
    if arm in ("stock", "static"):
        room = settings.prompt + settings.tokens if arm == "static" else 0
        return _stock(_made(alike, "text"), [prompt] * batch, room)
    if arm == "expanded":
        units = shapes["text"]["vocab_size"]
        wide = Zipper.from_towers({"text": _made(alike, "text", shapes["speech"]["vocab_size"])})
        made = _ours(Fused(wide), ["text"], [], [units + i for i in source] + prompt, batch)
        return made._replace(
            prefill_flops=_products(_blocks(wide, "text"), len(source) + len(prompt))
        )
    towers = ["text"] if arm == "bare" else ["text", "speech"]
    reader = _reader(alike, arm if arm in ("steps", "int8", "whole") else "", *towers)
    if arm in ("bare", "blind"):
        made = _ours(reader, towers, [], prompt, batch)
        # On CUDA a second session has another row, a graph of another shape.
        if arm == "bare" or settings.device != "cpu":
            return made
        return made._replace(beside=_ours(reader, ["text"], [], prompt, batch).start)
    if arm in ("lanes", "apart"):
        together, apart = (_lanes(reader, source, prompt, n) for n in (1, 2))
        return Arm(together, 2, beside=apart) if arm == "lanes" else Arm(apart, 2)
    streams = batch * STREAMS if arm == "streams" else batch
    made = _ours(reader, ["speech", "text"], source, prompt, streams)
    return made._replace(prefill_flops=_zip_prefill(_zip(alike, *towers), len(source), len(prompt)))


def _ours(
    reader: Reader,
    plan: Sequence[str],
    source: Sequence[int],
    prompt: Sequence[int],
    streams: int = 1,
) -> Arm:
    def start() -> Callable[[int], Tensor]:
        sessions = [reader.open(plan, ["text"]) for _ in range(streams)]
        if source:
            reader.read({"speech": [(session, source) for session in sessions]})
        reader.read({"text": [(session, prompt) for session in sessions]})

        def step(i: int) -> Tensor:
            logits = reader.read({"text": [(session, [i]) for session in sessions]})["text"][0]
            assert logits is not None
            return logits

        return step

    return Arm(
        start,
        streams,
        _read(reader, plan, source, prompt, streams) if isinstance(reader, Fused) else 0,
    )


def _lanes(
    reader: Reader, source: Sequence[int], prompt: Sequence[int], sessions: int
) -> Callable[[], Callable[[int], Tensor]]:
    """A start of text and units, a token of each a step, behind what is given of both. sessions:
    one for both, in which they read one another, or one each."""
    plan = ["speech", "text"]

    def start() -> Callable[[int], Tensor]:
        opened = [reader.open(plan, plan) for _ in range(sessions)]
        for tower, ids in ("speech", source), ("text", prompt):
            reader.read({tower: [(session, ids) for session in opened]})
        own = dict(zip(plan, opened * 2, strict=False))

        def step(i: int) -> Tensor:
            pieces = {"text": [(own["text"], [i])], "speech": [(own["speech"], [i % UNITS])]}
            apart = [{tower: piece} for tower, piece in pieces.items()]
            found = [reader.read(given) for given in ([pieces] if sessions == 1 else apart)]
            logits = found[0]["text"][0]
            assert logits is not None
            return logits

        return step

    return start


def _products(parts: Iterable[nn.Module], tokens: int) -> float:
    """FLOPs of so many tokens through the matrices of modules."""
    weights = chain.from_iterable(part.parameters() for part in parts)
    return 2.0 * tokens * sum(p.numel() for p in weights if p.ndim == 2)


def _blocks(model: Zipper, name: str) -> Sequence[nn.Module]:
    tower = model.towers[name]
    assert isinstance(tower, Tower)
    return list(tower.blocks)


def _zip_prefill(model: Zipper, source: int, prompt: int) -> float:
    """The source goes as far as its last junction and into the links, the prompt through the text
    tower and what links do to it."""
    last = max(junction["speech"] for junction in model.config.junctions)
    done = _products(_blocks(model, "speech")[:last], source)
    done += _products(_blocks(model, "text"), prompt)
    for n, _ in enumerate(model.config.junctions):
        link = model.link(n, "speech", "text")
        done += _products(
            [link.query, link.out, *([link.feedforward] if link.feedforward else [])], prompt
        )
        done += _products(
            [link.projection, link.key, link.value, *([link.whiten] if link.whiten else [])], source
        )
    return done


def _read(
    reader: Fused, plan: Sequence[str], source: Sequence[int], prompt: Sequence[int], streams: int
) -> int:
    """Bytes that a step reads behind the prompt: weights once, keys and values of every
    sequence."""
    session = reader.open(plan, ["text"])
    if source:
        reader.read({"speech": [(session, source)]})
    reader.read({"text": [(session, prompt)]})
    tower, links = reader.bytes("text")
    caches = [session.caches["text"], *session.memory.values()]
    held = sum(cache.held[:, :, :, : cache.length].nbytes for cache in caches)
    return tower + links * bool(source) + streams * held


def _stock(model: Any, prompts: Sequence[Sequence[int]], room: int) -> Arm:
    """What generate() does for a greedy token, without what it does besides: the forward of a
    model, and a cache. room: of a static cache, and compiled; 0 = a dynamic one."""
    mode = "reduce-overhead" if model.device.type == "cuda" else None
    forward = torch.compile(model.forward, mode=mode) if room else model.forward
    named = _cache_argument(model)
    # One for ever: its addresses are in the graphs.
    static = StaticCache(model.config, max_cache_len=room) if room else None

    def start() -> Callable[[int], Tensor]:
        cache = DynamicCache(config=model.config) if static is None else static
        cache.reset()
        model(torch.tensor(prompts, device=model.device), **{named: cache})

        def step(i: int) -> Tensor:
            ids = torch.tensor([[i]] * len(prompts), device=model.device)
            logits: Tensor = forward(ids, **{named: cache}).logits[0, -1]
            return logits

        return step

    return Arm(start, len(prompts))


def _cache_argument(model: Any) -> str:
    """The name by which this release of transformers takes a cache, as the annotations of a model's
    forward say it."""
    return next(
        name
        for name, given in inspect.signature(model.forward).parameters.items()
        if "Cache" in str(given.annotation)
    )


def _mllama(
    text: Mapping[str, Any],
    length: int,
    prompts: Sequence[Sequence[int]],
    dtype: torch.dtype,
    device: str,
) -> Arm:
    """A layer of cross-attention behind every second block, as many as the zip has junctions; its
    source costs nothing to make."""
    places = [layer + n for n, layer in enumerate(range(EVERY, text["num_hidden_layers"], EVERY))]
    shape = {
        **text,
        "num_hidden_layers": text["num_hidden_layers"] + len(places),
        "cross_attention_layers": places,
        "pad_token_id": 1,
    }
    del shape["model_type"]
    made: Any = MllamaForCausalLM
    torch.manual_seed(0)
    with torch.device(device):
        model = made._from_config(MllamaTextConfig(**shape), dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            parameter.data.fill_(0.5)  # they are born closed
    states = torch.randn(1, length, text["hidden_size"], dtype=dtype, device=device).expand(
        len(prompts), -1, -1
    )
    named = _cache_argument(model)

    def start() -> Callable[[int], Tensor]:
        cache = DynamicCache(config=model.config)
        model(
            torch.tensor(prompts, device=model.device),
            cross_attention_states=states,
            **{named: cache},
        )

        def step(i: int) -> Tensor:
            ids = torch.tensor([[i]] * len(prompts), device=model.device)
            logits: Tensor = model(ids, **{named: cache}).logits[0, -1]
            return logits

        return step

    return Arm(start, len(prompts))


@torch.inference_mode()
def timed(arm: Arm, ids: Sequence[int], device: str, memory: Tensor) -> Turn:
    """One turn: source and prompt, then the ids one by one. choice: a number that tells the greedy
    tokens apart."""

    def now() -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    began = now()
    step = arm.start()
    prefilled = now()
    choice = 0
    for i in ids:
        choice = (choice * 31 + int(step(i).argmax())) % (1 << 40)
    ended = now()
    lap, (first, second) = stopwatch(device), memory.chunk(2)
    for _ in range(READS):
        second.copy_(first) if device != "cpu" else memory.sum()
    read = READS * memory.numel() * memory.element_size() / lap()
    return {
        "prefill_s": prefilled - began,
        "decode_s": ended - prefilled,
        "tokens": float(len(ids) * arm.streams),
        "streams": float(arm.streams),
        "bytes": float(arm.bytes),
        "prefill_flops": arm.prefill_flops,
        "read": read,
        "choice": float(choice),
        **_in_turn(arm, ids),
    }


def _in_turn(arm: Arm, ids: Sequence[int]) -> Turn:
    """Seconds of the arm and of what goes beside it, token by token in turn: two processes with
    equal weights differ by 3 %."""
    seconds = {"in_turn_s": 0.0, "beside_s": 0.0}
    if arm.beside is not None:
        steps = list(zip(seconds, (arm.start(), arm.beside()), strict=True))
        for i in ids:
            steps.reverse()
            for key, step in steps:
                began = time.perf_counter()
                step(i)
                seconds[key] += time.perf_counter() - began
    return seconds


@cache
def _memory(device: str) -> Tensor:
    return torch.ones(MEMORY[torch.device(device).type], device=device)


def _turns(settings: Settings) -> Callable[[], Turn]:
    """What takes the turns of an arm."""
    vocabulary = SIZES[settings.size]["text"]["vocab_size"]
    ids = torch.randint(
        2, vocabulary, (settings.tokens,), generator=torch.Generator().manual_seed(2)
    ).tolist()
    return partial(timed, build(settings), ids, settings.device, _memory(settings.device))


def main() -> None:
    """An arm's process."""
    settings = Settings(**json.loads(sys.argv[1]))
    if settings.arm == "torch":
        os.environ["ZIPPER_NATIVE"] = "0"
    if settings.threads:
        torch.set_num_threads(settings.threads)
    serve(_turns(settings))


if __name__ == "__main__":
    main()
