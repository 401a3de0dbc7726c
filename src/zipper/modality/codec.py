"""Sound as the codes of a neural codec of transformers, one stream of ids, frame by frame.

A frame is one code of each codebook, coarse to fine; each codebook has ids of its own. Nothing here
knows of towers or text.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Int64

from zipper.audio.sound import Audio
from zipper.errors import ZipperError
from zipper.modality.pinned import Pinned
from zipper.modality.sound import Sound
from zipper.saving.files import place, read_json, write_json

CODECS = ("MimiModel", "EncodecModel", "DacModel", "XcodecModel")
MOST_S = 120.0  # of a sound, which is encoded at once
LEAST_S = 0.1  # shorter ones are filled up with silence: the networks look at several frames


@final
class Codec(Sound):
    """Sound <-> codes of the first codebooks of a codec. Code c of codebook q has the id
    q * size + c; codebooks * size begins and the next id ends a segment."""

    name = "codec"
    modelled = True
    CONFIG, MODEL = "codec.json", "model"

    def __init__(self, model: Pinned, codebooks: int = 1) -> None:
        """Raises ZipperError for a codec with fewer codebooks, or one that cuts or scales sound."""
        settings: Any = model.model.config
        self.kind = str(model.described["class"])
        most = settings.n_codebooks if self.kind == "DacModel" else settings.num_quantizers
        if type(codebooks) is not int or not 1 <= codebooks <= most:
            raise ZipperError(
                f"{codebooks!r} codebooks were asked for; this codec has 1 to {most}."
            )
        if self.kind == "EncodecModel" and (
            settings.normalize or settings.chunk_length_s or settings.audio_channels != 1
        ):
            raise ZipperError(
                "An Encodec that cuts sound into pieces, scales it or has two channels was given. "
                "Give one that does not, such as facebook/encodec_24khz."
            )
        self.model, self.codebooks, self.size = model, codebooks, int(settings.codebook_size)
        named = "sample_rate" if self.kind == "XcodecModel" else "sampling_rate"
        self.rate_hz = int(getattr(settings, named))
        self.begin = codebooks * self.size
        self.end, self.vocabulary = self.begin + 1, self.begin + 2

    @classmethod
    def from_pretrained(cls, source: Any, codebooks: int = 1, device: str | None = None) -> "Codec":
        """A codec of transformers (one of CODECS) by hub id or folder, or in memory, in fp32.
        Raises ZipperError where there is none."""
        return cls(Pinned.take(source, CODECS).to(device), codebooks)

    @classmethod
    def of_model(  # its own settings, by name
        cls, source: str | Path, codebooks: int = 1, device: str | None = None
    ) -> "Codec":
        """See `Kind.of_model`; `from_pretrained`."""
        return cls.from_pretrained(source, codebooks, device)

    @property
    def fingerprint(self) -> str:
        """sha256 of the weights, the configuration and the number of codebooks."""
        return hashlib.sha256(f"{self.model.fingerprint} {self.codebooks}".encode()).hexdigest()

    def encode(self, raw: Any) -> list[int]:
        """Ids of a sound, or of anything that `read` takes, resampled to the codec's rate. Raises
        ZipperError for sound of more than MOST_S, and for samples that are no numbers."""
        sound = self.bounded(raw, MOST_S)
        samples = sound.resample(self.rate_hz).samples
        samples = np.pad(samples, (0, max(0, round(LEAST_S * self.rate_hz) - len(samples))))
        given = torch.from_numpy(samples.astype(np.float32))[None, None].to(self.model.device)
        network: Any = self.model.model
        with torch.no_grad():
            if self.kind == "MimiModel":
                codes = network.encode(given, num_quantizers=self.codebooks).audio_codes
            elif self.kind == "DacModel":
                codes = network.encode(given, n_quantizers=self.codebooks).audio_codes
            else:  # of the most that there are, the first ones
                most = max(network.config.target_bandwidths)
                codes = network.encode(given, bandwidth=most).audio_codes
        codes = codes[0] if codes.ndim == 4 else codes  # Encodec's pieces, of which there is one
        frames: np.ndarray = codes[0, : self.codebooks].T.cpu().numpy().astype(np.int64)
        ids: list[int] = (frames + self._offsets()).reshape(-1).tolist()
        return ids

    def decode(self, ids: Sequence[int]) -> Audio:
        """Sound of whole frames; ids that are out of place are passed over, with what they break
        of a frame."""
        frames, frame = list[list[int]](), list[int]()
        for i in ids:
            if not 0 <= i < self.begin or i // self.size not in (0, len(frame)):
                frame = []
                continue
            frame = [*frame, i] if i // self.size == len(frame) else [i]
            if len(frame) == self.codebooks:
                frames.append(frame)
                frame = []
        if not frames:
            return Audio(np.zeros(0, np.float32), self.rate_hz)
        codes = torch.from_numpy((np.array(frames) - self._offsets()).T.copy())[None]
        codes, network = codes.to(self.model.device), self.model.model
        drawing: Any = network
        with torch.no_grad():
            if self.kind == "DacModel":
                made = drawing.decode(audio_codes=codes).audio_values
            elif self.kind == "EncodecModel":
                made = drawing.decode(codes[None], [None]).audio_values
            else:
                made = drawing.decode(codes).audio_values
        return Audio(made.reshape(-1).float().cpu().numpy(), self.rate_hz)

    def about(self) -> Mapping[str, Any]:
        """See `Kind.about`."""
        return {
            "codec": self.kind,
            "rate": f"{self.rate_hz} Hz",
            "codes": f"{self.codebooks} codebooks of {self.size}",
        }

    def save(self, folder: str | Path) -> None:
        """Writes codec.json, model.json and model.safetensors."""
        folder = place(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save(folder, self.MODEL)
        described = {"codebooks": self.codebooks, "sha256": self.fingerprint}
        write_json(folder / self.CONFIG, described)

    @classmethod
    def load(cls, folder: str | Path) -> "Codec":
        """Reads what `save` wrote. Raises ZipperError for anything else."""
        folder = place(folder)
        try:
            described = read_json(folder / cls.CONFIG)
            if described.keys() != {"codebooks", "sha256"}:
                raise ZipperError(f"{folder / cls.CONFIG} has {json.dumps([*described])[:200]}.")
            loaded = cls(Pinned.load(folder, cls.MODEL, CODECS), described["codebooks"])
        except (OSError, ZipperError) as error:
            raise ZipperError(
                f"{folder} holds no codec: {error} It needs {cls.CONFIG}, {cls.MODEL}.json and "
                f"{cls.MODEL}.safetensors, written by save."
            ) from error
        if described["sha256"] != loaded.fingerprint:
            raise ZipperError(f"{folder} holds another codec than its {cls.CONFIG} describes.")
        return loaded

    def _offsets(self) -> Int64[np.ndarray, " codebooks"]:
        return np.arange(self.codebooks, dtype=np.int64) * self.size
