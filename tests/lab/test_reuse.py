"""What is trained once and used again: recipes that fit together, the table, all of it in little."""

from pathlib import Path
from typing import Any

import pytest

from zipper.saving.files import read_json
from zipper_lab import real, reuse
from zipper_lab.corpora import digits


def test_zips_share_the_towers_that_are_there(tmp_path: Path) -> None:
    plans = reuse.recipes(tmp_path / "data", tmp_path)
    assert [*plans][:6] == ["text", "speech", "image", "machine", "neox", "longer"]
    speech = {plans[f"zip {o}speech"].towers["speech"] for o in ("", "neox ", "longer ")}
    assert len(speech) == 1
    text = {name: plans[f"zip {name}"].towers["text"] for name in (*reuse.NICHES, reuse.ALL)}
    assert len({*text.values()}) == 1
    assert plans["zip neox speech"].towers["text"] == str(tmp_path / "neox/model/towers/text")
    assert plans["longer"].steps == 3 * plans["text"].steps
    for name in reuse.NICHES:
        zipped = plans[f"zip {name}"]
        assert zipped.train == (name,) and {*zipped.towers} == {"text", name}
        assert sum(zipped.tasks.values()) == pytest.approx(1)
    everything = plans[f"zip {reuse.ALL}"]
    assert len(everything.links or ()) == 18 and len(everything.data) == 2


def _told() -> dict[str, Any]:
    """As `run` returns it: each zip does its own tasks, the composed one all of them."""
    found: dict[str, Any] = {"steps": dict.fromkeys(reuse.recipes(Path(), Path()), 100)}
    cells: dict[str, Any] = {}
    for place, niche in enumerate(reuse.NICHES):
        cell = {"model": {"value": place / 10}, "floor": {"value": 0.1}, "oracle": {"value": 1.0}}
        own = {f"{niche} -> text": cell, f"text -> {niche}": cell}
        cells |= found.setdefault(f"zip {niche}", own)
        for other in reuse.OTHERS:
            found[f"zip {other} {niche}"] = own
            found |= {f"swap {other} {part:g}": found["zip speech"] for part in reuse.SHARES}
    across = {"speech -> text, image": {"model": {"value": 0.7}, "nats": 1.0}}
    return found | {"composed": cells | across, "zip all": cells | across}


def test_the_table_counts_what_a_row_wants_beside_what_is_there() -> None:
    told = _told()
    page = reuse.markdown(told)
    assert "| text and speech | 300 | 300 | 0% | 0% |  |  |  |  |" in page
    assert "| it in the place of the first, 10% of the steps | 110 | 300 | 0% |" in page
    assert "composed | 0 | 500 | 0% | 0% | 10% | 10% | 20% | 20% |" in page
    assert "is the same, to the bit" in page and "| composed | 70% |" in page
    told["composed"] = told["composed"] | {"text -> image": {"model": {"value": 0.5}}}
    assert not reuse.same(told)


@pytest.mark.slow
def test_the_study_in_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(digits, "TAKES", 8)
    digits.say(tmp_path / "said")
    told = reuse.run(tmp_path / "said", tmp_path / "out", share=0.002, limit=10)
    assert told == read_json(tmp_path / "out" / "measured.json") and reuse.same(told)
    assert {*told["zip speech"]} == {"speech -> text", "text -> speech"}
    assert "speech -> text, image" in told["composed"] and "machine -> text" in told["composed"]
    assert len(reuse.markdown(told).splitlines()) == 21 and real.TEXT in told["steps"]
