"""Sound: files in and out, levels, and the log-mel picture against laws of acoustics."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from zipper import audio
from zipper.audio import Audio, Mel
from zipper.errors import ZipperError


def tone(hertz: float, seconds: float = 0.5, rate_hz: int = 16_000, height: float = 0.5) -> Audio:
    time = np.arange(int(seconds * rate_hz)) / rate_hz
    return Audio((height * np.sin(2 * np.pi * hertz * time)).astype(np.float32), rate_hz)


def loudest_hertz(sound: Audio) -> float:
    spectrum = np.abs(np.fft.rfft(sound.samples * np.hanning(len(sound.samples))))
    return float(spectrum.argmax() * sound.rate_hz / len(sound.samples))


@pytest.mark.parametrize(("ending", "error"), [(".wav", 2**-15), (".flac", 2**-15), (".ogg", 0.05), (".mp3", 0.05)])
def test_what_is_written_is_read_back(tmp_path: Path, ending: str, error: float) -> None:
    path, sound = tmp_path / f"a{ending}", tone(440)
    audio.write(path, sound)
    back = audio.read(path)
    assert back.rate_hz == 16_000
    assert back.samples.dtype == np.float32
    middle = slice(2000, 6000)  # mp3 adds silence at the ends
    if ending == ".mp3":
        assert loudest_hertz(back) == pytest.approx(440, abs=3)
    else:
        np.testing.assert_allclose(back.samples[middle], sound.samples[middle], atol=error)
    assert os.listdir(tmp_path) == [path.name]


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = tone(300).samples, tone(700).samples
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), 16_000, subtype="FLOAT")
    np.testing.assert_allclose(audio.read(tmp_path / "a.wav").samples, (left + right) / 2, atol=1e-6)


def test_samples_beyond_one_are_scaled_not_cut(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", 8 * tone(440).samples, 16_000, subtype="FLOAT")
    np.testing.assert_allclose(audio.read(tmp_path / "a.wav").samples, 2 * tone(440).samples, atol=1e-3)


def test_resampling_keeps_the_tone_and_the_length() -> None:
    sound = tone(1000, rate_hz=44_100).resample(16_000)
    assert (sound.rate_hz, sound.seconds) == (16_000, pytest.approx(0.5, abs=1e-3))
    assert loudest_hertz(sound) == pytest.approx(1000, abs=3)


def test_a_wanted_rate_is_given_or_refused(tmp_path: Path) -> None:
    audio.write(tmp_path / "a.wav", tone(440, rate_hz=8_000))
    assert audio.read(tmp_path / "a.wav", rate_hz=16_000).rate_hz == 16_000
    with pytest.raises(ZipperError, match=r"a.wav is 8000 Hz, these units need 16000 Hz. Pass resample=True or convert it first"):
        audio.read(tmp_path / "a.wav", rate_hz=16_000, resample=False)


def wav_header(frames: int, rate_hz: int = 16_000, channels: int = 1) -> bytes:
    size = 2 * channels * frames
    shape = struct.pack("<HHIIHH", 1, channels, rate_hz, rate_hz * 2 * channels, 2 * channels, 16)
    return struct.pack("<4sI4s4sI", b"RIFF", 36 + size, b"WAVE", b"fmt ", 16) + shape + struct.pack("<4sI", b"data", size)


def test_bad_files_are_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "words.wav").write_text("these are words")
    (tmp_path / "nothing.wav").write_bytes(b"")
    (tmp_path / "empty.wav").write_bytes(wav_header(0))
    (tmp_path / "slow.wav").write_bytes(wav_header(10, rate_hz=4_000) + bytes(20))
    (tmp_path / "fast.wav").write_bytes(wav_header(10, rate_hz=1_000_000) + bytes(20))
    (tmp_path / "wide.wav").write_bytes(wav_header(10, channels=9) + bytes(180))
    (tmp_path / "headless.raw").write_bytes(bytes(100))
    for name, value in {"nan.wav": np.nan, "inf.wav": np.inf}.items():
        soundfile.write(tmp_path / name, np.array([0.1, value, 0.1], np.float32), 16_000, subtype="FLOAT")
    with (tmp_path / "long.wav").open("wb") as file:  # a hole in the disk: an hour at 192 kHz that takes no room
        file.write(wav_header(3600 * 192_000, rate_hz=192_000))
        file.truncate(2 * 3600 * 192_000)
    reasons = {
        "missing.wav": "does not exist",
        ".": "is a folder",
        "words.wav": "not readable sound",
        "nothing.wav": "not readable sound",
        "headless.raw": "not readable sound",
        "empty.wav": "holds no sound",
        "slow.wav": "is 4000 Hz, wanted are 8000 to 192000 Hz",
        "fast.wav": "is 1000000 Hz",
        "wide.wav": "has 9 channels, at most 8",
        "nan.wav": "NaN or infinite",
        "inf.wav": "NaN or infinite",
        "long.wav": "lasts 3600 s, at most 600 s",
    }
    for name, reason in reasons.items():
        with pytest.raises(ZipperError, match=reason):
            audio.read(tmp_path / name)


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "folder.wav").mkdir()
    for path, reason in {
        "a": "which kind",
        "a.txt": "which kind",
        "folder.wav": "is a folder",
        "no/a.wav": "does not exist",
    }.items():
        with pytest.raises(ZipperError, match=reason):
            audio.check_writable(tmp_path / path)
        with pytest.raises(ZipperError, match=reason):
            audio.write(tmp_path / path, tone(440))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    audio.write(tmp_path / "a.mp3", tone(440))
    before = (tmp_path / "a.mp3").read_bytes()
    with pytest.raises(ZipperError, match="cannot be written"):
        audio.write(tmp_path / "a.mp3", tone(440, rate_hz=192_000))  # mp3 ends at 48 kHz
    assert os.listdir(tmp_path) == ["a.mp3"]
    assert (tmp_path / "a.mp3").read_bytes() == before


def test_a_missing_extra_says_what_to_install() -> None:
    with pytest.raises(ZipperError, match=r"pip install 'zipper-lm\[speech\]'"):
        audio.extra("zipper_has_no_such_module")


def test_trimming_takes_the_silence_at_the_ends_only() -> None:
    rate, silence, word = 16_000, np.zeros(8_000, np.float32), tone(440, 0.25).samples
    sound = Audio(np.concatenate([silence, word, silence, word, silence]), rate)
    assert sound.trim().seconds == pytest.approx(0.25 + 0.5 + 0.25 + 2 * 0.02, abs=0.011)
    assert Audio(silence, rate).trim().seconds == 0.5


def test_levelling_makes_loud_frames_equally_loud() -> None:
    quiet, loud = (Audio(np.float32(height) * tone(440).samples, 16_000).level(0.1) for height in (0.001, 1.0))
    np.testing.assert_allclose(quiet.samples, loud.samples, rtol=1e-4, atol=1e-6)
    assert float(np.sqrt(np.square(loud.samples).mean())) == pytest.approx(0.1, rel=0.02)


def test_the_picture_of_a_tone_is_brightest_where_the_mel_scale_puts_it() -> None:
    mel = Mel()
    for hertz in (250.0, 1000.0, 4000.0):
        low, high, here = (1127 * np.log(1 + f / 700) for f in (60.0, 7600.0, hertz))  # HTK's mel scale
        expected = (here - low) / (high - low) * (mel.bins + 1) - 1
        assert abs(mel.picture(tone(hertz))[10:-10].mean(0).argmax() - expected) <= 0.51


def test_the_bins_of_a_picture_add_up_to_the_power_of_the_sound() -> None:
    power = np.exp(Mel(loud=0.1).picture(tone(1000, 1.0)))[10:-10].sum(axis=1)
    np.testing.assert_allclose(power, 0.1**2, rtol=0.02)


def test_loudness_does_not_change_the_picture_and_silence_is_its_floor() -> None:
    mel, noise = Mel(), np.random.default_rng(0).standard_normal(16_000, dtype=np.float32)
    pictures = [mel.picture(Audio(np.float32(height) * noise, 16_000)) for height in (0.001, 0.2)]
    np.testing.assert_allclose(pictures[0], pictures[1], atol=1e-3)
    np.testing.assert_allclose(mel.picture(Audio(np.zeros(1600, np.float32), 16_000)), np.log(mel.floor), rtol=1e-6)


def test_a_picture_has_one_row_for_each_started_hop_at_any_rate() -> None:
    for time, rows in [(0, 0), (1, 1), (160, 1), (161, 2), (16_000, 100)]:
        assert Mel().picture(Audio(np.ones(time, np.float32), 16_000)).shape == (rows, 40)
    assert Mel().picture(tone(440, 1.0, rate_hz=22_050)).shape == (100, 40)


def test_sound_made_from_a_picture_has_that_picture() -> None:
    chance = np.random.default_rng(0)
    glide = 0.4 * np.sin(2 * np.pi * np.cumsum(np.linspace(200, 2500, 8_000)) / 16_000) + 0.01 * chance.standard_normal(8_000)
    mel = Mel()
    picture = mel.picture(Audio(glide.astype(np.float32), 16_000))
    sound = mel.sound(picture)
    assert (sound.rate_hz, len(sound.samples), sound.samples.dtype) == (16_000, 8_000, np.float32)
    assert np.abs(sound.samples).max() <= 1
    difference = np.abs(mel.picture(sound) - picture)[5:-5]
    assert difference.mean() < 0.2 * np.abs(picture - picture.mean(axis=0)).mean()
    np.testing.assert_array_equal(sound.samples, mel.sound(picture).samples)
    assert len(mel.sound(picture[:0]).samples) == 0
