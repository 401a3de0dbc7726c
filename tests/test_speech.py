"""Speech units: the codes are the nearest centroids, loudness and rate do not matter, a foreign codebook is found out."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy.spatial.distance import cdist

from zipper import audio, modality
from zipper.audio import Audio, Mel
from zipper.errors import ZipperError
from zipper.modality import Modality
from zipper.modality.speech import AHEAD, SpeechUnits, UnitsConfig, kmeans, nearest, stacked


def babble(seed: int, seconds: float = 2.0, rate_hz: int = 16_000) -> Audio:
    """Noise whose colour changes every tenth of a second."""
    chance = np.random.default_rng(seed)
    tenth = rate_hz // 10
    parts = []
    for _ in range(int(seconds * 10)):
        centre, spectrum = chance.uniform(200, 5000), np.fft.rfft(chance.standard_normal(tenth))
        hertz = np.fft.rfftfreq(tenth, 1 / rate_hz)
        parts.append(np.fft.irfft(spectrum * np.exp(-(((hertz - centre) / 400) ** 2)), tenth))
    sound = np.concatenate(parts)
    return Audio((0.3 * sound / np.abs(sound).max()).astype(np.float32), rate_hz)


CONFIG = UnitsConfig(voices=("low", "high"), fitted_on="babble")
UNITS = SpeechUnits.fit([Mel().picture(babble(seed)) for seed in range(8)], codes=24, config=CONFIG, steps=20)


def test_ids_are_codes_then_begin_end_and_the_voices() -> None:
    assert isinstance(UNITS, Modality)
    assert (UNITS.begin, UNITS.end, UNITS.voice_id("low"), UNITS.voice_id("high"), UNITS.vocabulary) == (24, 25, 26, 27, 28)
    with pytest.raises(ZipperError, match=r"no voice 'alto'. Take one of low, high"):
        UNITS.voice_id("alto")


def test_there_are_25_units_a_second_and_the_last_may_be_short() -> None:
    assert UNITS.config.units_per_s == 25
    for samples, units in [(0, 0), (1, 1), (640, 1), (641, 2), (16_000, 25)]:
        codes = UNITS.encode(Audio(babble(0).samples[:samples], 16_000))
        assert len(codes) == units
        assert all(0 <= code < 24 for code in codes)


def test_a_code_is_the_centroid_nearest_to_its_four_frames() -> None:
    sound = babble(99)
    frames = UNITS.log_mel(sound).reshape(-1, 4 * 40)  # 2 s are 50 whole units
    assert UNITS.encode(sound) == cdist(frames, UNITS.codebook).argmin(axis=1).tolist()


def test_loudness_and_rate_do_not_matter(tmp_path: Path) -> None:
    sound = babble(5)
    codes = UNITS.encode(sound)
    quiet = UNITS.encode(replace(sound, samples=sound.samples * np.float32(0.01)))
    assert np.mean(np.array(codes) == np.array(quiet)) > 0.98
    faster = UNITS.encode(sound.resample(44_100))
    assert len(faster) == len(codes)
    assert np.mean(np.array(codes) == np.array(faster)) > 0.9
    audio.write(tmp_path / "a.wav", sound)
    assert np.mean(np.array(codes) == np.array(UNITS.encode(tmp_path / "a.wav"))) > 0.98


def test_codes_become_sound_that_has_those_codes() -> None:
    codes = UNITS.encode(babble(3))
    sound = UNITS.decode([UNITS.voice_id("high"), UNITS.begin, *codes, UNITS.end])  # only the codes sound
    assert (sound.rate_hz, len(sound.samples)) == (16_000, 640 * len(codes))
    assert np.mean(np.array(UNITS.encode(sound)) == np.array(codes)) > 0.7
    assert len(UNITS.decode([]).samples) == 0


@pytest.mark.parametrize("chunk", [1, 7, 10, 60])
def test_sound_made_in_parts_is_as_long_and_as_close_as_the_whole(chunk: int) -> None:
    codes = UNITS.encode(babble(3))
    parts = list(UNITS.stream([UNITS.begin, *codes, UNITS.end], chunk))
    assert [len(part.samples) for part in parts[:-1]] == [640 * chunk] * (len(parts) - 1)
    sound = Audio(np.concatenate([part.samples for part in parts]), 16_000)
    assert len(sound.samples) == 640 * len(codes)

    def error(sound: Audio) -> float:
        return float(np.abs(UNITS.log_mel(sound) - UNITS.codebook[codes].reshape(-1, 40)).mean())

    assert error(sound) < 1.15 * error(UNITS.decode(codes))
    steps = np.abs(np.diff(sound.samples))  # where parts meet there are no clicks
    joins = steps[640 * chunk - 1 :: 640 * chunk]
    assert len(joins) == 0 or joins.mean() < 1.5 * steps.mean()


def test_the_first_part_of_a_stream_comes_before_the_last_code_is_known() -> None:
    told = []

    def codes() -> Iterator[int]:
        for code in range(20):
            told.append(code)
            yield code

    next(UNITS.stream(codes(), chunk=5))
    assert len(told) == 5 + AHEAD
    assert list(UNITS.stream([])) == []
    with pytest.raises(ZipperError, match="parts of 0 codes"):
        next(UNITS.stream([1], chunk=0))


def test_codes_heard_in_parts_are_nearly_those_of_the_whole() -> None:
    sound = babble(4, seconds=3)
    for length in (1_000, 3_333, 48_000):
        parts = [Audio(sound.samples[start : start + length], 16_000) for start in range(0, 48_000, length)]
        heard = list(UNITS.listen(parts))
        assert len(heard) == len(parts) + 1
        assert sum(map(len, heard[:-1])) == len(UNITS.encode(sound)) - AHEAD
        flat = [code for part in heard for code in part]
        assert len(flat) == len(UNITS.encode(sound))
        assert np.mean(np.array(flat) == np.array(UNITS.encode(sound))) > 0.9
    with pytest.raises(ZipperError, match="8000 Hz came behind sound of 16000 Hz"):
        list(UNITS.listen([sound, Audio(sound.samples, 8_000)]))


def test_kmeans_finds_clusters_that_are_there() -> None:
    chance = np.random.default_rng(0)
    centres = chance.uniform(-10, 10, (7, 5)).astype(np.float32)
    points = (np.repeat(centres, 200, axis=0) + 0.05 * chance.standard_normal((1400, 5))).astype(np.float32)
    found = kmeans(points, codes=7, seed=1, steps=10)
    distance = cdist(centres, found)
    assert sorted(distance.argmin(axis=1)) == list(range(7))
    assert distance.min(axis=1).max() < 0.02
    np.testing.assert_array_equal(found, kmeans(points, codes=7, seed=1, steps=10))
    np.testing.assert_array_equal(nearest(points, found), cdist(points, found).argmin(axis=1))


def test_too_little_sound_for_so_many_codes_is_refused() -> None:
    for pictures in ([], [np.zeros((400, 40), np.float32)]):
        with pytest.raises(ZipperError, match="too few, or too alike, for 24 codes"):
            SpeechUnits.fit(pictures, codes=24)


def test_the_last_unit_is_filled_up_with_its_last_frame() -> None:
    picture = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.testing.assert_array_equal(stacked(picture, 2), [[0, 1, 2, 3], [4, 5, 4, 5]])


def test_saved_units_are_the_same_units(tmp_path: Path) -> None:
    UNITS.save(tmp_path)
    for back in (SpeechUnits.load(tmp_path), modality.load(tmp_path)):
        assert isinstance(back, SpeechUnits)
        assert (back.fingerprint, back.config) == (UNITS.fingerprint, UNITS.config)
        assert back.encode(babble(1)) == UNITS.encode(babble(1))
    other = SpeechUnits(UNITS.codebook, replace(CONFIG, fitted_on="something else"))
    assert other.fingerprint != UNITS.fingerprint


def test_a_foreign_codebook_is_found_out(tmp_path: Path) -> None:
    UNITS.save(tmp_path)
    save_file({"codebook": UNITS.codebook[::-1].copy()}, tmp_path / "codebook.safetensors")
    with pytest.raises(ZipperError, match=r"foreign codebook.*Restore both files"):
        SpeechUnits.load(tmp_path)


def test_damaged_units_are_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ZipperError, match="holds no speech units"):
        SpeechUnits.load(tmp_path)
    UNITS.save(tmp_path)
    described = json.loads((tmp_path / "units.json").read_text())
    for change in ({"mel": {"colour": "red"}}, {"voices": None}, {"stack": 3}):
        (tmp_path / "units.json").write_text(json.dumps(described | change))
        with pytest.raises(ZipperError, match=r"holds no speech units|of shape"):
            SpeechUnits.load(tmp_path)
    (tmp_path / "units.json").write_text(json.dumps(described))
    (tmp_path / "codebook.safetensors").write_bytes(b"damaged")
    with pytest.raises(ZipperError, match="holds no speech units"):
        SpeechUnits.load(tmp_path)
