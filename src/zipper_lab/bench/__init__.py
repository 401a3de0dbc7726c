"""Benchmarks in which arms take turns, each in a process of its own: a machine that slows down
slows all of them alike.

This page starts the processes, lets them take turns, and says by how much one is faster. What an
arm does stands in the other files, one per benchmark.
"""

import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zipper.errors import ZipperError
from zipper.statistics import bootstrap
from zipper_lab import report

Turn = dict[str, float]


class Ratio(NamedTuple):
    """A median over rounds, with a 95 % interval by bootstrap."""

    median: float
    low: float
    high: float


def ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """How many times as fast one arm is as another: the median of the ratios within each round that
    both took."""
    rounds = np.array([a / b for a, b in zip(above, below, strict=False)])
    return Ratio(float(np.median(rounds)), *bootstrap(partial(np.median, axis=-1), rounds))


def take_turns(
    module: str, arms: Mapping[str, Mapping[str, Any]], rounds: int, warm: int
) -> dict[str, list[Turn]]:
    """What every arm says of each of its turns; a round is one turn of each, and every second round
    goes backwards (A B B A).

    module: one whose process calls `serve`. arms: name -> the settings it gets. warm: rounds before
    those that count. Raises ZipperError where an arm ends early; what it said before that is on
    stderr.
    """
    with ExitStack() as stack:
        turns = {
            name: stack.enter_context(_process(module, name, settings))
            for name, settings in arms.items()
        }
        return in_turn(turns, rounds, warm)


def in_turn(
    turns: Mapping[str, Callable[[], Turn]], rounds: int, warm: int
) -> dict[str, list[Turn]]:
    """What each says when it is called in turn, as in `take_turns`."""
    found: dict[str, list[Turn]] = {name: [] for name in turns}
    for number in range(warm + rounds):
        for name in list(turns)[:: -1 if number % 2 else 1]:
            said = turns[name]()
            if number >= warm:
                found[name].append(said)
    return found


class Here(NamedTuple):
    """How arms take turns in this process, as on a GPU: a process for each would take minutes to
    start, and memory for a context.
    apart: one arm after the other, each alone in memory, instead of A B B A. seconds: for all of
    them; rounds that do not fit are left out, but for the first three. told: called after each
    round with the benchmark's result so far.
    """

    apart: bool = False
    seconds: float = math.inf
    told: Callable[[dict[str, Any]], None] = lambda found: None


