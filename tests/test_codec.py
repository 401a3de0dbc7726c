"""Sound as the codes of a neural codec: whole frames, in order, and nothing else."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from zipper import modality
from zipper.audio import disturbance
from zipper.audio.sound import Audio
from zipper.cli import main
from zipper.errors import ZipperError
from zipper.modality.codec import Codec
from zipper.modality.sound import Sound

SETTINGS: dict[str, dict[str, Any]] = {
    "EncodecModel": {
        "target_bandwidths": [0.75, 3.0],
        "hidden_size": 16,
        "num_filters": 4,
        "codebook_size": 32,
        "num_lstm_layers": 1,
    },
    "DacModel": {
        "encoder_hidden_size": 8,
        "downsampling_ratios": [2, 4],
        "decoder_hidden_size": 16,
        "n_codebooks": 3,
        "codebook_size": 32,
    },
    "MimiModel": {
        "hidden_size": 32,
        "num_filters": 4,
        "num_hidden_layers": 1,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "codebook_size": 32,
        "codebook_dim": 16,
        "vector_quantization_hidden_dimension": 16,
        "num_quantizers": 4,
        "upsample_groups": 32,
    },
}


def saved(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**SETTINGS[name]))
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point() and "initialized" not in key:
                tensor.add_(0.1 * torch.randn_like(tensor))
    model.save_pretrained(folder / name)
    return folder / name


def test_noise_that_goes_on_and_on_is_something_silence_is_not(tmp_path: Path) -> None:
    codec = Codec.from_pretrained(saved("EncodecModel", tmp_path))
    assert not codec.says_nothing(disturbance.nothing(0, 1.0, kind="noise"))
    assert codec.says_nothing(Audio(np.zeros(100, np.float32), 16_000))
    assert codec.says_nothing(Audio(np.zeros(0, np.float32), 16_000))


def sound(seconds: float = 0.3, rate_hz: int = 16_000) -> Audio:
    samples = np.random.default_rng(0).normal(0, 0.1, round(seconds * rate_hz))
    return Audio(samples.astype(np.float32), rate_hz)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_codec_is_read_kept_and_heard_again(name: str, tmp_path: Path) -> None:
    codec = Codec.from_pretrained(saved(name, tmp_path), codebooks=2)
    ids = codec.encode(sound())
    assert codec.vocabulary == 2 * 32 + 2 and len(ids) % 2 == 0 and ids
    assert [i // 32 for i in ids] == [0, 1] * (len(ids) // 2)
    made = codec.decode(ids)
    assert abs(made.seconds - 0.3) < 0.1 and np.isfinite(made.samples).all()
    broken = [codec.begin, *ids[:2], 40, *ids[2:], ids[0], codec.end]
    assert np.array_equal(codec.decode(broken).samples, made.samples)
    assert len(codec.decode([40, codec.end]).samples) == 0
    modality.save(codec, tmp_path / "kept")
    again = modality.load(tmp_path / "kept")
    assert again.fingerprint == codec.fingerprint and again.encode(sound()) == ids
    assert Codec(codec.model, 1).fingerprint != codec.fingerprint


def test_the_command_takes_a_codec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, made = saved("EncodecModel", tmp_path), str(tmp_path / "made")
    assert main(["fit", "codec", str(folder), "-o", made, "--set", "codebooks=2"]) == 0
    assert "codec of 66 ids" in capsys.readouterr().out
    assert modality.load(made).fingerprint == Codec.from_pretrained(folder, 2).fingerprint
    assert main(["fit", "codec", str(tmp_path / "none"), "-o", made + "2"]) == 2
    assert "a/b" not in (said := capsys.readouterr().err) and "none" in said


def test_what_no_codec_can_read_is_an_error(tmp_path: Path) -> None:
    codec = Codec.from_pretrained(saved("DacModel", tmp_path))
    assert codec.encode(Audio(np.ones(1, np.float32), 16_000))
    for wrong, said in {
        (0.0, "no samples"),
        (121.0, "at most 120 s"),
    }:
        with pytest.raises(ZipperError, match=said):
            codec.encode(sound(wrong, 8_000))
    with pytest.raises(ZipperError):
        codec.encode(Audio(np.full(4_000, np.nan, np.float32), 16_000))
    with pytest.raises(ZipperError, match="1 to 3"):
        Codec(codec.model, 4)


def test_a_codec_that_cuts_or_scales_sound_is_refused(tmp_path: Path) -> None:
    folder = saved("EncodecModel", tmp_path)
    for wrong in ({"normalize": True}, {"chunk_length_s": 1.0, "overlap": 0.01}):
        model = transformers.EncodecModel.from_pretrained(folder)
        for key, value in wrong.items():
            setattr(model.config, key, value)
        with pytest.raises(ZipperError, match="An Encodec that cuts sound into pieces, scales it"):
            Codec.from_pretrained(model)


@pytest.mark.parametrize("name", SETTINGS)
def test_codes_are_those_of_the_codec_at_its_own_rate(name: str, tmp_path: Path) -> None:
    codec = Codec.from_pretrained(saved(name, tmp_path), codebooks=3)
    given = sound(rate_hz=8_000)
    samples = torch.from_numpy(given.resample(codec.rate_hz).samples)[None, None]
    model = getattr(transformers, name).from_pretrained(tmp_path / name).eval()
    most = {"bandwidth": 3.0} if name == "EncodecModel" else {}
    with torch.no_grad():
        codes = model.encode(samples, **most).audio_codes
    first = codes.reshape(-1, codes.shape[-1])[:3] + 32 * torch.arange(3)[:, None]
    assert codec.encode(given) == first.T.flatten().tolist()


def test_a_codec_of_other_weights_is_another_one(tmp_path: Path) -> None:
    codec = Codec.from_pretrained(saved("DacModel", tmp_path))
    model = transformers.DacModel.from_pretrained(tmp_path / "DacModel")
    with torch.no_grad():
        next(model.parameters()).add_(1)
    other = Codec.from_pretrained(model)
    assert other.fingerprint != codec.fingerprint
    codec.save(tmp_path / "one")
    other.save(tmp_path / "other")
    (tmp_path / "one" / Codec.CONFIG).replace(tmp_path / "other" / Codec.CONFIG)
    with pytest.raises(ZipperError, match=r"holds another codec than its codec\.json describes"):
        Codec.load(tmp_path / "other")


def test_a_length_is_off_by_a_share_of_the_one_wanted() -> None:
    ((off, wanted),) = Sound().scores([sound(0.2)], [sound(0.3)])["length"]
    assert (off, wanted) == (pytest.approx(0.1), 0.2)


def test_what_is_tracked_stays_within_one() -> None:
    heard: list[Any] = []
    writer = SimpleNamespace(add_audio=lambda *given, **rate: heard.append((*given, rate)))
    Sound().track(writer, "a", Audio(np.array([2, -2, 0.5], np.float32), 16_000), 3)
    Sound().track(writer, "a", Audio(np.zeros(0, np.float32), 16_000), 4)
    ((name, samples, step, rate),) = heard
    assert (name, samples.tolist(), step) == ("a", [[1.0, -1.0, 0.5]], 3)
    assert rate == {"sample_rate": 16_000}
