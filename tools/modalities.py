"""Zips of real data, each beside a zip that learns whole and one expanded decoder (`make real`).

Writes benchmarks/results/real_2cpu_YYYYMM.json and from it docs/modalities.md; what is trained
already is only measured again. Hours on two cores with all steps, see --share.
"""

import argparse
import subprocess
from datetime import date
from pathlib import Path

from zipper.saving.files import read_json, write_json
from zipper_lab import real

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "modalities.md"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the originals")
    parser.add_argument("sets", nargs="*", help=f"of {', '.join(real.SETS)} (default all)")
    parser.add_argument("--output", type=Path, default=Path("runs/real"), help="folder of the runs")
    parser.add_argument("--share", type=float, default=1.0, help="of all steps (default 1)")
    parser.add_argument("--gather", action="store_true", help="run nothing: take what was measured")
    parser.add_argument(
        "--page", action="store_true", help="only the page, from the newest results"
    )
    given = parser.parse_args()
    results = ROOT / "benchmarks" / "results"
    before = sorted(results.glob("real_2cpu_*.json"))
    told = read_json(before[-1]) if before else {}
    if not given.page:
        for part, of_sets in gathered(given).items():  # sets that were not run stay what they were
            told[part] = told.get(part, {}) | of_sets
        write_json(results / f"real_2cpu_{date.today():%Y%m}.json", told)
    PAGE.write_text(real.markdown(told), encoding="utf-8")
    print(PAGE)


def gathered(given: argparse.Namespace) -> dict[str, dict[str, object]]:
    """What was measured, and how it was made: {part: {set: ...}}."""
    found = {}
    for name in given.sets or real.SETS:
        place = given.output / name
        if not given.gather:
            real.run(name, given.data, place, given.share, which=real.ARMS)
        if (place / "measured.json").is_file():
            found[name] = read_json(place / "measured.json")
    asked = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    about = {name: real.summary(name, given.output / name) for name in found}
    return {"commits": dict.fromkeys(found, commit), "about": about, "sets": dict(found)}


if __name__ == "__main__":
    main()
