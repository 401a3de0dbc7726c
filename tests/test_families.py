"""The survey of decoders: a sample every time, all of them when there are minutes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from zipper import environment
from zipper.cli import main
from zipper.errors import ZipperError
from zipper.tower import Strand, Tower
from zipper.towers import families
from zipper.towers.families import Family

PAGE = (Path(__file__).parent.parent / "docs" / "towers.md").read_text(encoding="utf-8")
# Names that all supported transformers know, with the way and the rows that we want of them.
SAMPLE = {
    "imagegpt": ("attributes", "packed"),
    "llama": ("attributes", "packed"),
    "bart": ("attributes", "packed"),
    "gemma3": ("attributes", "packed"),
    "gpt_neo": ("attributes", "padded"),
    "granite": ("attributes", "packed"),
    "mixtral": ("attributes", "packed"),
    "bloom": ("recorded", "packed"),
    "roberta": ("recorded", "packed"),
    "mpt": ("recorded", "padded"),
    "bigbird_pegasus": ("recorded", "unpadded"),
    "mamba": ("refused", None),
    "prophetnet": ("refused", None),
    "jamba": ("refused", None),
}


@pytest.fixture(scope="module")
def sample() -> list[Family]:
    with pytest.MonkeyPatch.context() as patch:  # the page doubts no version, whatever is here
        patch.setattr(environment, "moved", lambda: "")
        return families.survey(SAMPLE)


def documented() -> dict[str, tuple[str, ...]]:
    """name -> (class, way, rows), or (reason,) where it is refused."""
    rows = [row.split(" | ") for row in re.findall(r"^\| (.+) \|$", PAGE, re.MULTILINE)]
    return {name: tuple(rest) for name, *rest in rows if name != "name"}


def test_the_sample_goes_the_ways_we_want_and_differs_in_no_bit(sample: list[Family]) -> None:
    assert {family.name: (family.way, family.rows) for family in sample} == SAMPLE
    assert all(family.difference == 0.0 for family in sample if family.way != "refused")
    assert all(
        family.reason.startswith(family.model) for family in sample if family.way == "refused"
    )


@pytest.mark.skipif(
    f"transformers {transformers.__version__} " not in PAGE,
    reason="the page was made with another transformers",
)
def test_the_page_says_what_is_found(sample: list[Family]) -> None:
    page = documented()
    assert sorted(page) == families.names()
    for family in sample:
        assert page[family.name] == (
            (family.reason,) if family.way == "refused" else (family.model, family.way, family.rows)
        )
    ways = [rest[1] if len(rest) > 1 else "refused" for rest in page.values()]
    assert families.counted([Family("", "", way) for way in ways]) in PAGE  # type: ignore[arg-type]


def test_a_tower_that_is_wrong_by_a_little_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = Tower(families.tiny("llama"))
    assert families.difference(tower) == 0.0
    right = Tower.unembed
    monkeypatch.setattr(Tower, "unembed", lambda self, h: right(self, h) + 1e-3)
    assert families.difference(tower) == pytest.approx(1e-3, rel=1e-2)


def test_what_goes_wrong_in_building_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(families.SPECIAL, "llama", {"hidden_size": 31})
    family = families.tried("llama")
    assert family.way == "refused"
    assert family.reason.startswith("No tiny model of it can be built: ")


def test_no_norm_is_the_identity_and_no_bias_is_zero() -> None:
    for name in ("gpt2", "bloom", "gemma2"):
        model = families.tiny(name)
        for parameter in model.parameters():
            assert parameter.std() > 0.01
        assert torch.equal(
            *(families.tiny(name, seed=3).state_dict()["lm_head.weight"] for _ in range(2))
        )


def test_the_command_prints_text_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["towers", "llama", "mamba"]) == 0
    said = capsys.readouterr().out
    assert "llama                    attributes  reads packed rows, difference 0.0" in said
    assert (
        "MambaForCausalLM cannot be a tower: of what it has read it keeps more than keys and values"
        in said
    )
    assert "Of 2 names 1 can be towers" in said
    assert main(["towers", "mpt", "--json"]) == 0
    (mpt,) = json.loads(capsys.readouterr().out)
    assert (mpt["way"], mpt["rows"], mpt["difference"]) == ("recorded", "padded", 0.0)
    assert main(["towers", "no_such_model"]) == 2
    with pytest.raises(ZipperError, match="no_such_model"):
        families.survey(["no_such_model"])


@pytest.mark.slow
def test_no_name_of_the_mapping_is_silently_wrong() -> None:
    """All names, and of the accepted ones every kind of row that they say they read, against each
    document alone."""
    found = families.survey()
    accepted = [family for family in found if family.way != "refused"]
    assert [family.name for family in accepted if family.difference != 0.0] == []
    assert all(len(family.reason) > 20 for family in found if family.way == "refused")
    for family in accepted:
        assert gap(families.tiny(family.name), family.rows) < 1e-3, family
    if transformers.__version__ >= "5.23":
        assert len([family for family in found if family.way == "attributes"]) >= 97
        assert len(accepted) >= 125
        assert families.markdown(found) == PAGE


@torch.no_grad()
def gap(model: Any, rows: Any) -> float:
    """The largest difference between documents in rows of this kind and the same documents alone,
    relative to the logits."""
    layouts = {
        "unpadded": [[0] * 20, [0] * 13 + [-1] * 7],
        "padded": [[-1] * 7 + [0] * 13, [-1] * 3 + [0] * 14 + [-1] * 3],
        "packed": [[0] * 6 + [1] * 14, [-1] * 2 + [3] * 9 + [-1] * 4 + [3] * 2 + [5] * 3],
    }
    layout = torch.tensor(layouts[rows])
    ids = torch.randint(3, 97, layout.shape, generator=torch.Generator().manual_seed(5))
    logits, worst = Tower(model)(Strand.alone(ids, layout)), 0.0
    for row, documents in enumerate(layout):
        for document in documents[documents >= 0].unique():
            mine = documents == document
            alone = model(ids[row, mine][None]).logits[0]
            worst = max(worst, float((logits[row, mine] - alone).abs().max() / alone.abs().max()))
    return worst
