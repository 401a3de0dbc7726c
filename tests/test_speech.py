"""Speech units: the codes are the nearest centroids, loudness and rate do not matter, a foreign
codebook is found out."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy.spatial.distance import cdist

from zipper import modality
from zipper.audio import disturbance
from zipper.audio import sound as audio
from zipper.audio.disturbance import Disturbance
from zipper.audio.sound import Audio, Front, Mel
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


CONFIG = UnitsConfig(voices=("low", "high"), fitted_on="babble", front=None)
UNITS = SpeechUnits.fit(
    [Mel().picture(babble(seed)) for seed in range(8)], codes=24, config=CONFIG, steps=20
)


def test_ids_are_codes_then_begin_end_and_the_voices() -> None:
    assert isinstance(UNITS, Modality)
    assert (
        UNITS.begin,
        UNITS.end,
        UNITS.voice_id("low"),
        UNITS.voice_id("high"),
        UNITS.vocabulary,
    ) == (24, 25, 26, 27, 28)
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
    # Only the codes sound.
    sound = UNITS.decode([UNITS.voice_id("high"), UNITS.begin, *codes, UNITS.end])
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


def speech(seed: int, seconds: float = 2.0) -> Audio:
    """Babble with syllables in it: it swells and falls by 30 dB four times a second."""
    sound = babble(seed, seconds)
    swell_db = (
        15 * np.sin(2 * np.pi * 4 * np.arange(len(sound.samples)) / sound.rate_hz + seed) - 15
    )
    return Audio((sound.samples * 10 ** (swell_db / 20)).astype(np.float32), sound.rate_hz)


FRONT = replace(CONFIG, front=Front())
CUT = SpeechUnits.fit(
    [Mel().picture(speech(seed)) for seed in range(8)], codes=24, config=FRONT, steps=20
)


def alike(some: list[int], others: list[int]) -> float:
    return (
        float(np.mean([a == b for a, b in zip(some, others, strict=False)]))
        if abs(len(some) - len(others)) < 2
        else 0.0
    )


@pytest.mark.parametrize("before", [1, 37, 320, 641, 6_400])
@pytest.mark.parametrize("behind", [0, 9_999])
def test_a_sound_has_the_same_codes_wherever_it_lies_in_a_file(before: int, behind: int) -> None:
    sound = speech(1)
    again = Audio(np.pad(sound.samples, (before, behind)), 16_000)
    assert CUT.encode(again) == CUT.encode(sound)
    raw = SpeechUnits(CUT.codebook, CONFIG)  # the fault this is for: one grid for all files
    assert before not in (320, 6_400) or alike(raw.encode(again), raw.encode(sound)) < 0.8


@pytest.mark.parametrize(("kind", "least"), [
    (Disturbance(offset=0.1), 0.95),
    (Disturbance(gain_db=-20.0), 0.95),
    (Disturbance(lead_ms=400.0, trail_ms=250.0, room_db=-60.0), 0.8),
    (Disturbance(snr_db=20.0), 0.5),
    (Disturbance(through_hz=8_000), 0.5),
])  # fmt: skip
def test_what_a_microphone_does_leaves_most_codes(kind: Disturbance, least: float) -> None:
    shares = {"front": [], "raw": []}
    for seed in range(10, 16):
        sound = speech(seed)
        for name, units in (("front", CUT), ("raw", SpeechUnits(CUT.codebook, CONFIG))):
            later = replace(kind, lead_ms=kind.lead_ms or 20.0)
            shares[name].append(alike(units.encode(sound), units.encode(later.apply(sound, seed))))
    assert np.median(shares["front"]) >= least > np.median(shares["raw"])


def test_the_grid_lies_where_the_first_units_are_nearest_to_the_codebook() -> None:
    for seed in range(20, 24):
        sound = Audio(np.pad(speech(seed).samples, (2_000, 2_000)), 16_000)
        picture = CUT.log_mel(sound)
        start, stop = sound.centred().ends()
        level = sound.centred().between(start - 640, stop + 320).level(CUT.config.mel.loud).samples
        known = CUT.heard_in(picture)
        heads = [
            CUT.config.mel.logs(level[640 - 40 * place :])[:16].reshape(4, 160)
            for place in range(16)
        ]
        errors = [np.square(cdist(head, known).min(axis=1)).mean() for head in heads]
        chosen = [
            n for n, head in enumerate(heads) if np.array_equal(head, picture[:16].reshape(4, 160))
        ]
        assert len(chosen) == 1
        # They were compared by frames with a little more of the sound in them.
        assert errors[chosen[0]] <= 1.05 * min(errors)


def test_codes_are_compared_as_the_noise_and_the_band_of_a_sound_let_them_be_heard() -> None:
    chance = np.random.default_rng(0)
    picture = chance.normal(-6, 2, (200, 40)).astype(np.float32)
    picture[:, 30:] = np.log(CUT.config.mel.floor)
    noise = np.sort(picture, axis=0)[10]  # 5 % of 200 frames lie below
    heard = CUT.heard_in(picture).reshape(-1, 4, 40)
    power = np.exp(CUT.codebook.astype(np.float64)).reshape(-1, 4, 40) + np.exp(
        noise.astype(np.float64)
    )
    np.testing.assert_allclose(heard[..., :30], np.log(power)[..., :30], atol=0.1)
    assert (heard[..., 30:] == heard[0, 0, 30:]).all()
    units = SpeechUnits(CUT.codebook, CONFIG)
    assert units.heard_in(picture) is units.codebook


def test_units_from_before_there_was_a_front_stay_what_they_were(tmp_path: Path) -> None:
    UNITS.save(tmp_path)
    described = json.loads((tmp_path / "units.json").read_text())
    assert described.pop("front") is None
    (tmp_path / "units.json").write_text(json.dumps(described))
    back = SpeechUnits.load(tmp_path)
    described = {key: value for key, value in asdict(CONFIG).items() if key != "front"}
    written = UNITS.codebook.tobytes() + json.dumps(described, sort_keys=True).encode()
    assert back.fingerprint == UNITS.fingerprint == hashlib.sha256(written).hexdigest()
    assert back.encode(speech(1)) == UNITS.encode(speech(1))
    assert CUT.fingerprint != SpeechUnits(CUT.codebook, CONFIG).fingerprint


def test_a_front_that_cannot_lay_its_grid_is_refused(tmp_path: Path) -> None:
    SpeechUnits(CUT.codebook, replace(FRONT, front=Front(places=3))).save(tmp_path)
    with pytest.raises(ZipperError, match="in 3 places a hop of 160"):
        SpeechUnits.load(tmp_path)


def test_where_the_codes_begin_in_a_sound_is_told() -> None:
    sound = speech(1)
    later = Audio(np.pad(sound.samples, (6_400, 0)), 16_000)
    assert -0.04 <= CUT.start_s(sound) <= 0
    assert CUT.start_s(later) == pytest.approx(CUT.start_s(sound) + 0.4)
    assert SpeechUnits(CUT.codebook, CONFIG).start_s(later) == 0


@pytest.mark.parametrize("samples", [0, 1, 31, 639, 641])
def test_short_and_silent_sound_has_codes_too(samples: int) -> None:
    for sound in (speech(0).samples[8_000 : 8_000 + samples], np.zeros(samples, np.float32)):
        codes = CUT.encode(Audio(sound, 16_000))
        assert (len(codes) > 0) == (samples > 0)
        assert all(0 <= code < 24 for code in codes)


@pytest.mark.parametrize("kind", ["silence", "noise", "hum"])
def test_where_nothing_is_said_nothing_swings(kind: str) -> None:
    found = [CUT.says_nothing(disturbance.nothing(seed, 2.0, kind=kind)) for seed in range(40)]
    assert all(found)
    assert CUT.says_nothing(Audio(np.zeros(0, np.float32), 16_000))
    assert not any(
        CUT.says_nothing(Disturbance(snr_db=10.0, offset=0.2).apply(speech(seed), seed))
        for seed in range(10)
    )


@pytest.mark.parametrize("length", [800, 6_400, 99_999])
def test_pauses_heard_in_parts_are_cut_as_in_the_whole(length: int) -> None:
    nearly = []
    for seed in range(30, 38):
        sound = Disturbance(lead_ms=500.0, trail_ms=700.0, room_db=-60.0).apply(speech(seed), seed)
        parts = [
            Audio(sound.samples[start : start + length], 16_000)
            for start in range(0, len(sound.samples), length)
        ]
        told = list(CUT.listen(parts))
        assert len(told) == len(parts) + 1
        assert not any(told[: 8_000 // length])  # the pause in front
        flat = [code for part in told for code in part]
        assert abs(len(flat) - len(CUT.encode(sound))) <= 1
        nearly.append(alike(flat, CUT.encode(sound)))
    assert np.median(nearly) > 0.85


def test_codes_heard_in_parts_are_nearly_those_of_the_whole() -> None:
    sound = babble(4, seconds=3)
    for length in (1_000, 3_333, 48_000):
        parts = [
            Audio(sound.samples[start : start + length], 16_000)
            for start in range(0, 48_000, length)
        ]
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
    points = (np.repeat(centres, 200, axis=0) + 0.05 * chance.standard_normal((1400, 5))).astype(
        np.float32
    )
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


def test_a_codebook_is_the_units_own() -> None:
    codebook = np.random.default_rng(0).normal(-4, 2, (8, 160)).astype(np.float32)
    units = SpeechUnits(codebook, UnitsConfig())
    before = units.fingerprint
    codebook[:] = 0
    assert units.fingerprint == before and units.codebook.any()
