"""The studies on people's words, each beside one expanded decoder (`make people`, `make pairwise`),
what a tower that is there is worth (`make reuse`), and whether a model answers in the modality that
was asked for (`make choices`); see zipper_lab.people, .pairwise, .reuse and .choices.

Writes benchmarks/results/STUDY_2cpu_YYYYMM.json and .md; what is trained already stays.
"""

import argparse
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

from zipper.saving.files import write_json
from zipper_lab import choices, pairwise, people, reuse

ROOT = Path(__file__).parents[1]
EXPANDED = '"expanded": one decoder with every id in its vocabulary and as many parameters'
HEADS = {
    "people": f"""# Few pairs of people

Eighteen words, said by people that no part of the training heard: digits by two speakers of
free-spoken-digit-dataset (CC BY-SA 4.0), eight words by seven of DSPSpeech-20 (MIT). All models
first have pairs of a synthesiser alone; their codebook and speech towers have heard the people of
the training too, unpaired. "zip": links and speech tower learn; "links": the links alone;
"lora": links and an adapter of the speech tower; {EXPANDED}. Mean
over seeds (least to most); numbers of one run have a 95 % interval. What is said is drawn at
temperature 0.7 and heard by logistic regression on units. The best of a run is taken by the loss on
other takes of the training's people, for all arms alike. Intervals are over clips, not people.
""",
    "pairwise": f"""# More than two from pairs alone?

Digits as words, as people say them (free-spoken-digit-dataset, CC BY-SA 4.0) and as people write
them (scikit-learn's, BSD). Trained on text beside speech and text beside pictures; speech and
pictures never met. "zip" reads the text tower's embeddings, "text read deep" what the tower made of
them; {EXPANDED}. Links
between speech and pictures are shut where nothing taught them. The share of digits that are right,
by classifiers of real ones; mean over seeds (least to most).
""",
    "reuse": """# What is trained once is used again

Digits as words, as people say them (free-spoken-digit-dataset, CC BY-SA 4.0), as people write them
(scikit-learn's, BSD) and as a synthesiser says them ("machine"). Text towers are frozen, the others
learn in their zip. "steps": of the towers and zips that a row wants beside what rows above it made;
"from nothing": if there were none. "in the place of the first": `zipper swap`; parts of links that do
not fit the new tower are born again. The share of digits that are right on new takes of known
people, by classifiers of real ones; one seed. What is made of a text is greedy, one answer for each
digit, so that its shares come in tenths.
""",
    "choices": """# Who answers?

A request names a digit and how it is wanted: written, said or drawn. It is read, or heard from a
synthesiser; the model chooses which of three towers answers (text; people's voices,
free-spoken-digit-dataset, CC BY-SA 4.0; pictures of scikit-learn, BSD) and when it is over. 300
requests: of each digit and way a wording that no training had, in voices that no training heard.
Digits are judged by classifiers of real ones, what is made is drawn at temperature 0.7. Mean over
seeds (least to most); numbers of one run have a 95 % interval.
""",
}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=HEADS)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the originals")
    parser.add_argument(
        "--encoder",
        default="UsefulSensors/moonshine-tiny",
        help="of the people's speech: hub id or folder",
    )
    parser.add_argument("--output", type=Path, help="of the runs (default runs/STUDY)")
    parser.add_argument("--share", type=float, default=1.0, help="of all steps (default 1)")
    given = parser.parse_args()
    output = given.output or Path("runs") / given.study
    if given.study == "people":
        told = people.run(given.data, given.encoder, output, given.share)
        page = people.markdown(told)
    else:
        study: Any = {"pairwise": pairwise, "reuse": reuse, "choices": choices}[given.study]
        told = study.run(given.data, output, given.share)
        page = study.markdown(told)
    asked = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    place = ROOT / "benchmarks" / "results" / f"{given.study}_2cpu_{date.today():%Y%m}.json"
    write_json(place, {"commit": commit, "share": given.share, "measured": told})
    redo = f"Commit {commit}, {given.share:g} of all steps; redo: `make {given.study} DATA=FOLDER`."
    text = f"{HEADS[given.study]}\n{redo}\n\n{page}\n"
    place.with_suffix(".md").write_text(text, encoding="utf-8")
    print(place.with_suffix(".md"))


if __name__ == "__main__":
    main()
