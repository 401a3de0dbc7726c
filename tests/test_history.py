"""History: the summary and the page say what the rows of metrics say, of old runs and of new
ones."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from zipper import cli
from zipper.errors import ZipperError
from zipper.training.history import History, curves, text, write


def run_of(folder: Path, rows: list[dict[str, Any]], half_written: str = "", **recipe: Any) -> Path:
    """A folder as training leaves it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(recipe))
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + half_written
    )
    return folder


#: Six steps; the first process was killed after step 4, the second went on from there.
ROWS: list[dict[str, Any]] = [
    {
        "step": 2,
        "loss/text": 3.0,
        "lr": 0.1,
        "grad_norm": 1.0,
        "grad/gates": 0.2,
        "tokens_per_s": 100.0,
        "matmul_share": 0.2,
    },
    {"step": 3, "dev/speech -> text": 2.0, "dev/text -> speech": 4.0, "branch/0:text>speech": 0.01},
    {
        "step": 4,
        "loss/text": 2.0,
        "lr": 0.2,
        "grad_norm": 2.0,
        "grad/gates": 0.4,
        "tokens_per_s": 300.0,
        "matmul_share": 0.4,
    },
    {
        "step": 6,
        "loss/text": 1.0,
        "lr": 0.1,
        "grad_norm": 3.0,
        "grad/gates": 0.6,
        "tokens_per_s": 200.0,
        "matmul_share": 0.3,
    }
    | {
        "gate/0:text>speech": 0.5,
        "dev/speech -> text": 2.5,
        "dev/text -> speech": 4.5,
        "branch/0:text>speech": 0.03,
    },
]
TIMES: list[dict[str, Any]] = [{"started": 0, "seconds": 10.0}] * 2 + [
    {"started": 0, "seconds": 60.0},
    {"started": 4, "seconds": 5.0},
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rows = [row | time for row, time in zip(ROWS, TIMES, strict=True)]
    return run_of(
        tmp_path / "run <1>", rows, '{"step": 8, "lo', steps=10, data="pairs & more.jsonl"
    )


def test_the_summary_says_what_the_rows_say(run: Path) -> None:
    assert History.read(run).summary() == {
        "folder": str(run),
        "step": 6,
        "steps": 10,
        "best": {"step": 3, "mean": 3.0, "dev": {"speech -> text": 2.0, "text -> speech": 4.0}},
        "loss": {"text": 1.0},
        "dev": {"speech -> text": 2.5, "text -> speech": 4.5},
        "gates": {"0:text>speech": 0.5},
        "branches": {"0:text>speech": 0.03},
        "resumed": [4],
        "seconds": 65.0,
        "tokens_per_s": 200.0,
        "matmul_share": 0.3,
    }


def test_a_dev_loss_that_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    rows = [{"step": 2, "dev/-> text": math.nan}, {"step": 4, "dev/-> text": 1.0}]
    found = History.read(run_of(tmp_path / "run", rows, "", steps=4)).summary()
    assert found["best"] == {"step": 4, "mean": 1.0, "dev": {"-> text": 1.0}}


def test_the_text_says_it_to_people(run: Path) -> None:
    said = text(History.read(run).summary())
    for part in (
        "step 6 of 10",
        "step 3, dev loss 3.0000",
        "1 min 5 s",
        "200 tokens/s, 30% of the machine",
        "resumed     at step 4",
    ):
        assert part in said


def test_rows_of_an_older_run_lack_some_keys_and_nothing_else_is_lost(tmp_path: Path) -> None:
    old = run_of(tmp_path / "old", [{"step": 2, "loss/text": 3.0}])
    found = History.read(old).summary()
    assert [key for key, value in found.items() if value is None] == [
        "steps",
        "best",
        "seconds",
        "tokens_per_s",
        "matmul_share",
    ]
    assert "time        not recorded" in text(found)
    write(tmp_path / "page.html", History.read(old))
    assert "training loss, nats per token" in (tmp_path / "page.html").read_text()


def test_every_kind_of_row_has_its_panel(run: Path) -> None:
    history = History.read(run)
    panels = history.panels()
    assert panels == {
        "training loss, nats per token": {"text": ([2, 4, 6], [3.0, 2.0, 1.0])},
        "dev loss, nats per token": {
            "speech -> text": ([3, 6], [2.0, 2.5]),
            "text -> speech": ([3, 6], [4.0, 4.5]),
        },
        "learning rate of the first group": {"": ([2, 4, 6], [0.1, 0.2, 0.1])},
        "gradient norm": {
            "all": ([2, 4, 6], [1.0, 2.0, 3.0]),
            "gates": ([2, 4, 6], [0.2, 0.4, 0.6]),
        },
        "gate |tanh|, speech reads text": {"junction 0": ([6], [0.5])},
        "share of the stream that links add, speech reads text": {
            "junction 0": ([3, 6], [0.01, 0.03])
        },
        "tokens per second": {"": ([2, 4, 6], [100.0, 300.0, 200.0])},
        "share of the machine's matmul rate": {"": ([2, 4, 6], [0.2, 0.4, 0.3])},
    }
    drawn = curves(history)
    assert all(f">{title}</text>" in drawn for title in panels if "'" not in title)


def test_the_page_stands_alone_and_escapes_what_it_names(run: Path, tmp_path: Path) -> None:
    write(tmp_path / "page.html", History.read(run))
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!doctype html>")
    assert page.endswith("</main></body></html>\n")
    assert "The run run &lt;1&gt;" in page
    assert "pairs &amp; more.jsonl" in page
    assert "resumed at 4" in page
    assert "$" not in page.partition("<main>")[0]  # every hole of the template is filled
    assert "src=" not in page
    assert 'href="http' not in page
    assert not list(tmp_path.glob("*.part"))


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ZipperError, match="holds no metrics yet"):
        History.read(run_of(tmp_path / "new", []))
    broken = run_of(tmp_path / "broken", [{"step": 1}])
    (broken / "metrics.jsonl").write_text('{"step"\n{"step": 2}\n')
    with pytest.raises(ZipperError, match="line 1 is no row of metrics"):
        History.read(broken)


def test_show_writes_the_page_of_a_run_beside_it_or_where_it_is_told(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["show", str(run)]) == 0
    assert f"page        {run / 'run.html'}" in capsys.readouterr().out
    assert (run / "run.html").is_file()
    elsewhere = run.parent / "pages" / "mine.html"
    assert cli.main(["show", str(run), "-o", str(elsewhere), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["page"] == str(elsewhere)
    assert elsewhere.is_file()
