"""Modalities of one's own: saved, loaded, and named where they are unknown."""

import hashlib
import importlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny

from zipper import Pipeline, Segment, modality
from zipper.cli import main
from zipper.data import fitting
from zipper.errors import ZipperError
from zipper.link import LinkConfig
from zipper.modality.symbols import Symbols
from zipper.modality.text import Text
from zipper.model import Zipper
from zipper.testing import tiny_tower

TEMPLATE = Path(__file__).parents[1] / "docs" / "template" / "dice.py"


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
        assert modality.of_kind(name).name == name
    with pytest.raises(ZipperError, match=r"kind of modality 'levels' .* known are text, speech, "):
        modality.of_kind("levels")
    modality.register(Levels)
    assert modality.of_kind("levels") is Levels


@pytest.mark.parametrize("kind", [None, 3, ["text"], "os", "zipper.modality.text:Text", "../text"])
def test_a_folder_names_no_code(kind: Any, tmp_path: Path) -> None:
    modality.save(tiny.text(), tmp_path / "text")
    (tmp_path / "text" / modality.KIND).write_text(json.dumps({"kind": kind}))
    with pytest.raises(ZipperError, match="which nothing here knows"):
        modality.load(tmp_path / "text")


# --- the template


@pytest.fixture
def dice(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The template, as somebody's module."""
    monkeypatch.syspath_prepend(str(TEMPLATE.parent))
    yield importlib.import_module("dice").Dice
    sys.modules.pop("dice", None)


def test_the_template_keeps_the_laws_and_is_fitted_from_the_command_line(
    dice: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modality.register(dice)
    assert dice().decode(dice().encode("3146")) == "3146"
    assert dice(4).fingerprint != dice().fingerprint
    with pytest.raises(ZipperError, match="'37' was given; give rolls as digits"):
        dice().encode("37")
    assert main(["fit", "dice", "--example", str(tmp_path / "example")]) == 0
    assert "zipper fit dice" in capsys.readouterr().out
    rolls = str(tmp_path / "example" / "manifest.jsonl")
    assert main(["fit", "dice", rolls, "-o", str(tmp_path / "fit"), "--set", "sides=8"]) == 0
    loaded = modality.load(tmp_path / "fit")
    assert (type(loaded), loaded.vocabulary) == (dice, 10)
    folder = str(tmp_path / "example")
    assert main(["fit", "dice", folder, "-o", str(tmp_path / "same"), "--set", "sides=8"]) == 0
    assert modality.load(tmp_path / "same").fingerprint == loaded.fingerprint


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fit", "dice", "-o", "out"], "fit wants DATA and -o FOLDER"),
        (["fit", "dise", "x", "-o", "out"], "'dise' was asked for, which nothing here knows"),
        (["fit", "dice", "rows.jsonl", "-o", "out"], "the fields \\['dices'\\], 'dice' was wanted"),
        (
            ["fit", "dice", "rows.jsonl", "-o", "out", "--field", "dices", "--set", "side=3"],
            "'side'",
        ),
        (["fit", "dice", "empty", "-o", "out"], "There are no data in empty"),
        (["fit", "dice", "--example", "empty"], "empty exists"),
        (["fit", "text", "--example", "new"], "has no example"),
    ],
)
def test_what_cannot_be_fitted_is_said(
    words: list[str],
    said: str,
    dice: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    modality.register(dice)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"dices": "12"}\n')
    assert main(words) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_paths_of_a_manifest_are_those_beside_it(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"1")
    (tmp_path / "rows.jsonl").write_text(
        '{"x": "a.bin"}\n{"x": {"path": "b.bin", "start": 1}}\n{"x": [1, 2]}\n{"x": "gone"}\n'
    )
    assert fitting.values_of(tmp_path / "rows.jsonl", "x") == [
        tmp_path / "a.bin",
        {"path": str(tmp_path / "b.bin"), "start": 1},
        tmp_path / "gone",
    ]
    assert fitting.values_of(tmp_path, "x") == [tmp_path / "a.bin", tmp_path / "rows.jsonl"]


def test_a_string_of_text_is_never_the_name_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "C").write_text("secret")
    (tmp_path / "rows.jsonl").write_text('{"symbols": "C"}\n')
    fitted = fitting.fit(Symbols, [tmp_path / "rows.jsonl"])
    assert isinstance(fitted, Symbols)
    assert fitted.encode("C") and "s" not in fitted.symbols
    (tmp_path / "rows.jsonl").rename(tmp_path / "rows.JSONL")
    again = fitting.fit(Symbols, [tmp_path / "rows.JSONL"])
    assert again.fingerprint == fitted.fingerprint
    (tmp_path / "rows.JSONL").rename(tmp_path / "rows.json")
    with pytest.raises(ZipperError, match=r"end in \.jsonl"):
        fitting.fit(Symbols, [tmp_path / "rows.json"])


def test_a_modality_that_defines_no_more_than_ids_has_defaults_for_the_rest() -> None:
    level = modality.whole(Levels())
    assert level.encode([3]) == [3] and level.vocabulary == 18
    assert level.scores([[1], [2]], [[1], [3]]) == {"exact": [(1.0, 1.0), (0.0, 1.0)]}
    assert [*level.stream([4, 5])] == [[4, 5]]
    assert level.html([1, 2]) == "<span>[1, 2]</span>"
    assert not level.says_nothing([]) and level.files("x") == [] and level.about() == {}
    with pytest.raises(ZipperError, match="nothing to fit in the kind 'levels'"):
        fitting.fit(Levels, [])
