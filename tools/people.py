"""Few pairs of people, a zip beside one expanded decoder (`make people`); see zipper_lab.people.

Writes benchmarks/results/people_2cpu_YYYYMM.json and .md; what is trained already is only measured
again.
"""

import argparse
import subprocess
from datetime import date
from pathlib import Path

from zipper.saving.files import write_json
from zipper_lab import people

ROOT = Path(__file__).parents[1]
HEAD = """# Few pairs of people

Eighteen words, said by people that no part of the training heard: digits by two speakers of
free-spoken-digit-dataset (CC BY-SA 4.0), eight words by seven of DSPSpeech-20 (MIT). All models
first learn from a synthesiser alone. "zip": links and speech tower learn; "links": the links alone;
"lora": links and an adapter of the speech tower; "expanded": one decoder with every id in its
vocabulary and as many parameters, all of it learns. Mean over {seeds} seeds (least to most); rows
of one run have a 95 % interval. What is said is drawn at temperature 0.7 and heard by logistic
regression on units. Commit {commit}; redo: `make people DATA=FOLDER ENCODER={encoder}`.

"""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the originals")
    parser.add_argument(
        "--encoder", default="UsefulSensors/moonshine-tiny", help="of speech: hub id or folder"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/people"), help="of the runs")
    parser.add_argument("--share", type=float, default=1.0, help="of all steps (default 1)")
    given = parser.parse_args()
    told = people.run(given.data, given.encoder, given.output, given.share)
    asked = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    results = ROOT / "benchmarks" / "results" / f"people_2cpu_{date.today():%Y%m}.json"
    write_json(results, {"commit": commit, "share": given.share, "measured": told})
    head = HEAD.format(seeds=len(people.SEEDS), commit=commit, encoder=Path(given.encoder).name)
    results.with_suffix(".md").write_text(head + people.markdown(told), encoding="utf-8")
    print(results.with_suffix(".md"))


if __name__ == "__main__":
    main()
