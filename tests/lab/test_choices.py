"""Requests and the choice of who answers: what is held back, the page, all of the study in
little."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from zipper.data.manifests import manifest
from zipper.saving.files import read_json
from zipper_lab import choices
from zipper_lab.corpora import asked, digits


@pytest.mark.parametrize("seed", range(5))
def test_one_wording_of_each_answer_is_held_back(seed: int) -> None:
    train, test = asked.wordings("train", seed), asked.wordings("test", seed)
    for way, number in train:
        every = {said.format(digits.WORDS[number]) for said in asked.WORDINGS[way]}
        assert len(test[way, number]) == 1 and {*train[way, number], *test[way, number]} == every
        assert not {*train[way, number]} & {*test[way, number]}
    assert train == asked.wordings("dev", seed)


def test_no_wording_and_no_voice_of_the_test_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    for name, value in {"TAKES": 6, "ROUNDS": 1}.items():
        monkeypatch.setattr(digits, name, value)
    digits.say(tmp_path / "said")
    asked.write(tmp_path / "said", tmp_path / "out")
    parts = {
        name: manifest(tmp_path / "out" / f"{name}.jsonl") for name in ("train", "dev", "test")
    }
    for part, rows in parts.items():
        for row in rows:
            assert [way for way in asked.WORDINGS if way in row] == [row["way"]]
            assert row["asked:text"] in asked.wordings(part)[row["way"], row["digit"]]
            assert (tmp_path / "out" / row["heard:speech"]).is_file()
            assert row["way"] == "text" or (tmp_path / "out" / row[row["way"]]).is_file()
    voices = {part: {_voice(row) for row in rows} for part, rows in parts.items()}
    assert voices["test"] and not voices["test"] & voices["train"]
    answered = {part: {row.get("speech") for row in rows} - {None} for part, rows in parts.items()}
    assert answered["test"] and not answered["test"] & answered["train"]
    texts = {row["text"] for row in manifest(tmp_path / "out" / "texts.jsonl")}
    assert texts.isdisjoint(row["asked:text"] for row in parts["test"])
    alone = {row["speech"] for row in manifest(tmp_path / "out" / "unpaired_speech.jsonl")}
    assert alone.isdisjoint({row["heard:speech"] for row in parts["test"]} | answered["test"])


def _voice(row: dict[str, Any]) -> str:
    return str(row["heard:speech"]).split("-")[1]


def test_the_page_tells_seeds_apart_from_an_interval() -> None:
    number = {"value": 0.98, "low": 0.96, "high": 0.99}
    shares = ["likeliest", "chosen", "free", "forced"]
    shares += [f"{way}: {which}" for way, which in product(asked.WORDINGS, ("free", "forced"))]
    one = {task: dict.fromkeys(shares, number) for task in choices.CHOICES}
    page = choices.markdown({"zip-0": one})
    assert "and then over | 98.0 % (96.0 to 99.0) | 98.0 % (96.0 to 99.0) |" in page
    other = {task: {**found, "chosen": {"value": 1.0}} for task, found in one.items()}
    page = choices.markdown({"zip-0": one, "zip-1": other})
    assert "and then over | 99.0 % (98.0 to 100.0) |" in page


@pytest.mark.slow
def test_the_study_in_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(choices, "SEEDS", (0,))
    monkeypatch.setattr(digits, "TAKES", 8)
    digits.say(tmp_path / "said")
    told = choices.run(tmp_path / "said", tmp_path / "out", share=0.002, limit=20)
    assert told == read_json(tmp_path / "out" / "measured.json")
    for task in choices.CHOICES:
        found = told["zip-0"][task]
        assert 0 <= found["free"]["value"] <= found["chosen"]["value"] <= 1
        assert {*found["confusion"]} == {*asked.WORDINGS, ""}
    assert choices.markdown(told).count("\n") == 11
