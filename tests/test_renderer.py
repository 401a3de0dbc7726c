"""Units rendered as mels: laid out in time, trained, saved, and said in parts as they are said
whole."""

import importlib.util
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers

from zipper import modality
from zipper.audio import sound as audio
from zipper.audio.sound import Audio
from zipper.cli import main
from zipper.data import manifests
from zipper.errors import ZipperError
from zipper.modality import renderer
from zipper.modality.encoder import EncoderUnits
from zipper.modality.pinned import Pinned
from zipper.modality.renderer import (
    Example,
    Renderer,
    RendererConfig,
    Voice,
    fitted,
    frames_before,
    laid_out,
    log_mels,
    reach_of,
)
from zipper_lab import recognisers
from zipper_lab.recognisers import Opinion, Recogniser

HIFIGAN = {
    "model_in_dim": 8,
    "sampling_rate": 16_000,
    "upsample_initial_channel": 8,
    "upsample_rates": [16, 16],
    "upsample_kernel_sizes": [32, 32],
    "resblock_kernel_sizes": [3, 5],
    "resblock_dilation_sizes": [[1, 3], [1, 3]],
    "normalize_before": False,
}
CONFIG = RendererConfig(codes=12, bins=8, frames_per_unit=1.5, merged=True, width=16, blocks=1)


def hifigan(**settings: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.SpeechT5HifiGanConfig(**{**HIFIGAN, **settings})
    made = transformers.SpeechT5HifiGan(config).eval()
    with torch.no_grad():  # transformers starts it at nearly nothing
        for weights in made.parameters():
            weights.normal_(0, 0.3 if weights.ndim == 1 else (weights[0].numel()) ** -0.5)
    return made


def voice(**settings: Any) -> Voice:
    torch.manual_seed(1)
    made = Renderer(replace(CONFIG, **settings)).eval().requires_grad_(False)
    made.duration.bias.fill_(0.7)
    made.load_state_dict({name: value.half().float() for name, value in made.state_dict().items()})
    return Voice(made, Pinned.take(hifigan(), (renderer.HIFIGAN,)))


def ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, CONFIG.codes, count).tolist()


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sounds")
    chance = np.random.default_rng(0)
    for number in range(3):
        samples = chance.normal(0, 0.1, 9_600) * np.hanning(9_600)
        audio.write(folder / f"{number}.wav", Audio(samples.astype(np.float32), 16_000))
    return folder


