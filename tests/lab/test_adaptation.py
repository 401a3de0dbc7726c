"""Adaptation of the judge: it hears the voices it was shown, and nothing else about it changes."""

import filecmp
from pathlib import Path

import numpy as np
import pytest

from zipper.audio.sound import Audio
from zipper.environment import extra
from zipper.errors import ZipperError
from zipper.evaluation import error_rate
from zipper_lab import adaptation
from zipper_lab.corpora import prose
from zipper_lab.judges import Judge, pronunciations

ORIGINAL = Path(extra("pocketsphinx").get_model_path("en-us/en-us"))
SHOWN = [(u.text, prose.synthesize(u)) for u in prose.sentences("speech", 24)]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("judge")
    assert adaptation.adapt(SHOWN, folder) == len(SHOWN)
    return folder


def means(folder: Path) -> np.ndarray:
    """42 phones x 3 streams x 128 Gaussians x 13, behind a text header and eight numbers (sphinx's
    s3 format)."""
    body = (folder / "means").read_bytes().partition(b"endhdr\n")[2]
    return np.frombuffer(body, "<f4", 42 * 3 * 128 * 13, 32).reshape(42, 3, 128, 13)


def test_only_the_means_change_and_only_those_of_phones_that_were_said(adapted: Path) -> None:
    files = [path.name for path in ORIGINAL.iterdir()]
    assert filecmp.cmpfiles(ORIGINAL, adapted, files, shallow=False)[1:] == (["means"], [])
    moved = np.abs(means(adapted) - means(ORIGINAL)).max(axis=(1, 2, 3))
    assert (moved[:2] == 0).all(), "+NSN+ and +SPN+ are noises, which nobody says"
    said = {
        phone
        for line in pronunciations(set(" ".join(text for text, _ in SHOWN).split())).splitlines()
        for phone in line.split()[1:]
    }
    assert (moved > 1).sum() >= 0.8 * len(said)


def test_the_same_speech_gives_the_same_model(tmp_path: Path) -> None:
    for folder in ("first", "second"):
        adaptation.adapt(SHOWN[:3], tmp_path / folder)
    assert (tmp_path / "first" / "means").read_bytes() == (
        tmp_path / "second" / "means"
    ).read_bytes()


def hear(audio: Audio, judge: Judge, acoustic_model: Path, folder: Path) -> str:
    """By pocketsphinx with its defaults."""
    (folder / "lm").write_text(judge.language_model)
    (folder / "dict").write_text(judge.dictionary)
    settings = {
        "hmm": str(acoustic_model),
        "lm": str(folder / "lm"),
        "dict": str(folder / "dict"),
        "loglevel": "FATAL",
    }
    decoder = extra("pocketsphinx").Decoder(fwdflat=False, bestpath=False, **settings)
    decoder.start_utt()
    decoder.process_raw(
        (audio.resample(16_000).level(0.1).samples * 32_767).astype(np.int16).tobytes(),
        full_utt=True,
    )
    decoder.end_utt()
    return decoder.hyp().hypstr if decoder.hyp() else ""


def test_an_adapted_judge_hears_other_sentences_of_the_same_voices_better(
    adapted: Path, tmp_path: Path
) -> None:
    others = prose.sentences("dev", 8)
    judge = Judge.from_sentences(
        [*prose.domain()[:4000], *{word for u in others for word in u.text.split()}]
    )
    sounds = [prose.synthesize(utterance) for utterance in others]
    texts = [utterance.text for utterance in others]
    wer = {
        m: error_rate(texts, [hear(sound, judge, m, tmp_path) for sound in sounds]).wer
        for m in (ORIGINAL, adapted)
    }
    assert wer[adapted] < 0.6 * wer[ORIGINAL]


def test_the_features_are_cepstra_and_their_first_and_second_differences() -> None:
    cepstra = np.random.default_rng(0).normal(size=(20, 13))
    centred = cepstra - cepstra.mean(axis=0)
    features = adaptation._features(cepstra)
    for t in range(3, 17):
        np.testing.assert_allclose(features[t, 0], centred[t])
        np.testing.assert_allclose(features[t, 1], cepstra[t + 2] - cepstra[t - 2])
        np.testing.assert_allclose(
            features[t, 2], cepstra[t + 3] - cepstra[t - 1] - cepstra[t + 1] + cepstra[t - 3]
        )


def test_what_cannot_be_aligned_is_passed_over(tmp_path: Path) -> None:
    click = Audio(np.zeros(800, np.float32), 16_000)
    assert adaptation.adapt([SHOWN[0], (SHOWN[1][0], click)], tmp_path) == 1
    with pytest.raises(ZipperError, match="no utterance could be aligned with its text"):
        adaptation.adapt([(SHOWN[1][0], click)], tmp_path)
    with pytest.raises(ZipperError, match="no pronunciation of xyzzy"):
        adaptation.adapt([("xyzzy", SHOWN[0][1])], tmp_path)
