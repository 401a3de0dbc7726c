"""A judge's ear for other voices: pocketsphinx's acoustic model, its Gaussians moved towards speech
that it is shown.

A formant synthesiser sounds unlike the people that the model was made of. Where the vocabulary is
open, the judge then mishears every fourth word of true speech and says little about produced
speech. Nothing here knows of corpora or units: the caller decides what is shown, which must never
be what is judged.
"""

import shutil
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64
from tqdm import tqdm

from zipper.audio.sound import Audio
from zipper.environment import extra
from zipper.errors import ZipperError
from zipper.normaliser import normalise
from zipper_lab.judges import JUDGE_NORMALISER, pcm, pronunciations

# pocketsphinx's en-us model (-model ptm, -feat 1s_c_d_dd): for each phone and each of three streams
# a codebook of 128 Gaussians.
SHAPE = PHONES, STREAMS, GAUSSIANS, CEPSTRA = 42, 3, 128, 13
DESCRIBED = struct.pack(
    "<8i",
    0x11223344,
    PHONES,
    STREAMS,
    GAUSSIANS,
    *[CEPSTRA] * STREAMS,
    PHONES * STREAMS * GAUSSIANS * CEPSTRA,
)
FIRST_PHONE = b"+NSN+"
TAU = 10.0  # frames that an old mean counts for; not tuned


def adapt(said: Sequence[tuple[str, Audio]], folder: str | Path) -> int:
    """Write an acoustic model for `Judge` that knows the voices in `said` into `folder`; returns
    how many utterances it was shown.

    said: texts and their sound; 200 are enough, 0.1 s each. Maximum a posteriori estimation of the
    means (Gauvain and Lee 1994) by one alignment, all Gaussians of a phone's codebook equally
    likely before. What pocketsphinx cannot align is passed over. Raises ZipperError if that is
    everything, or for words without a pronunciation.
    """
    source, folder = Path(extra("pocketsphinx").get_model_path("en-us/en-us")), Path(folder)
    means = _gaussians(source / "means")
    variances = np.maximum(_gaussians(source / "variances"), 1e-4)
    names = (source / "mdef").read_bytes()
    phones = names[names.index(FIRST_PHONE) :].split(b"\0")[:PHONES]

    weight, total, shown = np.zeros(SHAPE[:3]), np.zeros(SHAPE), 0
    texts = [normalise(text, JUDGE_NORMALISER) for text, _ in said]
    dictionary = pronunciations({*" ".join(texts).split()})
    for text, (_, audio) in tqdm(
        zip(texts, said, strict=True), "adapt the judge", len(said), unit="utterance", disable=None
    ):
        if not text or not len(audio.samples):
            continue
        aligned, features = _listen(text, audio, dictionary)
        shown += bool(aligned)
        for name, start, frames in aligned:
            phone = phones.index(name.encode())
            for stream in range(STREAMS):
                points = features[start : start + frames, stream]
                share = _posteriors(points, means[phone, stream], variances[phone, stream])
                weight[phone, stream] += share.sum(axis=0)
                total[phone, stream] += share.T @ points
    if not shown:
        raise ZipperError(
            "no utterance could be aligned with its text. Give sounds, each with what is said in "
            "it."
        )

    moved = (TAU * means + total) / (TAU + weight[..., None])
    shutil.copytree(source, folder, dirs_exist_ok=True)
    (folder / "means").write_bytes(
        b"s3\nversion 1.0\nendhdr\n" + DESCRIBED + moved.astype("<f4").tobytes()
    )
    return shown


def _posteriors(
    points: Float64[np.ndarray, "frames cepstra"],
    means: Float64[np.ndarray, "gaussians cepstra"],
    variances: Float64[np.ndarray, "gaussians cepstra"],
) -> Float64[np.ndarray, "frames gaussians"]:
    """How likely each Gaussian made each frame, all being as likely before."""
    away = np.square(points[:, None] - means) / variances + np.log(variances)
    likely = -away.sum(axis=2) / 2
    share = np.exp(likely - likely.max(axis=1, keepdims=True))
    return share / share.sum(axis=1, keepdims=True)


def _gaussians(path: Path) -> Float64[np.ndarray, "phones streams gaussians cepstra"]:
    body = path.read_bytes().partition(b"endhdr\n")[2]
    if not body.startswith(DESCRIBED):
        raise ZipperError(
            f"{path} is not of the acoustic model that pocketsphinx 5 carries. Do: pip install "
            "'pocketsphinx>=5.0.4,<6'."
        )
    numbers = np.frombuffer(body, "<f4", int(np.prod(SHAPE)), len(DESCRIBED))
    return numbers.reshape(SHAPE).astype(np.float64)


def _listen(
    text: str, audio: Audio, dictionary: str
) -> tuple[list[tuple[str, int, int]], Float64[np.ndarray, "frames streams cepstra"]]:
    """The phones of a text, each with its first frame and number of frames, and the features of all
    frames; [] for no alignment."""
    pocketsphinx, sound = extra("pocketsphinx"), pcm(audio)
    with tempfile.TemporaryDirectory() as place:
        words, cepstra = Path(place, "domain.dict"), Path(place, "cepstra")
        words.write_text(dictionary, encoding="utf-8")
        cepstra.mkdir()
        model = pocketsphinx.get_model_path("en-us/en-us")
        decoder = pocketsphinx.Decoder(
            hmm=model,
            lm=None,
            dict=str(words),
            bestpath=False,
            mfclogdir=str(cepstra),
            loglevel="FATAL",
        )
        try:
            decoder.set_align_text(text)
            _decode(decoder, sound)
            decoder.set_alignment()  # of the words just found, now by phones
            _decode(decoder, sound)
            # Values at once: the iterators' objects die with the next step.
            aligned = []
            for word in decoder.get_alignment():
                aligned += [(phone.name, phone.start, phone.duration) for phone in word]
        except RuntimeError:  # no path through the text
            aligned = []
        logged = sorted(cepstra.iterdir())[-1].read_bytes()
    heard_cepstra = np.frombuffer(logged, ">f4", offset=4).reshape(-1, CEPSTRA)
    return aligned, _features(heard_cepstra.astype(np.float64))


def _decode(decoder: Any, sound: bytes) -> None:
    decoder.start_utt()
    decoder.process_raw(sound, full_utt=True)
    decoder.end_utt()


def _features(
    cepstra: Float64[np.ndarray, "frames cepstra"],
) -> Float64[np.ndarray, "frames streams cepstra"]:
    """Cepstra without their mean, their difference over four frames, and the difference of that
    over two (sphinx's 1s_c_d_dd)."""
    padded = np.pad(cepstra - cepstra.mean(axis=0), ((3, 3), (0, 0)), mode="edge")
    speed = padded[4:] - padded[:-4]
    return np.stack([padded[3:-3], speed[1:-1], speed[2:] - speed[:-2]], axis=1)
