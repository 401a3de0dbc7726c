"""More than two modalities from pairs: links between speech and pictures act in triples alone, and
all of the study in little."""

from pathlib import Path
from typing import Any

import pytest

from zipper.data.manifests import manifest
from zipper.link import LinkConfig
from zipper.model import Zipper
from zipper.saving.files import read_json
from zipper.testing import tiny_tower
from zipper_lab import pairwise, real
from zipper_lab.corpora import digits

OPEN = LinkConfig(gate_init=1.0)


def test_what_no_pair_teaches_lies_between_speech_and_pictures(tmp_path: Path) -> None:
    plans = pairwise.recipes(tmp_path / "data", tmp_path, seed=2)
    assert [*plans] == ["text", "speech", "image", *pairwise.ARMS]
    for arm in (pairwise.ZIP, pairwise.DEEP):
        links = plans[arm].links or ()
        across = [link for link in links if "text" not in (link[0], link[2])]
        assert len(across) == 6 and len(links) == 18
        assert not any("speech" in task and "image" in task for task in plans[arm].tasks)
        shown = {depth for source, depth, *_ in links if source == "text"}
        assert shown == ({0} if arm == pairwise.ZIP else {1, 2, 3})
    assert not plans[pairwise.EXPANDED].links and plans[pairwise.EXPANDED].seed == 2


def test_links_that_nothing_taught_are_shut_and_no_others() -> None:
    towers = {
        name: tiny_tower("llama", seed) for seed, name in enumerate(("text", "speech", "image"))
    }
    ends = dict.fromkeys(towers, (0, 1))
    model = Zipper.from_towers(towers, every=dict.fromkeys(towers, 1), ends=ends, link=OPEN)
    pairwise.closed(model)
    gates = {n: p.item() for n, p in model.links.named_parameters() if "gate" in n}
    assert len(gates) > 6 and {n for n, gate in gates.items() if gate == 0} == {
        n for n in gates if "text" not in n
    }


def test_the_page_has_each_way_beside_its_bounds() -> None:
    rate = {"model": {"value": 0.5}, "floor": {"value": 0.1}, "oracle": {"value": 0.9}}
    tasks = pairwise.AT_ONCE + pairwise.WRITTEN + pairwise.SILENT
    told = {f"zip-{seed}": {"known": dict.fromkeys(tasks, rate)} for seed in (0, 1)}
    told["zip-1-10"] = {"known": {"speech -> image": rate | {"model": {"value": 0.75}}}}
    page = pairwise.markdown(told)
    assert "| at once | 50 % (50 to 50) |  |  |" in page
    assert "| at once, 10 triples | 75 % |  |  |" in page
    assert "| floor, oracle | 10 % (10 to 10), 90 % (90 to 90) | | |" in page


@pytest.mark.slow
def test_the_study_in_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    small: dict[str, Any] = {"SEEDS": (0,), "TRIPLES": (1, 0)}
    for name, value in small.items():
        monkeypatch.setattr(pairwise, name, value)
    monkeypatch.setattr(digits, "TAKES", 8)
    digits.say(tmp_path / "said")
    told = pairwise.run(tmp_path / "said", tmp_path / "out", share=0.002, limit=10)
    assert told == read_json(tmp_path / "out" / "measured.json")
    assert {*told} == {"zip-0", "deep-0", "expanded-0"} | {
        f"{arm}-0-{n}" for arm in ("zip", "expanded") for n in (1, 0)
    }
    assert {*told["zip-0"]["test"]} == {*pairwise.AT_ONCE, *pairwise.WRITTEN, *pairwise.SILENT}
    assert {*told["zip-0-1"]["test"]} == {*pairwise.AT_ONCE}
    assert len(manifest(tmp_path / "out" / "data" / "triples" / "1-0.jsonl")) == 1
    assert "text read deep" in pairwise.markdown(told) and real.SETS["digits"].tasks
