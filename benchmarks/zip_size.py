"""How large a zip is, how long it takes to load and what a second one over the same base adds to
memory.

Towers of real shapes with random weights, both frozen: Qwen2.5-0.5B for text, 0.1B for speech
units. Sizes and memory depend on shapes alone; times are of this machine, with the files in its
page cache. Nothing is downloaded.

    python benchmarks/zip_size.py --output benchmarks/results/zip_size
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EVERY = {"text": 6, "speech": 3}  # three junctions
RUNS = 3  # loads, each in a new process
SHARED: dict[str, tuple[str, ...]] = {
    "first zip": (),
    "second zip": ("text",),
    "third zip": ("text", "speech"),
}  # with the first

TOWERS: dict[str, dict[str, Any]] = {
    "text": {  # Qwen/Qwen2.5-0.5B
        "model_type": "qwen2",
        "num_hidden_layers": 24,
        "hidden_size": 896,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151_936,
        "bos_token_id": 151_643,
        "eos_token_id": 151_643,
        "tie_word_embeddings": True,
    },
    "speech": {  # 1,024 units, begin, end and two voices
        "model_type": "llama",
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "intermediate_size": 2560,
        "vocab_size": 1028,
        "bos_token_id": 1024,
        "eos_token_id": 1025,
        "tie_word_embeddings": True,
    },
}


def build(folder: Path) -> dict[str, Any]:
    """Towers and three zips over them that differ in their links, in bfloat16; their sizes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from zipper import Zipper

    for name, shape in TOWERS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**shape), dtype=torch.bfloat16
        )
        model.save_pretrained(folder / name)
    towers = {name: folder / name for name in TOWERS}
    for seed, step in enumerate(SHARED):
        zipped = Zipper.from_towers(towers, every=EVERY, seed=seed)
        zipped.cast(torch.bfloat16)
        zipped.save_pretrained(folder / step)
    return {
        "junctions": len(zipped.config.junctions),
        "links": len(zipped.links),
        "new_parameters": sum(p.numel() for p in zipped.new_parameters().values()),
        "tower_parameters": {
            name: sum(p.numel() for p in zipped.tower(name).parameters()) for name in TOWERS
        },
        "tower_bytes": {name: size(folder / name) for name in TOWERS},
        "zip_bytes": size(folder / "first zip"),
        "peak_memory": peak(),
    }


def load(folder: Path) -> dict[str, Any]:
    """Load the zips one after the other into one process; what each step took and the memory after
    it."""
    began = clocks()
    from zipper import Zipper

    def shared(a: Zipper, b: Zipper, name: str) -> bool:
        pairs = zip(a.tower(name).parameters(), b.tower(name).parameters(), strict=True)
        return all(p.data_ptr() == q.data_ptr() for p, q in pairs)

    steps = {"imports": since(began) | {"memory": memory()}}
    models: list[Zipper] = []
    for step, given in SHARED.items():
        bases = {name: models[0].tower(name) for name in given}
        began = clocks()
        models.append(Zipper.from_pretrained(folder / step, towers=bases))
        steps[step] = since(began)
        for parameter in models[-1].parameters():
            parameter.sum()  # what is mapped from a file becomes resident when it is read
        steps[step]["memory"] = memory()
        for name in TOWERS:
            if shared(models[0], models[-1], name) != (name in given or not bases):
                raise SystemExit(
                    f"{step}: the tower {name!r} is {'not ' if name in given else ''}shared"
                )
    return {"steps": steps, "peak_memory": peak()}


def clocks() -> tuple[float, float]:
    """Seconds of the wall and of this process's work on all cores."""
    return time.perf_counter(), time.process_time()


def since(began: tuple[float, float]) -> dict[str, float]:
    """What a step took."""
    wall, work = clocks()
    return {"seconds": wall - began[0], "cpu_seconds": work - began[1]}


def size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def memory() -> int:
    """Resident bytes of this process, with the pages of files that it has mapped, after what was
    freed has gone back (glibc)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """The most that was resident, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(step: str, folder: Path) -> dict[str, Any]:
    """`build` or `load` in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--step", step, "--folder", folder],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def table(found: dict[str, Any]) -> Iterator[str]:
    """The results as lines of markdown."""
    built, runs = found["built"], found["loads"]
    towers = sum(built["tower_bytes"].values())
    yield f"# What a zip of a 0.5B and a 0.1B tower costs, {found['hardware']}, {found['month']}\n"
    yield (
        "`python benchmarks/zip_size.py`: random weights, bfloat16, both towers frozen, "
        f"every={json.dumps(EVERY)}: "
        f"{built['junctions']} junctions, {built['links']} links. {found['versions']}. Files in "
        "the page cache; median of "
        f"{len(runs)} new processes, least to most in brackets.\n"
    )
    yield "| | parameters | MB on disk |\n|---|---|---|"
    for name, count in built["tower_parameters"].items():
        yield f"| tower {name} | {count:,} | {built['tower_bytes'][name] / 1e6:,.1f} |"
    share = f"{100 * built['zip_bytes'] / towers:.1f} % of the towers"
    yield f"| **zip**: new parameters only | {built['new_parameters']:,} | {built['zip_bytes'] / 1e6:,.1f} ({share}) |\n"
    yield "| step | seconds | CPU seconds | resident memory after it, MB | added, MB |\n|---|---|---|---|---|"
    before = 0.0
    for step in runs[0]["steps"]:
        wall, work, held = (
            sorted(run["steps"][step][what] for run in runs)
            for what in ("seconds", "cpu_seconds", "memory")
        )
        now = statistics.median(held) / 1e6
        shared = f", {' and '.join(SHARED[step])} shared" if SHARED.get(step) else ""
        times = " | ".join(
            f"{statistics.median(t):.1f} ({t[0]:.1f} to {t[-1]:.1f})" for t in (wall, work)
        )
        yield f"| {step}{shared} | {times} | {now:,.0f} | {now - before:,.0f} |"
        before = now
    peaks = (
        statistics.median(run["peak_memory"] for run in runs) / 1e6,
        built["peak_memory"] / 1e6,
    )
    yield f"\nPeak of the process that loads all three: {peaks[0]:,.0f} MB; of the one that builds and saves: {peaks[1]:,.0f} MB."
    yield "What is shared was checked: every parameter of the shared tower has the same address in both models."


def main() -> None:
    """Build once, load in new processes, print the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write OUTPUT.md and OUTPUT.json too")
    parser.add_argument(
        "--hardware", default=f"{os.cpu_count()} cores, no GPU", help="what to call this machine"
    )
    parser.add_argument("--step", choices=["build", "load"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        print(json.dumps(build(given.folder) if given.step == "build" else load(given.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        built = measured("build", Path(folder))
        loads = [measured("load", Path(folder)) for _ in range(RUNS)]
    from importlib.metadata import version

    versions = f"Python {platform.python_version()}, torch {version('torch')}, transformers {version('transformers')}"
    found = {
        "hardware": given.hardware,
        "month": time.strftime("%Y-%m"),
        "versions": versions,
        "built": built,
        "loads": loads,
    }
    lines, data = "\n".join(table(found)) + "\n", json.dumps(found, indent=1) + "\n"
    print(lines, data, sep="\n")
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.with_suffix(".md").write_text(lines, encoding="utf-8")
        given.output.with_suffix(".json").write_text(data, encoding="utf-8")


if __name__ == "__main__":
    main()
