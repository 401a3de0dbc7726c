"""Benchmarks in which arms take turns, each in a process of its own: a machine that slows down slows all of them alike.

This page starts the processes, lets them take turns, and says by how much one is faster. What an arm does stands in the other
files, one per benchmark.
"""

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from zipper import report
from zipper.errors import ZipperError

Turn = dict[str, float]
RESAMPLES = 2000


class Ratio(NamedTuple):
    """A median over rounds, with a 95 % interval by bootstrap."""

    median: float
    low: float
    high: float


def ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """How many times as fast one arm is as another: the median of the ratios within each round."""
    rounds = [a / b for a, b in zip(above, below, strict=True)]
    dice = random.Random(0)
    medians = sorted(statistics.median(dice.choices(rounds, k=len(rounds))) for _ in range(RESAMPLES))
    return Ratio(statistics.median(rounds), medians[RESAMPLES // 40], medians[-RESAMPLES // 40 - 1])


def take_turns(module: str, arms: Mapping[str, Mapping[str, Any]], rounds: int, warm: int) -> dict[str, list[Turn]]:
    """What every arm says of each of its turns; a round is one turn of each, and every second round goes backwards (A B B A).

    module: one whose process calls `serve`. arms: name -> the settings it gets. warm: rounds before those that count. Raises
    ZipperError where an arm ends early; what it said before that is on stderr.
    """
    found: dict[str, list[Turn]] = {name: [] for name in arms}
    with ExitStack() as stack:
        turns = {name: stack.enter_context(_process(module, name, settings)) for name, settings in arms.items()}
        for number in range(warm + rounds):
            for name in list(arms)[:: -1 if number % 2 else 1]:
                said = turns[name]()
                if number >= warm:
                    found[name].append(said)
    return found


@contextmanager
def _process(module: str, name: str, settings: Mapping[str, Any]) -> Iterator[Callable[[], Turn]]:
    """A process that works when it is called, and sleeps in between."""
    command = [sys.executable, "-m", module, json.dumps(settings)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
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
                raise ZipperError(f"The arm {name!r} ended with code {process.wait()} before it was done. Try smaller sizes.")
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
    versions = {name: version(name) for name in ("torch", "transformers")} | {"zipper": report.commit()[:7] or version("zipper-lm")}
    return {
        "hardware": hardware or f"{os.cpu_count()} cores",
        "month": time.strftime("%Y-%m"),
        "versions": {"python": platform.python_version(), **versions},
    }


def head(title: str, command: str, found: Mapping[str, Any]) -> list[str]:
    """The first lines of a benchmark's table: where, how and with what it was taken."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    settings = ", ".join(f"{name} {value}" for name, value in found["settings"].items())
    how = f"`{command}`: {settings}. {versions}. {found['rounds']} rounds, the arms in turn (A B B A)."
    return [f"# {title}, {found['hardware']}, {found['month']}", "", how, ""]


def write(output: Path | None, found: Mapping[str, Any], lines: str) -> None:
    """OUTPUT.json and OUTPUT.md, where an output was asked for."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        output.with_suffix(".md").write_text(lines, encoding="utf-8")
