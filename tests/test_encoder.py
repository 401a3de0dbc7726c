"""Sound as units of a speech encoder: the same ids whatever else is done, and sound by a vocoder."""

import json
from dataclasses import replace
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from torch import Tensor

from zipper import Pipeline, Segment, modality
from zipper.audio import sound as audio
from zipper.audio.sound import Audio
from zipper.cli import main
from zipper.errors import ZipperError
from zipper.link import LinkConfig
from zipper.modality.encoder import EncoderUnits, EncoderUnitsConfig
from zipper.modality.pinned import Pinned
from zipper.model import Zipper
from zipper.testing import tiny_tower

WAVE = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
STABLE = {**WAVE, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "HuBERT": ("HubertModel", WAVE),
    "HuBERT, large": ("HubertModel", STABLE),
    "wav2vec 2.0": ("Wav2Vec2Model", WAVE),
    "wav2vec 2.0, large, with an adapter": ("Wav2Vec2Model", {**STABLE, "add_adapter": True}),
    "WavLM": ("WavLMModel", WAVE),
    "WavLM, large": ("WavLMModel", STABLE),
    "w2v-BERT": (
        "Wav2Vec2BertModel",
        {
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "feature_projection_input_dim": 16,
        },
    ),
}
VOCODER = {
    "unit_hifi_gan_vocab_size": 16,
    "unit_embed_dim": 8,
    "lang_embed_dim": 4,
    "spkr_embed_dim": 4,
    "vocoder_num_langs": 2,
    "vocoder_num_spkrs": 3,
    "upsample_initial_channel": 8,
    "upsample_rates": [20, 16],
    "upsample_kernel_sizes": [40, 32],
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3]],
}


