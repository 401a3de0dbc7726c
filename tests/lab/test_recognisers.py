"""Judges that nobody here trained hear what their own models say, whatever form they come in."""

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from zipper.audio.sound import Audio
from zipper.errors import MissingExtra, ZipperError
from zipper.normaliser import normalise
from zipper_lab import recognisers
from zipper_lab.recognisers import MOS, NORMALISER, Opinion, Rated, Recogniser, noise

LETTERS = "abcdefghijklmnopqrstuvwxyz"
HEADS = ("encoder_attention_heads", "decoder_attention_heads")
MOONSHINE_HEADS = tuple(
    f"{side}_num_{kind}"
    for side in ("encoder", "decoder")
    for kind in ("attention_heads", "key_value_heads")
)


def sound(seconds: float = 0.6, rate_hz: int = 22_050) -> Audio:
    samples = np.random.default_rng(0).normal(0, 0.1, round(seconds * rate_hz))
    return Audio(samples.astype(np.float32), rate_hz)


def whisper(folder: Path) -> Any:
    marks = ["<|endoftext|>", "<|startoftranscript|>", "<|transcribe|>", "<|notimestamps|>"]
    vocabulary = {piece: number for number, piece in enumerate([*LETTERS, *marks])}
    end, start, _, bare = (vocabulary[mark] for mark in marks)
    words = transformers.WhisperTokenizer(vocab=vocabulary, merges=[])
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)
    config = transformers.WhisperConfig(
        vocab_size=len(words), d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_ffn_dim=16, decoder_ffn_dim=16, max_target_positions=20,
        decoder_start_token_id=start, suppress_tokens=None, begin_suppress_tokens=None,
        **dict.fromkeys(HEADS, 2), **ends,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    told = model.generation_config
    told.no_timestamps_token_id, told.is_multilingual = bare, False
    told.suppress_tokens = [vocabulary[mark] for mark in marks]
    transformers.WhisperProcessor(transformers.WhisperFeatureExtractor(), words).save_pretrained(
        folder
    )
    return model


def letters(folder: Path, bar: str) -> Any:
    folder.mkdir(parents=True)
    pieces = ["<pad>", "<s>", "</s>", "<unk>", bar, *LETTERS]
    (folder / "vocab.json").write_text(json.dumps({each: n for n, each in enumerate(pieces)}))
    return transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))


def ctc(folder: Path) -> Any:
    words = letters(folder, "|")
    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=[8] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
        vocab_size=len(words),
    )  # fmt: skip
    front = transformers.Wav2Vec2FeatureExtractor()
    transformers.Wav2Vec2Processor(front, words).save_pretrained(folder)
    return transformers.Wav2Vec2ForCTC(config)


def moonshine(folder: Path) -> Any:
    words = letters(folder, "|")
    config = transformers.MoonshineConfig(
        hidden_size=16, intermediate_size=16, encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=1, vocab_size=len(words), bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, **dict.fromkeys(MOONSHINE_HEADS, 2),
    )  # fmt: skip
    model = transformers.MoonshineForConditionalGeneration(config)
    model.generation_config.suppress_tokens = [0, 1, 2, 3, 4]
    front = transformers.Wav2Vec2FeatureExtractor(do_normalize=False)
    transformers.Wav2Vec2Processor(front, words).save_pretrained(folder)
    return model