def take_turns_here(
    make: Callable[[Any], Callable[[], Turn]],
    arms: Mapping[str, Any],
    rounds: int,
    warm: int,
    how: Here,
    told: Callable[[Mapping[str, Sequence[Turn]], Mapping[str, str]], None],
) -> tuple[dict[str, list[Turn]], dict[str, str]]:
    """`take_turns` in this process. make: settings -> what takes a turn. An arm that fails is lost,
    the others go on: returns also {arm: traceback}. told: called after each round with both."""
    found, lost = dict[str, list[Turn]](), dict[str, str]()
    groups = [[name] for name in arms] if how.apart else [list(arms)]
    until = time.monotonic() + how.seconds

    def trying(name: str, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except Exception:  # whatever it is
            lost[name] = traceback.format_exc()
            found.pop(name, None)
            return None

    for number, group in enumerate(groups):
        share = time.monotonic() + (until - time.monotonic()) / (len(groups) - number)
        turns = {name: trying(name, partial(make, arms[name])) for name in group}
        for turn in range(warm + rounds):
            if turn >= warm + 3 and time.monotonic() > share:
                break
            for name in [name for name in group[:: -1 if turn % 2 else 1] if name not in lost]:
                said = trying(name, turns[name])
                if said is None:
                    del turns[name]
                    free()
                elif turn >= warm:
                    found.setdefault(name, []).append(said)
            told(_in_order(found, arms), lost)
        turns.clear()
        free()
    return _in_order(found, arms), lost


def _in_order(found: Mapping[str, list[Turn]], arms: Mapping[str, Any]) -> dict[str, list[Turn]]:
    return {name: found[name] for name in arms if name in found}


def free() -> None:
    """Gives back to the GPU what nobody holds any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def llama(
    width: int, layers: int, heads: int, hidden: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    """The configuration of a tower in Llama's architecture; more: what is otherwise."""
    return {
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": hidden,
        "max_position_embeddings": 4096,
        "vocab_size": vocabulary,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
        **more,
    }


SPEECH = llama(768, 16, 12, 2720, 1028)  # 138M
#: Qwen2.5's shapes (arXiv:2412.15115, table 1).
QWEN = {"model_type": "qwen2", "num_key_value_heads": 2}
#: Operations a second in bfloat16, dense, by the vendor's sheets, of the cards with the fastest
#: clocks (SXM); others of the name do less, which the name may not say.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def limits(device: str) -> dict[str, float | None]:
    """What the device can do at most: operations a second in bfloat16 by its name (None = not
    known) and as measured in a product of 8192 x 8192 (on a CPU of 512), bytes a second of a copy,
    read and written.
    """
    import torch

    from zipper.training import cost as plan

    there = torch.device(device)
    size = 8192 if there.type == "cuda" else 512
    name = torch.cuda.get_device_name(there) if there.type == "cuda" else ""
    numbers = torch.rand((1 << 28) if there.type == "cuda" else 1 << 22, device=there)
    rates, copy = list[float](), torch.empty_like(numbers)
    for _ in range(10):
        lap = stopwatch(device)
        copy.copy_(numbers)
        rates.append(2 * numbers.nbytes / lap())
    return {
        "peak": next((peak for known, peak in PEAKS.items() if known in name), None),
        "matmul": plan.matmul_rate(size, size, size, torch.bfloat16, device, 0.5),
        "copy": statistics.median(rates),
    }


def stopwatch(device: str) -> Callable[[], float]:
    """Seconds until it is called: on CUDA by events, between the end of what was asked before and
    the end of all that was asked."""
    import torch

    if torch.device(device).type != "cuda":
        began = time.perf_counter()
        return lambda: time.perf_counter() - began
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()

    def elapsed() -> float:
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1000

    return elapsed


@contextmanager
def _process(module: str, name: str, settings: Mapping[str, Any]) -> Iterator[Callable[[], Turn]]:
    """A process that works when it is called, and sleeps in between."""
    command = [sys.executable, "-m", module, json.dumps(settings)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout
        there, back = process.stdin, process.stdout

        def turn() -> Turn:
            try:
                there.write("\n")
                there.flush()
            except BrokenPipeError:
                pass  # it has ended: there is no answer either
            line = back.readline()
            if not line:
                raise ZipperError(
                    f"The arm {name!r} ended with code {process.wait()} before it was done. Try "
                    "smaller sizes."
                )
            answer: Turn = json.loads(line)
            return answer

        try:
            yield turn
        finally:
            process.kill()


def serve(turn: Callable[[], Turn]) -> None:
    """In an arm's process: one turn for each line that comes, its answer as a line of JSON."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not come between
    for _ in sys.stdin:
        print(json.dumps(turn()), file=answers, flush=True)


def resident() -> tuple[int, int]:
    """Bytes of this process that are in memory, and the most that were (Linux)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, most = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, most


def machine(hardware: str) -> dict[str, Any]:
    """Where and with what something was measured."""
    versions = {name: version(name) for name in ("torch", "transformers")} | {
        "zipper": report.commit()[:7] or report.installed()
    }
    return {
        "hardware": hardware or f"{os.cpu_count()} cores",
        "month": time.strftime("%Y-%m"),
        "versions": {"python": platform.python_version(), **versions},
    }


def head(title: str, command: str, found: Mapping[str, Any]) -> list[str]:
    """The first lines of a benchmark's results: where, how and with what they were taken."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    settings = ", ".join(f"{name} {value}" for name, value in found["settings"].items())
    rounds = f"{found['rounds']} rounds, the arms in turn (A B B A)."
    how = f"`{command}`: {settings}. {versions}. {rounds}"
    return [f"# {title}, {found['hardware']}, {found['month']}", "", how, ""]


def losses(found: Mapping[str, Any]) -> list[str]:
    """A line for each arm that failed."""
    lost = found.get("lost", {})
    return [f"\nLost: {arm}: {why.strip().splitlines()[-1]}" for arm, why in lost.items()]


def write(output: Path | None, found: Mapping[str, Any], lines: str) -> None:
    """OUTPUT.json and OUTPUT.md, where an output was asked for."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        results, page = written(output)
        results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        page.write_text(lines, encoding="utf-8")


def written(output: Path) -> tuple[Path, Path]:
    """OUTPUT.json and OUTPUT.md of an output that may end in either: other dots are its own
    ("train_0.5b")."""
    name = output.stem if output.suffix in (".json", ".md") else output.name
    return output.with_name(f"{name}.json"), output.with_name(f"{name}.md")