def network(name: str, settings: dict[str, Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    cls = getattr(transformers, name)
    return cls(cls.config_class(**settings)).eval()


def sound(seconds: float = 0.5, seed: int = 0, rate_hz: int = 16_000) -> Audio:
    samples = np.random.default_rng(seed).normal(0, 0.1, round(seconds * rate_hz))
    return Audio((samples * np.hanning(len(samples) or 1)).astype(np.float32), rate_hz)


SOUNDS = [sound(seconds, seed) for seed, seconds in enumerate((0.5, 0.8, 0.5, 0.33))]


def fitted(**settings: Any) -> EncoderUnits:
    settings = {"encoder": network("HubertModel", WAVE), "layer": 2, "codes": 12, **settings}
    return EncoderUnits.fitted(SOUNDS, **settings)


@pytest.fixture(scope="module")
def units() -> EncoderUnits:
    return fitted(vocoder=network("SeamlessM4TCodeHifiGan", VOCODER), speaker=2)


def _kept(states: dict[int, Tensor], number: int, _: Any, __: Any, made: Any) -> None:
    states[number] = made[0] if isinstance(made, tuple) else made


@pytest.mark.parametrize("name", SETTINGS)
def test_units_are_those_of_the_layer_of_the_whole_encoder(name: str, tmp_path: Path) -> None:
    kind, settings = SETTINGS[name]
    whole = network(kind, settings)
    whole.save_pretrained(tmp_path / "hub")
    bert = kind == "Wav2Vec2BertModel"
    front: Any = (
        transformers.SeamlessM4TFeatureExtractor(feature_size=8, num_mel_bins=8)
        if bert
        else transformers.Wav2Vec2FeatureExtractor()
    )
    front.save_pretrained(tmp_path / "hub")
    given = front(SOUNDS[1].samples, sampling_rate=16_000, return_tensors="pt")
    key = "input_features" if bert else "input_values"
    # What a block makes: transformers' own hidden states end, in its older versions, with a norm
    # behind the last block of the large ones.
    states = dict[int, Tensor]()
    for number, block in enumerate(whole.encoder.layers, 1):
        block.register_forward_hook(partial(_kept, states, number))
    with torch.no_grad():
        whole(given[key])
        first = whole.feature_projection(
            given[key] if bert else whole.feature_extractor(given[key]).transpose(1, 2)
        )
    first = first[0] if isinstance(first, tuple) else first
    for layer, wanted in {0: first, 2: states[2], 3: states[3]}.items():
        made = EncoderUnits.fitted(SOUNDS, tmp_path / "hub", layer, codes=8)
        frames = made.frames(SOUNDS[1])
        np.testing.assert_allclose(frames, wanted[0].numpy(), atol=1e-4)
        blocks: Any = made.encoder.model
        assert len(blocks.encoder.layers) == layer and made.units_per_s == 50
    ids = [made.encode(each) for each in SOUNDS]
    assert [made.encode(each) for each in reversed(SOUNDS)] == ids[::-1]
    assert abs(len(ids[1]) - 0.8 * 50) <= 1 and {*chain(*ids)} == {*range(8)}
    modality.save(made, tmp_path / "kept")
    again = modality.load(tmp_path / "kept")
    assert again.fingerprint == made.fingerprint and [again.encode(each) for each in SOUNDS] == ids


@pytest.mark.parametrize(
    ("name", "settings"),
    [SETTINGS["HuBERT"], SETTINGS["w2v-BERT"], ("MoonshineModel", tiny.MOONSHINE)],
)
def test_a_margin_is_heard_and_no_unit_is_made_of_it(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    encoder = network(name, settings)
    tight = EncoderUnits.fitted(SOUNDS, encoder, layer=2, codes=12)
    assert "margin_s" not in tight.config.to_dict()  # as it was saved before there were margins
    wide = EncoderUnits.fitted(SOUNDS, encoder, layer=2, codes=12, margin_s=0.3)
    assert tight.fingerprint != wide.fingerprint
    around = round(0.3 * wide.units_per_s) * round(16_000 / wide.units_per_s)
    for given in (*SOUNDS, sound(0.001)):
        silence = np.zeros(around, np.float32)
        whole = tight.frames(Audio(np.concatenate([silence, given.samples, silence]), 16_000))
        kept = wide.frames(given)
        skipped = around // round(16_000 / wide.units_per_s)
        assert len(kept) >= 1 and abs(len(kept) - len(tight.frames(given))) <= 1
        if len(given.samples) > 1000:
            np.testing.assert_allclose(kept, whole[skipped : len(whole) - skipped], atol=1e-5)
    wide.save(tmp_path / "wide")
    assert EncoderUnits.load(tmp_path / "wide").fingerprint == wide.fingerprint
    with pytest.raises(ZipperError, match="margin_s"):
        EncoderUnits.fitted(SOUNDS, encoder, layer=2, codes=12, margin_s=2.0)


def test_units_of_moonshine_are_of_its_encoder_alone(tmp_path: Path) -> None:
    whole = network("MoonshineModel", tiny.MOONSHINE)
    whole.save_pretrained(tmp_path / "hub")
    front = {"do_normalize": False, "sampling_rate": 16_000}
    (tmp_path / "hub" / "preprocessor_config.json").write_text(json.dumps(front))
    given = torch.from_numpy(SOUNDS[1].samples)[None]
    with torch.no_grad():
        states = whole.encoder(given, output_hidden_states=True).hidden_states
    for layer, wanted in {0: states[0], 2: states[2]}.items():
        made = EncoderUnits.fitted(SOUNDS, tmp_path / "hub", layer, codes=4)
        np.testing.assert_allclose(made.frames(SOUNDS[1]), wanted[0].numpy(), atol=1e-5)
        blocks: Any = made.encoder.model
        assert len(blocks.encoder.layers) == layer and not len(blocks.decoder.layers)
        assert blocks.decoder.embed_tokens.num_embeddings == 1
    assert made.units_per_s == pytest.approx(16_000 / 384)
    assert len(made.encode(Audio(np.zeros(5, np.float32), 16_000))) == 1  # filled up with silence
    modality.save(made, tmp_path / "kept")
    again = modality.load(tmp_path / "kept")
    assert again.fingerprint == made.fingerprint
    assert [again.encode(each) for each in SOUNDS] == [made.encode(each) for each in SOUNDS]


def test_merged_units_never_follow_themselves(units: EncoderUnits) -> None:
    merged = EncoderUnits(units.encoder, units.codebook[:3], EncoderUnitsConfig(2, merged=True))
    plain = EncoderUnits(units.encoder, units.codebook[:3], EncoderUnitsConfig(2))
    for each in SOUNDS:
        ids, all_ids = merged.encode(each), plain.encode(each)
        assert all(a != b for a, b in pairwise(ids)) and len(ids) < len(all_ids)
        kept = [i for n, i in enumerate(all_ids) if n == 0 or i != all_ids[n - 1]]
        assert ids == kept


def test_a_fingerprint_is_of_all_that_makes_ids(units: EncoderUnits) -> None:
    config, whole = units.config, Pinned.take(network("HubertModel", WAVE), ["HubertModel"])
    other = Pinned.take(network("HubertModel", WAVE, seed=1), ["HubertModel"])
    moved = units.codebook.copy()
    moved[0, 0] += 1
    made = [
        EncoderUnits(whole, units.codebook, config),
        EncoderUnits(whole, units.codebook, replace(config, layer=1)),
        EncoderUnits(whole, units.codebook, replace(config, merged=True)),
        EncoderUnits(whole, units.codebook, replace(config, normalise=False)),
        EncoderUnits(whole, moved, config),
        EncoderUnits(other, units.codebook, config),
    ]
    assert len({each.fingerprint for each in made}) == len(made)
    assert units.vocoder is not None and made[0].vocoder is None
    assert made[0].fingerprint == units.fingerprint == fitted().fingerprint


def test_sound_is_made_by_a_vocoder_and_not_without(units: EncoderUnits, tmp_path: Path) -> None:
    ids = units.encode(SOUNDS[1])
    with pytest.raises(ZipperError, match=r"no vocoder.*with_vocoder"):
        fitted().decode(ids)
    made = units.decode([units.begin, *ids, units.end])
    assert made.rate_hz == 16_000 and len(made.samples) == 320 * len(ids)
    assert np.isfinite(made.samples).all() and not len(units.decode([units.end]).samples)
    modality.save(units, tmp_path / "kept")
    again = modality.load(tmp_path / "kept")
    assert np.array_equal(again.decode(ids).samples, made.samples)
    with pytest.raises(ZipperError, match="at most 6000"):
        units.decode([0] * 6_001)


def test_the_vocoder_says_how_long_merged_units_last(units: EncoderUnits) -> None:
    hifigan = network("SeamlessM4TCodeHifiGan", VOCODER)
    with torch.no_grad():
        hifigan.dur_predictor.proj.bias.fill_(1.2)
    merged = EncoderUnits(units.encoder, units.codebook, EncoderUnitsConfig(2, merged=True))
    merged = merged.with_vocoder(hifigan, 1, 1)
    ids = merged.encode(SOUNDS[0])
    with torch.no_grad():
        real, _ = hifigan(torch.tensor([ids]), torch.tensor([[1]]), torch.tensor([[1]]))
    made = merged.decode(ids).samples
    assert len(made) > 320 * len(ids)
    np.testing.assert_allclose(made, real[0].numpy(), atol=1e-6)
    with torch.no_grad():
        hifigan.dur_predictor.proj.bias.fill_(1e9)
    with pytest.raises(ZipperError, match="at most 6000"):
        merged.decode(ids)


def test_a_vocoder_that_does_not_fit_is_refused(units: EncoderUnits) -> None:
    for wrong, said in {
        ("unit_hifi_gan_vocab_size", 11): "knows 11 units; these are 12",
        ("sampling_rate", 8_000): "25 units a second; these are 50",
    }.items():
        hifigan = network("SeamlessM4TCodeHifiGan", {**VOCODER, wrong[0]: wrong[1]})
        with pytest.raises(ZipperError, match=said):
            units.with_vocoder(hifigan)
    hifigan = network("SeamlessM4TCodeHifiGan", VOCODER)
    with pytest.raises(ZipperError, match="speaker 3 was asked for; the vocoder has 0 to 2"):
        units.with_vocoder(hifigan, speaker=3)
    with pytest.raises(ZipperError, match="language -1"):
        units.with_vocoder(hifigan, language=-1)
    with pytest.raises(ZipperError, match="SeamlessM4TCodeHifiGan was wanted"):
        units.with_vocoder(network("HubertModel", WAVE))


def test_what_no_encoder_can_read_is_an_error(units: EncoderUnits) -> None:
    assert units.encode(Audio(np.ones(1, np.float32), 16_000))
    assert units.encode(Audio(np.zeros(399, np.float32), 16_000))
    assert units.encode(Audio(np.full(4_000, 3e38, np.float32), 16_000))
    for wrong, said in {0.0: "no samples", 121.0: "at most 120 s"}.items():
        with pytest.raises(ZipperError, match=said):
            units.encode(sound(wrong, rate_hz=8_000))
    with pytest.raises(ZipperError, match="NaN"):
        units.encode(Audio(np.full(4_000, np.nan, np.float32), 16_000))
    with pytest.raises(ZipperError, match="to 3"):
        fitted(layer=4)
    with pytest.raises(ZipperError, match="too few"):
        fitted(codes=500)
    with pytest.raises(ZipperError, match="at least 1"):
        fitted(codes=0)
    with pytest.raises(ZipperError, match="too few"):
        EncoderUnits.fitted([], network("HubertModel", WAVE), 2, 4)


def test_a_folder_of_others_is_refused(units: EncoderUnits, tmp_path: Path) -> None:
    units.save(tmp_path)
    path = tmp_path / units.CONFIG
    described = json.loads(path.read_text())
    for key, value in {
        "layer": 1,
        "merged": True,
        "codes": 11,
        "vocoder": False,
        "speaker": 1,
        "language": 5,
        "sha256": None,
        "new": 1,
    }.items():
        path.write_text(json.dumps({**described, key: value}))
        with pytest.raises(ZipperError, match="holds"):
            EncoderUnits.load(tmp_path)
    for file in ("codebook.safetensors", "encoder.json", "vocoder.safetensors", path.name):
        path.write_text(json.dumps(described))
        kept = (tmp_path / file).read_bytes()
        (tmp_path / file).unlink()
        with pytest.raises(ZipperError, match="no units of an encoder"):
            EncoderUnits.load(tmp_path)
        (tmp_path / file).write_bytes(kept)
    assert EncoderUnits.load(tmp_path).fingerprint == units.fingerprint


def test_a_zip_of_units_is_saved_and_loaded(units: EncoderUnits, tmp_path: Path) -> None:
    modalities: dict[str, Any] = {"text": tiny.text(), "units": units}
    towers, ends = {}, {}
    for name, each in modalities.items():
        towers[name] = tiny_tower("llama", vocabulary=each.vocabulary)
        ends[name] = each.begin, each.end
    link = LinkConfig(head_width=16)
    model = Zipper.from_towers(towers, train=("text",), ends=ends, link=link)
    pipe = Pipeline(model, modalities)
    pipe.save_pretrained(tmp_path / "zip", include=["units"])
    again = Pipeline.from_pretrained(tmp_path / "zip")
    assert again.modalities["units"].encode(SOUNDS[0]) == units.encode(SOUNDS[0])
    given, limits = [Segment("units", SOUNDS[0])], {"text": 3}
    assert again.run(given, ["text"], limits=limits) == pipe.run(given, ["text"], limits=limits)


def test_units_are_fitted_from_the_command_line(tmp_path: Path) -> None:
    network("WavLMModel", WAVE).save_pretrained(tmp_path / "hub")
    (tmp_path / "sounds").mkdir()
    for number in range(2):
        audio.write(tmp_path / "sounds" / f"{number}.wav", SOUNDS[number])
    said = ["--set", f"encoder={tmp_path / 'hub'}", "--set", "layer=2", "--set", "codes=16"]
    given = ["fit", "units", str(tmp_path / "sounds"), "-o", str(tmp_path / "made"), *said]
    assert main(given) in (None, 0)
    made = modality.load(tmp_path / "made")
    assert isinstance(made, EncoderUnits) and (made.codes, made.config.layer) == (16, 2)
    assert made.encode(tmp_path / "sounds" / "0.wav")