@pytest.mark.parametrize("make", [whisper, ctc, moonshine])
def test_any_recogniser_of_transformers_hears_as_its_model_does(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = tmp_path / make.__name__
    model = make(folder)
    model.save_pretrained(folder)
    model = type(model).from_pretrained(folder).eval()
    judge = recognisers.named(folder)
    assert isinstance(judge, Recogniser) and judge.name == make.__name__
    heard = judge.transcribe(sound())
    front = transformers.AutoProcessor.from_pretrained(folder)
    samples = sound().resample(16_000).samples
    given = front(samples, sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        wrote = {} if make is ctc else {"max_new_tokens": 8 + round(8 * 0.6)}
        ids = model.generate(**given, **wrote) if wrote else model(**given).logits.argmax(-1)
    wanted = front.batch_decode(ids, skip_special_tokens=True)[0]
    assert heard == wanted.strip() and heard
    assert judge.transcribe(Audio(np.zeros(0, np.float32), 8_000)) == ""


def test_what_is_no_recogniser_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ZipperError, match=r"no config\.json"):
        recognisers.named(tmp_path)
    transformers.LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(
        ZipperError, match=r"(?s)No recogniser of transformers.*Give one that writes"
    ):
        recognisers.named(tmp_path)


@pytest.mark.parametrize(
    ("said", "written"),
    [
        ("call eight three five now", "Call 835 now."),
        ("at seven thirty in the morning", "At 7:30 in the morning"),
        ("it costs two hundred and five dollars", "It costs $205."),
        ("three thousand four hundred and twelve", "3,412"),
        ("don't you know mr darcy", "Don't you know, Mister Darcy?"),
    ],
)
def test_numbers_count_as_the_same_however_they_are_written(said: str, written: str) -> None:
    assert normalise(said, NORMALISER) == normalise(written, NORMALISER) != ""
    assert normalise("forty two", NORMALISER) != normalise("forty three", NORMALISER)


def test_word_errors_are_of_what_a_row_says_is_said() -> None:
    heard = iter(["Send 42 oranges.", "call bob"])
    judge = Recogniser("ear", lambda samples: next(heard))
    rows: list[dict[str, Any]] = [
        {"text": "send forty two oranges"},
        {"text": "x", "said:text": "call anna"},
    ]
    assert judge([], [sound()] * 2, rows) == {"wer": [(0, 4), (1, 2)]}
    with pytest.raises(ZipperError, match="said:text, text"):
        judge([], [sound()], [{"image": "a.png"}])


# --- packages that may be there


@dataclass
class Part:
    text: str


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Stand-ins for faster-whisper and distillmos; what they were asked."""
    asked: list[Any] = []

    class WhisperModel:
        def __init__(self, folder: str, **settings: Any) -> None:
            if "broken" in folder:
                raise RuntimeError("Unsupported model binary version")
            asked.append(settings)

        def transcribe(self, samples: Any, **settings: Any) -> Any:
            asked.append((samples.dtype, len(samples), settings))
            return iter([Part(" Send it"), Part(" now.")]), None

    class Quality(torch.nn.Module):
        def forward(self, samples: torch.Tensor) -> torch.Tensor:
            return 1 + samples.abs().amax(1, keepdim=True).clamp(max=4)

    whisper, quality = ModuleType("faster_whisper"), ModuleType("distillmos")
    whisper.__dict__["WhisperModel"] = WhisperModel
    quality.__dict__["ConvTransformerSQAModel"] = Quality
    monkeypatch.setitem(sys.modules, "faster_whisper", whisper)
    monkeypatch.setitem(sys.modules, "distillmos", quality)
    recognisers._distillmos.cache_clear()
    yield asked
    recognisers._distillmos.cache_clear()


def test_a_folder_of_ctranslate2_is_heard_by_faster_whisper(
    installed: list[Any], tmp_path: Path
) -> None:
    for name in ("base", "broken"):
        (tmp_path / name).mkdir()
        for file in ("config.json", "model.bin"):
            (tmp_path / name / file).write_text("{}")
    judge = recognisers.named(tmp_path / "base")
    assert isinstance(judge, Recogniser) and judge.name == "faster-whisper base"
    assert judge.transcribe(sound(1.0)) == "Send it now."
    kind, count, settings = installed[1]
    assert (kind, count) == (np.float32, 16_000) and settings["language"] == "en"
    with pytest.raises(ZipperError, match="binary version"):
        recognisers.named(tmp_path / "broken")
    again = shutil.copytree(tmp_path / "base", tmp_path / "other" / "base")
    with pytest.raises(ZipperError, match="Two judges have the name 'faster-whisper base'"):
        recognisers.all_named([tmp_path / "base", again])


def test_an_opinion_has_an_interval_and_a_floor(installed: list[Any]) -> None:
    judge = recognisers.named(MOS)
    assert isinstance(judge, Opinion) and "torchaudio" not in sys.modules
    loud = [Audio(np.full(16_000, size, np.float32), 16_000) for size in (0.5, 1.0, 3.0)]
    found = Rated.of("model", judge, loud)
    assert found.mos == pytest.approx(2.5, abs=1e-3) and found.low < 2.5 < found.high
    assert judge.scores([Audio(np.zeros(0, np.float32), 16_000)]) == [1.0]
    assert judge([], loud, [])["mos"][1] == (pytest.approx(2.0, abs=1e-3), 1)
    floor = noise(loud)
    assert [len(each.samples) for each in floor] == [16_000] * 3 and floor[0].samples.std() > 0.05


def test_a_package_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recognisers._distillmos.cache_clear()
    for name in ("distillmos", "faster_whisper"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match="distillmos"):
        recognisers.named(MOS)
    assert "torchaudio" not in sys.modules
    for file in ("config.json", "model.bin"):
        (tmp_path / file).write_text("{}")
    with pytest.raises(MissingExtra, match="faster_whisper"):
        recognisers.named(tmp_path)
