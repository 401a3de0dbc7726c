"""`zipper bench start`: what commands cost until they have answered, as whole processes, beside a
bare `import torch`.

Counted is the processor's time of a process and of those that it starts, as the system counts it:
unlike the clock, it is little moved by what else the machine does. The rounds that do not count
leave what the first start on a machine makes, the compiled step and the record of proofs.
"""

import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from zipper.errors import ZipperError
from zipper_lab.bench import Turn, head, in_turn, machine, ratio

BARE = "import torch"
SAID = "send forty two oranges to vienna"
COMMANDS = {
    "--help": ["--help"],
    "show": ["show"],
    "transcribe": ["transcribe", "said.wav"],
    "speak": ["speak", SAID, "-o", "spoken.wav"],
}
MODEL = ("show", "transcribe", "speak")  # those that load one


def bench(
    rounds: int,
    warm: int = 1,
    model: str = "",
    beside: Mapping[str, str] | None = None,
    hardware: str = "",
) -> dict[str, Any]:
    """Measure; the result is plain data for JSON, `markdown` shows it.

    model: a folder, "" = the shipped one. beside: other versions of zipper that take their turns
    too, by a name, each as what PYTHONPATH is for it. Raises ZipperError where a command fails.
    """
    options: dict[str, list[str]] = {name: [] for name in MODEL}
    if model:
        path = str(Path(model).absolute())
        options = {name: ["--model", path] for name in MODEL} | {"show": [path]}

    with tempfile.TemporaryDirectory() as folder:
        turn = partial(_turn, Path(folder))
        turn(["-m", "zipper", "speak", SAID, "-o", "said.wav", *options["speak"]], None)
        turns = {BARE: partial(turn, ["-c", BARE], None)}
        for name, words in COMMANDS.items():
            command = ["-m", "zipper", *words, *options.get(name, [])]
            turns |= {
                f"{name}, {other}": partial(turn, command, place)
                for other, place in (beside or {}).items()
            }
            turns[name] = partial(turn, command, None)
        found = in_turn(turns, rounds, warm)
    cpu = {name: [said["cpu_s"] for said in turns] for name, turns in found.items()}
    pairs = [(name, BARE) for name in found if name != BARE]
    pairs += [(f"{name}, {other}", name) for other, name in product(beside or {}, COMMANDS)]
    return {
        **machine(hardware),
        "rounds": rounds,
        "settings": {
            "model": Path(model).name or "shipped",
            "threads": os.environ.get("OMP_NUM_THREADS") or os.cpu_count(),
        },
        "arms": {name: _summary(said) for name, said in found.items()},
        "ratios": [{"above": a, "below": b, **ratio(cpu[a], cpu[b])._asdict()} for a, b in pairs],
    }


def markdown(found: Mapping[str, Any]) -> str:
    """The results, for people."""
    lines = head("From a command to its answer", "zipper bench start", found)
    lines += ["| process | CPU, s | clock, s |", "|---|---|---|"]
    lines += [
        f"| {name} | {arm['cpu_s']:.2f} | {arm['seconds']:.2f} |"
        for name, arm in found["arms"].items()
    ]
    lines += ["", "| CPU | ratio | 95 % |", "|---|---|---|"]
    lines += [
        f"| {r['above']} / {r['below']} | {r['median']:.2f} | {r['low']:.2f} to {r['high']:.2f} |"
        for r in found["ratios"]
    ]
    return "\n".join(lines) + "\n"


def _summary(turns: Sequence[Turn]) -> dict[str, Any]:
    return {
        **{name: statistics.median(turn[name] for turn in turns) for name in turns[0]},
        "turns": list(turns),
    }


def _turn(folder: Path, words: Sequence[str], path: str | None) -> Turn:
    """One process of Python in a folder. path: PYTHONPATH; None = as it is."""
    places = (os.environ.get("PYTHONPATH", "") if path is None else path).split(os.pathsep)
    absolute = os.pathsep.join(str(Path(place).absolute()) for place in places if place)
    environment = os.environ | {"PYTHONPATH": absolute}
    with (folder / "said.txt").open("wb") as said:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *words], cwd=folder, env=environment, stdout=said, stderr=said
        )
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = (folder / "said.txt").read_text(encoding="utf-8", errors="replace").strip()[-300:]
        raise ZipperError(
            f"`python {shlex.join(words)}` ended with code {process.returncode}: {last}"
        )
    return {"cpu_s": used.ru_utime + used.ru_stime, "seconds": seconds}