@pytest.fixture(scope="module")
def hubs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An encoder and a HiFi-GAN as they lie on a hub."""
    folder = tmp_path_factory.mktemp("hubs")
    torch.manual_seed(0)
    config = transformers.MoonshineConfig(**tiny.MOONSHINE)
    transformers.MoonshineModel(config).save_pretrained(folder / "encoder")
    hifigan().save_pretrained(folder / "hifigan")
    return {name: folder / name for name in ("encoder", "hifigan")}


@pytest.fixture(scope="module")
def units(sounds: Path, hubs: dict[str, Path]) -> EncoderUnits:
    return EncoderUnits.fitted(
        sorted(sounds.iterdir()), hubs["encoder"], 1, 6, True, hubs["hifigan"], steps=1
    )


# --- where a frame lies


@pytest.mark.parametrize("per_unit", [0.4, 1.0, 2.067])
def test_every_frame_belongs_to_the_unit_that_its_middle_lies_in(per_unit: float) -> None:
    counts = np.array([1, 3, 1, 7, 2])
    at, places = laid_out(counts, per_unit)
    assert len(at) == frames_before(int(counts.sum()), per_unit)
    edges = [0, *np.cumsum(counts)]
    for frame, (unit, (inside, lasts)) in enumerate(zip(at, places, strict=True)):
        middle = (frame + 0.5) / per_unit
        assert edges[unit] <= middle < edges[unit + 1]
        assert np.isclose(edges[unit] + inside * counts[unit], middle)
        assert np.isclose(np.exp(lasts), counts[unit])


def test_parts_of_a_row_of_units_have_the_frames_of_the_whole() -> None:
    counts = np.array([2, 1, 1, 5, 1, 3, 2])
    whole = laid_out(counts, 2.067)
    cuts = [0, 3, 4, 7]
    parts = [laid_out(counts[a:b], 2.067, int(counts[:a].sum())) for a, b in pairwise(cuts)]
    joined = [at + cut for (at, _), cut in zip(parts, cuts, strict=False)]
    assert np.array_equal(np.concatenate(joined), whole[0])
    np.testing.assert_allclose(np.concatenate([places for _, places in parts]), whole[1], atol=1e-5)


# --- mels


def test_mels_of_a_hifigan_of_speecht5_are_those_of_its_feature_extractor() -> None:
    front = transformers.SpeechT5FeatureExtractor()
    samples = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    wanted = front(audio_target=samples, sampling_rate=16_000)["input_values"][0]
    config = hifigan(model_in_dim=80).config
    made = log_mels(Audio(samples, 16_000), config)
    np.testing.assert_allclose(made, wanted[: len(made)], atol=1e-4)
    assert len(made) == 16_000 // 256


def test_mels_of_the_first_hifigans_are_as_their_authors_wrote_them() -> None:
    config = hifigan(model_in_dim=80, sampling_rate=22_050).config
    samples = np.random.default_rng(0).normal(0, 0.1, 22_050).astype(np.float32)
    padded = torch.nn.functional.pad(torch.from_numpy(samples)[None], (384, 384), mode="reflect")
    spectrum = torch.stft(
        padded, 1024, 256, window=torch.hann_window(1024), center=False, return_complex=True
    )
    bank = transformers.audio_utils.mel_filter_bank(513, 80, 0, 8000, 22_050, "slaney", "slaney")
    mels = torch.from_numpy(bank).float().T @ spectrum[0].abs()
    wanted = mels.clamp(min=1e-5).log().T.numpy()
    np.testing.assert_allclose(log_mels(Audio(samples, 22_050), config), wanted, atol=1e-3)


def test_a_hifigan_whose_mels_are_not_known_is_refused(units: EncoderUnits) -> None:
    with pytest.raises(ZipperError, match=r"24000 Hz.*22050 and 16000 Hz"):
        units.with_voice(hifigan(sampling_rate=24_000), [Audio(np.ones(4_000, np.float32), 16_000)])
    with pytest.raises(ZipperError, match="No sounds"):
        units.with_voice(hifigan(), [])
    with pytest.raises(ZipperError, match="0 steps"):
        units.with_voice(hifigan(), [Audio(np.ones(4_000, np.float32), 16_000)], steps=0)
    with pytest.raises(ZipperError, match="SpeechT5HifiGan was wanted"):
        units.with_voice(
            transformers.MoonshineModel(transformers.MoonshineConfig(**tiny.MOONSHINE)), []
        )


# --- training


def test_it_learns_mels_and_how_long_units_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renderer, "CROP", 32)
    monkeypatch.setattr(renderer, "RATE", 1e-2)
    chance = np.random.default_rng(0)
    look = chance.normal(-4, 1, (4, CONFIG.bins)).astype(np.float32)
    config, examples = replace(CONFIG, codes=4), []
    for _ in range(6):
        drawn = [int(chance.integers(4))]
        while len(drawn) < 20:
            drawn.append(int(chance.choice([i for i in range(4) if i != drawn[-1]])))
        lasts = np.array(drawn) + 1  # unit i stands there i + 1 times
        at, _ = laid_out(lasts, config.frames_per_unit)
        examples.append(Example(np.array(drawn), lasts, look[np.array(drawn)[at]]))
    made = fitted(examples, config, steps=40)
    row = examples[0]
    given = torch.from_numpy(row.ids)[None]
    states = made.units(given, torch.ones_like(given, dtype=torch.bool))
    at, places = (torch.from_numpy(x)[None] for x in laid_out(row.counts, config.frames_per_unit))
    mels = made.mels(states, at, places, torch.ones_like(at, dtype=torch.bool))[0].numpy()
    blind = np.abs(row.mels - np.mean([e.mels.mean(0) for e in examples], 0)).mean()
    assert np.abs(mels - row.mels).mean() < 0.5 * blind
    right = made.counts(states) == row.counts
    assert right.mean() > 0.5 and set(made.counts(states)) > {1}
    one, again = (fitted(examples, config, steps=2).state_dict() for _ in range(2))
    assert all(map(torch.equal, one.values(), again.values()))


def test_what_is_not_there_changes_nothing() -> None:
    made, given = voice().renderer, torch.tensor([ids(9)])
    wide = torch.cat([given, torch.full((1, 5), 3)], dim=1)
    there = torch.arange(14)[None] < 9
    alone = made.units(given, there[:, :9])
    torch.testing.assert_close(made.units(wide, there)[:, :9], alone, atol=1e-5, rtol=0)


# --- sound


def test_sound_is_what_the_whole_hifigan_makes_of_the_mels() -> None:
    made, given = voice(merged=False), ids(30)
    row = torch.tensor([given])
    states = made.renderer.units(row, torch.ones_like(row, dtype=torch.bool))
    at, places = (torch.from_numpy(x)[None] for x in laid_out(np.ones(30, np.int64), 1.5))
    mels = made.renderer.mels(states, at, places, torch.ones_like(at, dtype=torch.bool))
    wanted = made.hifigan.model(mels[0]).numpy()
    said = made.decode(given)
    assert len(said.samples) == 256 * 45 and said.rate_hz == 16_000
    np.testing.assert_allclose(said.samples, wanted, atol=1e-5)
    assert not len(made.decode([]).samples)


@pytest.mark.parametrize("merged", [True, False])
def test_parts_joined_are_the_whole(merged: bool) -> None:
    made, given = voice(merged=merged), ids(60)
    whole = made.decode(given).samples
    assert whole.std() > 0.01 and merged == (len(whole) > 256 * 90)
    for chunk in (1, 7):
        parts = [part.samples for part in made.stream(iter(given), chunk, ahead=made.reach)]
        np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-5)
    parts = [part.samples for part in made.stream(iter(given), 7)]
    assert len(parts) == 7 and len(np.concatenate(parts)) == len(whole)
    # The first part is there before its successors' units are.
    asked: list[int] = []
    stream = made.stream((asked.append(i) or i for i in given), 7)  # type: ignore[func-returns-value]
    next(stream)
    assert len(asked) == 7 + renderer.AHEAD


def test_the_reach_of_a_hifigan_covers_all_that_a_sample_depends_on() -> None:
    made = hifigan()
    reach, hop = reach_of(made.config), prod(made.config.upsample_rates)
    mels = torch.zeros(1, 4 * reach + 1, 8)
    other = mels.clone()
    other[0, 2 * reach] = 5.0
    with torch.no_grad():
        moved = torch.nonzero((made(mels) - made(other))[0].abs() > 0).flatten()
    assert hop * reach <= moved.min() + hop and moved.max() < hop * (3 * reach + 1)
    assert moved.max() - moved.min() > hop  # or the test says nothing


def test_too_much_sound_is_refused_and_no_chunk_is_empty() -> None:
    made = voice()
    with torch.no_grad():
        made.renderer.duration.bias.fill_(1e9)
    with pytest.raises(ZipperError, match="at most 120 s"):
        made.decode([1] * 200)
    with pytest.raises(ZipperError, match="at least 1"):
        next(made.stream([1, 2], chunk=0))


# --- saved


def test_units_with_a_voice_are_saved_loaded_and_stream(
    units: EncoderUnits, sounds: Path, tmp_path: Path
) -> None:
    modality.save(units, tmp_path)
    again: Any = modality.load(tmp_path)
    said = units.encode(sounds / "0.wav")
    made = units.decode([units.begin, *said, units.end])
    assert made.rate_hz == 16_000 and len(made.samples) >= 256
    assert np.array_equal(again.decode(said).samples, made.samples)
    assert again.fingerprint == units.fingerprint
    parts = [*again.stream(said, 2)]
    assert sum(len(part.samples) for part in parts) == len(made.samples)
    assert "SpeechT5HifiGan" in units.about()["vocoder"]


def test_a_folder_that_was_changed_is_refused(units: EncoderUnits, tmp_path: Path) -> None:
    units.save(tmp_path / "kept")
    chance, refused = random.Random(0), 0
    for number in range(8):
        folder = Path(shutil.copytree(tmp_path / "kept", tmp_path / str(number)))
        path = folder / chance.choice(["renderer.json", "renderer.safetensors"])
        content = bytearray(path.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        try:
            loaded = EncoderUnits.load(folder)
            assert isinstance(loaded.vocoder, Voice) and isinstance(units.vocoder, Voice)
            assert loaded.vocoder.fingerprint == units.vocoder.fingerprint
        except ZipperError:
            refused += 1
    assert refused >= 7


@pytest.mark.parametrize(
    "change",
    [
        {"codes": 7},
        {"width": 10**9},
        {"blocks": 10**9},
        {"merged": False},
        {"frames_per_unit": 0},
        {"new": 1},
    ],
)
def test_a_renderer_of_others_is_refused(
    units: EncoderUnits, tmp_path: Path, change: dict[str, Any]
) -> None:
    units.save(tmp_path)
    path = tmp_path / "renderer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ZipperError, match=r"no units of an encoder|other units"):
        EncoderUnits.load(tmp_path)


def test_settings_that_would_do_nothing_are_refused_before_anything_is_fitted(
    hubs: dict[str, Path],
) -> None:
    def fit(**settings: Any) -> None:
        EncoderUnits.fitted([], hubs["encoder"], 1, 6, **settings)

    with pytest.raises(ZipperError, match="only a renderer learns from"):
        fit(voice=["a.wav"])
    with pytest.raises(ZipperError, match="only a renderer learns from"):
        fit(steps=3)
    with pytest.raises(ZipperError, match="has none"):
        fit(vocoder=hifigan(), speaker=1)
    with pytest.raises(ZipperError, match="24000 Hz"):
        fit(vocoder=hifigan(sampling_rate=24_000))


def test_a_voice_is_fitted_from_the_command_line(
    sounds: Path, hubs: dict[str, Path], tmp_path: Path
) -> None:
    config = hubs["hifigan"] / "config.json"
    older = json.loads(config.read_text()) | {"model_type": "hifigan"}  # as hubs have it
    config.write_text(json.dumps(older))
    fit: Callable[..., Any] = lambda *more: main(  # noqa: E731
        ["fit", "units", str(sounds), "-o", str(tmp_path / "made")]
        + [part for each in more for part in ("--set", each)]
    )
    given = [f"encoder={hubs['encoder']}", f"vocoder={hubs['hifigan']}", "layer=1", "codes=6"]
    (tmp_path / "empty").mkdir()
    assert fit(*given, "steps=1", f"voice={tmp_path / 'empty'}") == 2
    assert fit(*given, "steps=1", "merged=true", f"voice={sounds}") in (None, 0)
    made: Any = modality.load(tmp_path / "made")
    assert isinstance(made.vocoder, Voice) and made.vocoder.renderer.config.merged
    assert len(made.decode([1, 2, 3]).samples)


def test_the_table_of_voices_has_an_oracle_a_floor_and_every_vocoder(
    units: EncoderUnits, sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(__file__).parents[1] / "tools" / "voices.py"
    spec = importlib.util.spec_from_file_location("voices_tool", path)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    modality.save(units, tmp_path / "units")
    rows = [
        {"text": f"call {who}", "speech": str(sounds / f"{n}.wav")} for n, who in enumerate("abc")
    ]
    manifests.write(tmp_path / "rows.jsonl", rows)
    judges = {
        "ear": Recogniser("ear", lambda samples: "call a"),
        "taste": Opinion("taste", lambda samples: float(len(samples) > 0)),
    }
    monkeypatch.setattr(recognisers, "named", judges.__getitem__)
    given = (tmp_path / "rows.jsonl", {"mine": tmp_path / "units"}, list(judges), tmp_path / "kept")
    found = tool.measure(*given)
    mels = "mels alone, the HiFi-GAN of mine"
    assert [*found] == ["the sounds themselves (oracle)", "mine", mels, "floor"]
    assert found["mine"]["by"]["ear"]["wer"] == pytest.approx(2 / 6)
    assert found["floor"]["by"]["ear"]["wer"] == 0.5 and found["floor"]["by"]["taste"]["mos"] == 1
    assert found["mine"]["units_per_s"] > 1 and found["mine"]["says_mb"] > 0
    monkeypatch.setattr(modality, "load", None)  # what is kept is not made again
    assert tool.measure(*given) == found
    assert [line.count("|") for line in tool.table(found).splitlines()] == [7] * 6
