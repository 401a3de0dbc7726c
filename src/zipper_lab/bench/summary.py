"""`zipper bench`: a few rounds of every benchmark in about five minutes, beside what was recorded
elsewhere.

Rates depend on the machine, so what is compared with the record is said as a share of it; a machine
that is half as fast at everything is a slower machine, one that is half as fast at one arm has
found something. What is recorded is cut from benchmarks/results by `python -m
zipper_lab.bench.summary FILE.json ...`.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zipper_lab.bench import decode, machine, speech, train

RECORDED = Path(__file__).parent / "recorded.json"
ROUNDS = 3
SIZE = "30m"


def bench(size: str = SIZE, rounds: int = ROUNDS, hardware: str = "") -> dict[str, Any]:
    """Measure; the result is plain data for JSON, `markdown` shows it. size: of `train.SIZES` and
    `decode.SIZES`."""
    found = {
        "decode": decode.bench(
            size, rounds, 1, ("zip", "bare", "stock", "int8", "streams"), hardware=hardware
        ),
        "train": train.bench(size, rounds, 1, ("frozen", "trained", "expanded"), hardware=hardware),
        "speech": speech.bench(rounds, 1, hardware=hardware),
    }
    return {
        **machine(hardware),
        "rounds": rounds,
        "size": size,
        **{kind: digest(one) for kind, one in found.items()},
    }


def digest(found: Mapping[str, Any]) -> dict[str, Any]:
    """Of a benchmark's result: where it was taken, what each arm does in a second, and the
    ratios."""
    rates = {}
    for name, arm in found["arms"].items():
        if "tokens_per_s" in arm:
            rates[name] = {"rate": arm["tokens_per_s"], "unit": "tokens/s"}
        elif "pairs_per_s" in arm:
            rates[name] = {"rate": arm["pairs_per_s"], "unit": "pairs/s"}
        else:
            rates[name] = {"rate": 1 / arm["real_time"], "unit": "s of sound/s"}

    ratios = {}
    for row in found.get("ratios", []):
        what = f", {row['what']}" if "what" in row else ""
        ratios[f"{row['above']} / {row['below']}{what}"] = row["median"]
    return {
        "hardware": found["hardware"],
        "month": found["month"],
        "rates": rates,
        "ratios": ratios,
    }


def markdown(found: Mapping[str, Any], recorded: Mapping[str, Any] | None = None) -> str:
    """The results, for people, beside the recorded ones (default: those that come with the
    package)."""
    if recorded is None:
        recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    lines = [
        f"# All benchmarks in short, {found['hardware']}, {found['month']}",
        "",
        f"`zipper bench`: size {found['size']}, {found['rounds']} rounds, arms in turn (A B B A), "
        "medians.",
        "",
        "| | here | recorded | here / recorded |",
        "|---|---|---|---|",
    ]
    places = []
    for kind in ("decode", "train", "speech"):
        name = kind if kind == "speech" else f"{kind}, {found['size']}"
        there = recorded.get(name, {"rates": {}, "ratios": {}})
        if there["rates"]:
            places.append(f"{kind} on {there['hardware']}, {there['month']}")
        for name, arm in found[kind]["rates"].items():
            rate = there["rates"].get(name, {}).get("rate")
            lines.append(_line(f"{kind}: {name}, {arm['unit']}", arm["rate"], rate))
        for name, value in found[kind]["ratios"].items():
            lines.append(_line(f"{kind}: ratio {name}", value, there["ratios"].get(name)))

    said = f"Recorded: {'; '.join(places)}." if places else "Nothing was recorded at this size."
    return "\n".join([*lines, "", said]) + "\n"


def _line(what: str, here: float, there: float | None) -> str:
    compared = "- | -" if there is None else f"{there:,.2f} | {here / there:.2f}"
    return f"| {what} | {here:,.2f} | {compared} |"


def main() -> None:
    """What to record, on stdout: the digests of result files, by benchmark and size."""
    kept = {}
    for path in sys.argv[1:]:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        kept[_kind(found["settings"])] = digest(found)
    print(json.dumps(kept, indent=1))


def _kind(settings: Mapping[str, Any]) -> str:
    """Which benchmark has such settings, and at which size."""
    if "utterances" in settings:
        return "speech"
    return f"{'train' if 'pairs' in settings else 'decode'}, {settings['size']}"


if __name__ == "__main__":
    main()
