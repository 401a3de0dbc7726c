"""Few pairs of people: readers and splits on small archives, the drawing of few, the ear, and all
of the study in little."""

import io
import json
import wave
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers

from zipper.data.manifests import manifest
from zipper.errors import ZipperError
from zipper_lab import people
from zipper_lab.corpora import words

SAID = ("north", "south")


def wav(seed: int) -> bytes:
    chance, file = np.random.default_rng(seed), io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16_000)
        sound.writeframes((chance.normal(0, 3000, 6400)).astype("<i2").tobytes())
    return file.getvalue()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four people who say three digits, nine who say two words, in the form of the originals."""
    folder = tmp_path / "originals"
    folder.mkdir()
    with zipfile.ZipFile(folder / "fsdd.zip", "w") as archive:
        for place, (digit, who, take) in enumerate(np.ndindex(3, 4, 6)):
            archive.writestr(f"recordings/{digit}_p{who}_{take}.wav", wav(place))
    with zipfile.ZipFile(folder / "dspspeech20.zip", "w") as archive:
        listed = []
        for place, (word, who, take) in enumerate(np.ndindex(2, 9, 3)):
            name = f"s{who}-{word}-{take}"
            row = {"id": name, "speaker": f"s{who}", "text": SAID[word], "audio": f"a/{name}.wav"}
            listed.append(json.dumps(row))
            archive.writestr(f"a/{name}.wav", wav(1000 + place))
        archive.writestr("manifest.jsonl", "\n".join(listed))
    return folder


def test_who_is_in_the_test_is_in_no_other_part(data: Path) -> None:
    said = words.people(data)
    assert Counter(each.source for each in said) == {"digits": 72, "words": 54}
    assert said == words.people(data) != words.people(data, seed=1)
    for source, held in words.TEST.items():
        who = {
            part: {each.speaker for each in said if (each.source, each.part) == (source, part)}
            for part in ("train", "dev", "test")
        }
        assert len(who["test"]) == held and who["dev"] <= who["train"]
        assert not who["test"] & who["train"]
    assert words.vocabulary(data)[-2:] == [*SAID]
    assert said[0].audio.rate_hz == 16_000


def test_too_few_people_and_a_file_that_is_missing_are_said(data: Path) -> None:
    with zipfile.ZipFile(data / "fsdd.zip", "w") as archive:
        archive.writestr("recordings/1_one_0.wav", wav(0))
    with pytest.raises(ZipperError, match="said by 1 people; more than 2 are wanted"):
        words.people(data)
    with zipfile.ZipFile(data / "dspspeech20.zip", "a") as archive:
        archive.writestr("b/manifest.jsonl", json.dumps({"audio": "none.wav"}))
    with zipfile.ZipFile(data / "dspspeech20.zip", "w") as archive:
        row = {"id": "1", "speaker": "a", "text": "north", "audio": "none.wav"}
        archive.writestr("b/manifest.jsonl", json.dumps(row))
    with pytest.raises(ZipperError, match=r"lacks none\.wav"):
        words.vocabulary(data)


def test_few_pairs_have_each_word_as_often_as_can_be() -> None:
    rows = [{"text": "abc"[place % 3 if place < 9 else 0], "n": place} for place in range(30)]
    some = people.few(rows, 6, seed=0)
    assert Counter(row["text"] for row in some) == {"a": 2, "b": 2, "c": 2}
    assert some == people.few(rows, 9, 0)[:6] and some != people.few(rows, 6, 1)
    assert len(people.few(rows, 0, 0)) == 30


def test_the_ear_knows_words_by_their_units_and_their_order() -> None:
    pytest.importorskip("sklearn")
    chance = np.random.default_rng(0)
    rows = [
        {"text": word, "speech": [first, second, *chance.integers(10, 20, 3).tolist()]}
        for word, (first, second) in {"ab": (1, 2), "ba": (2, 1), "c": (3, 3)}.items()
        for _ in range(40)
    ]
    ear = people.Ear.trained(rows[::2])
    assert ear.heard([row["speech"] for row in rows[1::2]]) == [row["text"] for row in rows[1::2]]
    assert ear.heard([[], [99]])[0] in {"ab", "ba", "c"}


@pytest.mark.slow
def test_the_study_in_little(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    sizes = tiny.MOONSHINE | {"encoder_num_hidden_layers": 5}
    network = transformers.MoonshineModel(transformers.MoonshineConfig(**sizes))
    network.save_pretrained(tmp_path / "encoder")
    small = {"FITTED": 40, "CODES": 20, "SEEDS": (0,), "PAIRS": (5, 0), "LIMIT": 8, "SHIFTED": 4}
    for name, value in small.items():
        monkeypatch.setattr(people, name, value)
    monkeypatch.setattr(words, "VOICES", ("en-us+m1",))
    monkeypatch.setattr(words, "PITCHES", (40,))
    told = people.run(data, str(tmp_path / "encoder"), tmp_path / "out", share=0.002)
    assert told == people.run(data, str(tmp_path / "encoder"), tmp_path / "out", share=0.002)
    arms = {f"{arm}-{pairs}-0" for arm in people.ARMS for pairs in (5, 0)}
    assert {*told} == {"zip", "expanded", "shifted"} | arms
    for name in arms:
        assert {*told[name]} == {"asr", "tts", "oracle"}
        assert all(0 <= rate["value"] <= 1 for rate in told[name]["asr"].values())
    assert len(manifest(tmp_path / "out" / "data" / "few" / "5-0.jsonl")) == 5
    page = people.markdown(told)
    assert "| 5 |" in page and "| all |" in page and "disturbed by" in page
