"""Modalities of one's own: saved, loaded, and named where they are unknown."""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny

from zipper import Pipeline, Segment, modality
from zipper.errors import ZipperError
from zipper.link import LinkConfig
from zipper.modality.text import Text
from zipper.model import Zipper
from zipper.testing import tiny_tower


class Levels:
    """Numbers from 0 to 15."""

    name, begin, end, vocabulary = "levels", 16, 17, 18
    fingerprint = hashlib.sha256(b"levels").hexdigest()

    def encode(self, raw: Sequence[int]) -> list[int]:
        return [int(i) for i in raw]

    def decode(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i < 16]

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "levels.json").write_text("{}")

    @classmethod
    def load(cls, folder: str | Path) -> "Levels":
        assert (Path(folder) / "levels.json").is_file()
        return cls()


@pytest.fixture(autouse=True)
def nothing_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modality, "_registered", {})


def zipped() -> Pipeline:
    modalities: dict[str, Any] = {"text": tiny.text(), "image": Levels()}
    towers, ends = {}, {}
    for name, each in modalities.items():
        towers[name] = tiny_tower("llama", vocabulary=each.vocabulary)
        ends[name] = each.begin, each.end
    link = LinkConfig(head_width=16)
    return Pipeline(Zipper.from_towers(towers, train=("image",), ends=ends, link=link), modalities)


def test_a_modality_of_ones_own_is_saved_and_loaded(tmp_path: Path) -> None:
    pipe = zipped()
    pipe.save_pretrained(tmp_path / "zip", include=["text"])
    again = Pipeline.from_pretrained(tmp_path / "zip")
    assert isinstance(again.modalities["image"], Levels)
    given, limits = [Segment("image", [1, 2, 3])], {"text": 3}
    assert again.run(given, ["text"], limits=limits) == pipe.run(given, ["text"], limits=limits)


def test_a_kind_that_nobody_knows_is_named_with_what_helps(tmp_path: Path) -> None:
    modality.save(Levels(), tmp_path / "levels")
    wanted = (
        r"a modality of the kind 'levels', .*zipper.modalities\), or call zipper.modality.register"
    )
    with pytest.raises(ZipperError, match=wanted):
        modality.load(tmp_path / "levels")
    modality.register(Levels)
    assert isinstance(modality.load(tmp_path / "levels"), Levels)


def test_an_installed_package_declares_its_kinds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As pip leaves it: a module and metadata with an entry point."""
    site = tmp_path / "site"
    (site / "levels_kind-1.0.dist-info").mkdir(parents=True)
    (site / "levels_kind-1.0.dist-info" / "METADATA").write_text(
        "Name: levels-kind\nVersion: 1.0\n"
    )
    (site / "levels_kind-1.0.dist-info" / "entry_points.txt").write_text(
        "[zipper.modalities]\nlevels = levels_kind:Levels\n"
    )
    (site / "levels_kind.py").write_text("from test_modality import Levels as Levels\n")
    monkeypatch.syspath_prepend(site)
    modality.save(Levels(), tmp_path / "levels")
    assert isinstance(modality.load(tmp_path / "levels"), Levels)
    sys.modules.pop("levels_kind", None)


def test_what_is_shipped_keeps_its_name_and_is_known_by_its_files(tmp_path: Path) -> None:
    class Other(Levels):
        name = "text"

    modality.register(Other)
    modality.save(tiny.text(), tmp_path / "text")
    assert not (tmp_path / "text" / modality.KIND).exists()
    assert isinstance(modality.load(tmp_path / "text"), Text)
    (tmp_path / "text" / modality.KIND).write_text('{"kind": "text"}')
    assert isinstance(modality.load(tmp_path / "text"), Text)


def test_a_kind_is_found_by_its_name() -> None:
    for name in modality.SHIPPED_KINDS:
        assert modality.kind(name).name == name
    with pytest.raises(ZipperError, match=r"kind of modality 'levels' .* known are text, speech, "):
        modality.kind("levels")
    modality.register(Levels)
    assert modality.kind("levels") is Levels


@pytest.mark.parametrize("kind", [None, 3, ["text"], "os", "zipper.modality.text:Text", "../text"])
def test_a_folder_names_no_code(kind: Any, tmp_path: Path) -> None:
    modality.save(tiny.text(), tmp_path / "text")
    (tmp_path / "text" / modality.KIND).write_text(json.dumps({"kind": kind}))
    with pytest.raises(ZipperError, match="which nothing here knows"):
        modality.load(tmp_path / "text")
