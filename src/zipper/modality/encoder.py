"""Speech as units of an encoder (HuBERT and its kin, or Moonshine's): k-means of what one of its
layers makes of a sound.

Back, the units are made into sound by a vocoder, where one was given: one of units, or one of mels
(`renderer`). Nothing here knows of towers or text.
"""

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float32
from safetensors import SafetensorError
from tqdm import tqdm

from zipper.audio.sound import HIGHEST_RATE_HZ, LOWEST_RATE_HZ, Audio
from zipper.errors import ZipperError
from zipper.modality.codebook import kmeans, load_codebook, nearest, save_codebook
from zipper.modality.pinned import Pinned
from zipper.modality.renderer import (
    HIFIGAN,
    MOST_S,
    Example,
    RendererConfig,
    Voice,
    log_mels,
    scale_of,
)
from zipper.modality.renderer import STEPS as RENDERER_STEPS
from zipper.modality.renderer import fitted as fitted_renderer
from zipper.modality.sound import Spoken
from zipper.saving import hub
from zipper.saving.files import (
    parse,
    place,
    read_json,
    settle,
    write_json,
)

MELS = "Wav2Vec2BertModel"  # takes log-mels, the others samples
HEARD = "MoonshineModel"  # trained to write down speech; only its encoder is kept
ENCODERS = ("HubertModel", "Wav2Vec2Model", "WavLMModel", MELS, HEARD)
VOCODERS = ("SeamlessM4TCodeHifiGan",)  # of units; one of mels is a HIFIGAN
RATE_HZ = 16_000  # of what every one of these encoders was trained on
WINDOW, HOP = 400, 160  # samples of a log-mel frame, as SeamlessM4TFeatureExtractor has them
VOICE_S = 7_200.0  # of sound that a renderer learns from, drawn from all
MOST_POINTS = 1 << 18  # that a codebook is fitted on, drawn from all
STEPS = 150  # of the k-means, as for speech; never tuned
LIMITS = {"layer": (0, 1_000), "stride": (1, 64), "margin_s": (0.0, 1.0)}


@dataclass(frozen=True)
class EncoderUnitsConfig:
    """What the units are made of.

    layer: 0 is what the feature projection makes (of Moonshine, the convolutions), n what the n-th
    block does. merged: whether a unit that follows itself is left out. normalise: whether samples
    get mean 0 and variance 1, as the encoder was trained; log-mels always do. stride: how many
    log-mel frames stand side by side. margin_s: of silence that the encoder hears around a sound,
    in whole units; no unit is made of it. Recordings begin and end with some, clips whose ends were
    trimmed do not, and what an encoder makes of their ends then says little (docs/log.md).
    """

    layer: int = 6
    merged: bool = False
    normalise: bool = True
    stride: int = 2
    margin_s: float = 0.0

    def __post_init__(self) -> None:
        settle(self, LIMITS)

    def to_dict(self) -> dict[str, Any]:
        """As saved; without a margin as before there were any."""
        return {name: value for name, value in asdict(self).items() if name != "margin_s" or value}


@final
class EncoderUnits(Spoken):
    """Sound <-> units. Ids 0 .. K-1 are units, K begins and K+1 ends a segment.

    Merged units lose how long each of them lasts: the vocoder guesses it. Every sound is encoded by
    itself, never in a batch: padding would change what the norms of these encoders see, and so the
    ids.
    """

    name = "units"
    CONFIG, CODEBOOK = "encoder_units.json", "codebook.safetensors"
    ENCODER, VOCODER = "encoder", "vocoder"

    def __init__(
        self,
        encoder: Pinned,
        codebook: Float32[np.ndarray, "codes width"],
        config: EncoderUnitsConfig | None = None,
    ) -> None:
        """Of the encoder only the blocks that the layer needs are kept. Raises ZipperError for a
        layer that it does not have, and a codebook that is not of its width."""
        self.config = config or EncoderUnitsConfig()
        self.encoder = _kept(encoder, self.config.layer)
        width = int(self._settings.hidden_size)
        if (
            codebook.ndim != 2
            or codebook.shape[1] != width
            or not len(codebook)
            or not np.isfinite(codebook).all()
        ):
            raise ZipperError(
                f"A codebook of shape {codebook.shape} was given, (codes, {width}) and finite was "
                "wanted. Fit the units anew."
            )
        if not (0 < self._hop <= RATE_HZ and 0 < self._least <= RATE_HZ):
            raise ZipperError(
                f"An encoder was given whose units are {self._hop} samples apart and look at "
                f"{self._least}; at most {RATE_HZ} are known."
            )
        if self._mels and self._settings.feature_projection_input_dim % self.config.stride:
            raise ZipperError(
                f"An encoder of {self._settings.feature_projection_input_dim} log-mels at once was "
                f"given, which are no {self.config.stride} frames. Give another stride."
            )
        self.codebook = codebook.astype(np.float32)
        self.codes = len(codebook)
        self.begin, self.end = self.codes, self.codes + 1
        self.vocabulary = self.codes + 2
        self.vocoder: Pinned | Voice | None = None
        self.speaker = self.language = 0

    @classmethod
    def fitted(  # its own settings, by name
        cls,
        values: Sequence[Any],
        encoder: Any,
        layer: int = 6,
        codes: int = 500,
        merged: bool = False,
        vocoder: Any = None,
        seed: int = 0,
        device: str | None = None,
        speaker: int = 0,
        language: int = 0,
        normalise: bool | None = None,
        margin_s: float = 0.0,
        voice: Any = None,
        steps: int = RENDERER_STEPS,
    ) -> "EncoderUnits":
        """Units for sounds like these (`Spoken.read` says what may stand for one).

        encoder: one of ENCODERS by hub id or folder, with safetensors, or in memory. normalise:
        None does what its preprocessor_config.json says, and normalises where it has none.
        margin_s: see `EncoderUnitsConfig`; 0.3 for clips whose ends were trimmed. vocoder,
        speaker, language: see `with_vocoder`; steps and voice (a folder of sounds, or several;
        these ones by default): see `with_voice`, for a vocoder of mels. The same codebook for the
        same arguments. Raises ZipperError for too few sounds, and what no unit can be made of.
        """
        if type(codes) is not int or codes < 1:
            raise ZipperError(f"{codes!r} codes were asked for. Ask for at least 1.")
        found = Pinned.take(encoder, ENCODERS).to(device)
        drawing = None if vocoder is None else Pinned.take(vocoder, (*VOCODERS, HIFIGAN))
        _check_settings(drawing, voice, steps, speaker, language)
        said = values if voice is None else _below(voice)
        front = _preprocessing(encoder, normalise is not None)
        config = EncoderUnitsConfig(
            layer,
            merged,
            bool(front.get("do_normalize", True)) if normalise is None else normalise,
            front.get("stride", 2),
            margin_s,
        )
        blank = np.zeros((1, found.model.config.hidden_size), np.float32)
        made = cls(found, blank, config)
        chance, share = np.random.default_rng(seed), max(1, MOST_POINTS // max(1, len(values)))
        points = [np.zeros((0, blank.shape[1]), np.float32)]
        for value in tqdm(values, desc="frames", unit="sound", disable=None):
            points.append(chance.permutation(made.frames(value))[:share].copy())
        centroids = kmeans(
            np.concatenate(points)[:MOST_POINTS],
            codes,
            seed,
            STEPS,
            points_of="frames of the encoder",
            more="sound",
        )
        made = cls(made.encoder, centroids, config)
        if drawing is None:
            return made
        if drawing.described["class"] == HIFIGAN:
            return made.with_voice(drawing.model, said, steps, seed, device)
        return made.with_vocoder(drawing.model, speaker, language, device)

    def with_vocoder(
        self, source: Any, speaker: int = 0, language: int = 0, device: str | None = None
    ) -> "EncoderUnits":
        """The same units with another vocoder: a SeamlessM4TCodeHifiGan that was trained on them,
        by hub id, folder or in memory (of a SeamlessM4TModel it is `model.vocoder`).

        speaker, language: ids of the vocoder's. Raises ZipperError for one that has fewer units or
        another rate of them.
        """
        made = copy.copy(self)
        made.vocoder = Pinned.take(source, VOCODERS).to(device)
        made.speaker, made.language = speaker, language
        made._check_vocoder(made.vocoder)
        return made

    def with_voice(
        self,
        source: Any,
        sounds: Sequence[Any],
        steps: int = RENDERER_STEPS,
        seed: int = 0,
        device: str | None = None,
    ) -> "EncoderUnits":
        """The same units with a HiFi-GAN of mels (SpeechT5HifiGan by hub id, folder or in memory)
        as vocoder, and a renderer that makes its mels of units in the voice of these sounds: of one
        speaker, and some twenty minutes of it.

        It is trained here, in so many steps; of more than VOICE_S of sound some is drawn. Raises
        ZipperError for no sounds, or a HiFi-GAN whose mels are not known.
        """
        hifigan = Pinned.take(source, (HIFIGAN,))
        settings: Any = hifigan.model.config
        scale_of(settings)
        per_s = int(settings.sampling_rate) / prod(settings.upsample_rates)
        config = RendererConfig(
            self.codes, int(settings.model_in_dim), per_s / self.units_per_s, self.config.merged
        )
        order = np.random.default_rng(seed).permutation(len(sounds)).tolist()
        examples, left = list[Example](), VOICE_S
        for number in tqdm(order, desc="voice", unit="sound", disable=None):
            if left > 0:
                sound = self.read(sounds[number])
                codes, left = nearest(self.frames(sound), self.codebook), left - sound.seconds
                kept = np.flatnonzero(np.diff(codes, prepend=-1) != 0)
                kept = kept if self.config.merged else np.arange(len(codes))
                lasts = np.diff(np.append(kept, len(codes)))
                examples.append(Example(codes[kept], lasts, log_mels(sound, settings)))
        made = copy.copy(self)
        rendered = fitted_renderer(examples, config, steps, seed, device or "cpu")
        made.vocoder = Voice(rendered, hifigan).to(device)
        made.speaker = made.language = 0
        return made

    @property
    def fingerprint(self) -> str:
        """sha256 of the encoder, as far as it is kept, the codebook, and how ids are made with
        them; the vocoder changes no ids."""
        described = json.dumps(self.config.to_dict(), sort_keys=True)
        total = hashlib.sha256(f"{self.encoder.fingerprint} {described}".encode())
        total.update(f" {self.codebook.shape} ".encode())
        total.update(self.codebook.tobytes())
        return total.hexdigest()

    @property
    def units_per_s(self) -> float:
        """Before any are merged; 50 by the usual encoders."""
        return RATE_HZ / self._hop

    def frames(self, raw: Any) -> Float32[np.ndarray, "frames width"]:
        """What the layer makes of a sound, or of anything that `read` takes. Raises ZipperError for
        sound of more than MOST_S, and for samples that are no numbers."""
        sound = self.bounded(raw, MOST_S)
        samples = sound.resample(RATE_HZ).samples.astype(np.float32)
        margin = round(self.config.margin_s * self.units_per_s)
        if margin:
            short = max(0, self._least - len(samples))  # of at least one unit that is kept
            samples = np.pad(samples, (margin * self._hop, short + margin * self._hop))
        network: Any = self.encoder.model
        given = (self._logs if self._mels else self._leveled)(samples)
        layer, seen = self.config.layer, list[torch.Tensor]()

        def keep(module: Any, inputs: Any, made: Any) -> None:
            seen.append(made[0] if isinstance(made, tuple) else made)

        if self._heard:
            network = network.encoder
        first = network.conv3 if self._heard else network.feature_projection
        blocks = network.layers if self._heard else network.encoder.layers
        at = blocks[layer - 1] if layer else first
        hook = at.register_forward_hook(keep)
        try:
            with torch.no_grad(), _refusing(self.encoder):
                network(torch.from_numpy(given)[None].to(self.encoder.device))
        finally:
            hook.remove()
        made = seen[0][0].float()
        if self._heard and not layer:  # a convolution's channels come first
            made = torch.nn.functional.gelu(made).T
        frames: np.ndarray = made[margin : len(made) - margin].cpu().numpy()
        if not np.isfinite(frames).all():
            raise ZipperError(
                "The encoder makes NaN or infinity of the sound. Give one from -1 to 1, or another "
                "encoder."
            )
        return frames

    def encode(self, raw: Any) -> list[int]:
        """Units of a sound, or of anything that `read` takes, resampled to 16 kHz; one too short
        for a unit is filled up with silence. Raises ZipperError as `frames` does."""
        codes = nearest(self.frames(raw), self.codebook)
        if self.config.merged:
            codes = codes[np.diff(codes, prepend=-1) != 0]
        ids: list[int] = codes.tolist()
        return ids

    def decode(self, ids: Sequence[int]) -> Audio:
        """Sound of units; ids that are none are passed over. Raises ZipperError where no vocoder
        was given, and for what would be more than MOST_S."""
        if self.vocoder is None:
            raise ZipperError(
                "These units have no vocoder, so that no sound can be made of them. Give one that "
                "was trained on them: units.with_vocoder(FOLDER), or --set vocoder=FOLDER when "
                "they are fitted."
            )
        codes = [i for i in ids if 0 <= i < self.codes]
        if isinstance(self.vocoder, Voice):
            with _refusing(self.vocoder):
                return self.vocoder.decode(codes)
        network: Any = self.vocoder.model
        rate_hz = int(network.config.sampling_rate)
        if not codes:
            return Audio(np.zeros(0, np.float32), rate_hz)
        most = int(MOST_S * rate_hz / prod(network.config.upsample_rates))
        _few(len(codes), most)
        device = self.vocoder.device
        with torch.no_grad(), _refusing(self.vocoder):
            units = network.unit_embedding(torch.tensor([codes], device=device))
            if self.config.merged:  # as the network's own forward does
                lasting = torch.expm1(network.dur_predictor(units)).round().nan_to_num(1, most + 1)
                lasting = lasting.clamp(1, most + 1).long()[0]
                _few(int(lasting.sum()), most)
                units = units.repeat_interleave(lasting, dim=1)
            size = (1, units.shape[1])
            voice = network.speaker_embedding(torch.full(size, self.speaker, device=device))
            spoken = network.language_embedding(torch.full(size, self.language, device=device))
            made = network.hifi_gan(torch.cat([spoken, units, voice], dim=2).transpose(1, 2))
        return Audio(made.reshape(-1).float().cpu().numpy(), rate_hz)

    def stream(self, ids: Iterable[int], chunk: int = 10) -> Iterator[Audio]:
        """Sound while its units are made, `chunk` of them at a time, where the vocoder is one of
        mels (`Voice.stream`); else all of it at the end. Raises ZipperError as `decode` does."""
        if not isinstance(self.vocoder, Voice):
            yield from super().stream(ids)
            return
        with _refusing(self.vocoder):
            yield from self.vocoder.stream((i for i in ids if 0 <= i < self.codes), chunk)

    def about(self) -> Mapping[str, Any]:
        """See `Kind.about`."""
        merged = ", merged" if self.config.merged else ""
        return {
            "encoder": f"{self.encoder.described['class']}, layer {self.config.layer}",
            "codes": self.codes,
            "rate": f"{self.units_per_s:g} units a second{merged}",
            "vocoder": "none" if self.vocoder is None else self.vocoder.described["class"],
        }

    def save(self, folder: str | Path) -> None:
        """Writes encoder_units.json and, beside it, codebook.safetensors, the files of the encoder
        and of the vocoder; the first pins the others by their hash, and itself."""
        folder = place(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.encoder.save(folder, self.ENCODER)
        if self.vocoder is not None:
            self.vocoder.save(folder, self.VOCODER)
        save_codebook(self.codebook, folder / self.CODEBOOK)
        write_json(folder / self.CONFIG, self._described)

    @classmethod
    def load(cls, folder: str | Path) -> "EncoderUnits":
        """Reads what `save` wrote. Raises ZipperError for anything else."""
        folder = place(folder)
        try:
            described = read_json(folder / cls.CONFIG)
            own: dict[str, Any] = {key: described.get(key) for key in _OWN}
            made_of = {key: value for key, value in described.items() if key not in _OWN}
            config = parse(EncoderUnitsConfig, made_of, str(folder / cls.CONFIG), LIMITS)
            encoder = Pinned.load(folder, cls.ENCODER, ENCODERS)
            wide = encoder.model.config.hidden_size
            found = load_codebook(folder / cls.CODEBOOK, own["codes"], wide)
            loaded = cls(encoder, found, config)
            if own["vocoder"] == MELS_VOICE:
                loaded.vocoder = voice = Voice.load(folder, cls.VOCODER)
                if (known := voice.renderer.config.codes) != loaded.codes:
                    raise ZipperError(f"Its renderer knows {known} units.")
            elif own["vocoder"] is True:
                loaded.vocoder = Pinned.load(folder, cls.VOCODER, VOCODERS)
                loaded.speaker, loaded.language = own["speaker"], own["language"]
                loaded._check_vocoder(loaded.vocoder)
        except (OSError, SafetensorError, ZipperError) as error:
            raise ZipperError(
                f"{folder} holds no units of an encoder: {error} It needs {cls.CONFIG} and what "
                "lies beside it, written by save."
            ) from error
        if described != loaded._described:
            raise ZipperError(
                f"{folder} holds other units than its {cls.CONFIG} describes: they would mean "
                "other sounds. Restore its files from the run that made them."
            )
        return loaded

    @property
    def _described(self) -> dict[str, Any]:
        """What is saved of it, with a sha256 of everything beside that."""
        heard = None if self.vocoder is None else self.vocoder.fingerprint
        whole = f"{self.fingerprint} {heard} {self.speaker} {self.language}"
        return {
            **self.config.to_dict(),
            "codes": self.codes,
            "vocoder": MELS_VOICE if isinstance(self.vocoder, Voice) else self.vocoder is not None,
            "speaker": self.speaker,
            "language": self.language,
            "sha256": hashlib.sha256(whole.encode()).hexdigest(),
        }

    @property
    def _settings(self) -> Any:
        return self.encoder.model.config

    @property
    def _mels(self) -> bool:
        return bool(self.encoder.described["class"] == MELS)

    @property
    def _heard(self) -> bool:
        return bool(self.encoder.described["class"] == HEARD)

    @property
    def _convolutions(self) -> Sequence[tuple[int, int]]:
        """Width and stride of each convolution over the samples, the first one first."""
        if self._heard:  # its configuration does not say them
            found: Any = self.encoder.model.encoder
            layers = (found.conv1, found.conv2, found.conv3)
            return [(layer.kernel_size[0], layer.stride[0]) for layer in layers]
        return [*zip(self._settings.conv_kernel, self._settings.conv_stride, strict=True)]

    @property
    def _hop(self) -> int:
        """Samples from one unit to the next."""
        if self._mels:
            return HOP * self.config.stride
        return prod(stride for _, stride in self._convolutions)

    @property
    def _least(self) -> int:
        """Samples that one unit is made of; 400 by the usual encoders."""
        if self._mels:
            return WINDOW + HOP * (max(2, self.config.stride) - 1)  # two frames have a variance
        least = 1
        for kernel, stride in reversed(self._convolutions):
            least = (least - 1) * stride + kernel
        return least

    def _leveled(self, samples: Float32[np.ndarray, " samples"]) -> Float32[np.ndarray, " filled"]:
        """As Wav2Vec2FeatureExtractor has it, and long enough for one unit."""
        if self.config.normalise:
            wide = samples.astype(np.float64)
            samples = ((wide - wide.mean()) / np.sqrt(wide.var() + 1e-7)).astype(np.float32)
        return np.pad(samples, (0, max(0, self._least - len(samples))))

    def _logs(self, samples: Float32[np.ndarray, " samples"]) -> Float32[np.ndarray, "units mels"]:
        """Log-mels as SeamlessM4TFeatureExtractor has them, without a unit that is not whole."""
        from transformers import SeamlessM4TFeatureExtractor  # seconds

        stride, wide = self.config.stride, self._settings.feature_projection_input_dim
        samples = np.pad(samples, (0, max(0, self._least - len(samples))))
        bins = wide // stride
        front = SeamlessM4TFeatureExtractor(
            feature_size=bins, num_mel_bins=bins, stride=stride, sampling_rate=RATE_HZ
        )
        made = front(samples, sampling_rate=RATE_HZ, pad_to_multiple_of=None, return_tensors="np")
        logs: np.ndarray = made["input_features"][0].astype(np.float32)
        return logs

    def _check_vocoder(self, vocoder: Pinned) -> None:
        """Raises ZipperError for a vocoder that these units do not fit."""
        settings: Any = vocoder.model.config
        if (known := int(settings.unit_hifi_gan_vocab_size)) < self.codes:
            raise ZipperError(
                f"The vocoder knows {known} units; these are {self.codes}. Give the one that was "
                "trained on them."
            )
        samples = prod(settings.upsample_rates)
        if not LOWEST_RATE_HZ <= settings.sampling_rate <= HIGHEST_RATE_HZ or samples < 1:
            raise ZipperError(
                f"A vocoder of {settings.sampling_rate} Hz and {samples} samples a unit was given. "
                "Give one that makes sound."
            )
        rate = settings.sampling_rate / samples
        if not self.config.merged and rate != self.units_per_s:
            raise ZipperError(
                f"The vocoder takes {rate:g} units a second; these are {self.units_per_s:g}. Give "
                "the one that was trained on them."
            )
        for named, chosen, count in (
            ("speaker", self.speaker, settings.vocoder_num_spkrs),
            ("language", self.language, settings.vocoder_num_langs),
        ):
            if type(chosen) is not int or not 0 <= chosen < count:
                raise ZipperError(
                    f"The {named} {chosen!r:.80} was asked for; the vocoder has 0 to {count - 1}."
                )


#: Of encoder_units.json, what is not in the configuration.
_OWN = ("codes", "vocoder", "speaker", "language", "sha256")
MELS_VOICE = "mels"  # there, of a vocoder that is no vocoder of units
#: Of an encoder, what stands behind its blocks or is for training only.
_BEHIND = ("adapter.", "intermediate_ffn.", "masked_spec_embed", "decoder.embed", "decoder.layers")
#: Of Moonshine's configuration, what leaves as little of its decoder as there can be.
_DEAF = {
    "decoder_num_hidden_layers": 0,
    "vocab_size": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "decoder_start_token_id": 0,
    "pad_token_id": None,
}


def _kept(encoder: Pinned, layer: int) -> Pinned:
    """The encoder up to a layer, in memory of its own; itself where it is that already."""
    network: Any = encoder.model
    heard = type(network).__name__ == HEARD
    depth = "encoder_num_hidden_layers" if heard else "num_hidden_layers"
    most = int(getattr(network.config, depth))
    if not 0 <= layer <= most:
        raise ZipperError(
            f"The layer {layer} was asked for; this encoder has 0 (its feature projection) to "
            f"{most}."
        )
    without: dict[str, Any] = {depth: layer} | (_DEAF if heard else {})
    for key, none in {
        "mask_time_prob": 0.0,
        "mask_feature_prob": 0.0,
        "add_adapter": False,
        "use_intermediate_ffn_before_adapter": False,
    }.items():
        if hasattr(network.config, key):
            without[key] = none
    if all(getattr(network.config, key) == value for key, value in without.items()):
        return encoder
    kind: Any = type(network)
    tensors = {
        name: tensor.detach().cpu().clone()
        for name, tensor in network.state_dict().items()
        if not name.startswith(_BEHIND) and _block(name) < layer
    }
    if heard:  # a decoder of one token and no block
        tensors["decoder.embed_tokens.weight"] = torch.zeros(1, network.config.hidden_size)
    config = kind.config_class.from_dict({**encoder.described["config"], **without})
    made, report = kind.from_pretrained(
        None, config=config, state_dict=tensors, output_loading_info=True, dtype=torch.float32
    )
    if report["missing_keys"]:
        raise ZipperError(f"The encoder lacks {sorted(report['missing_keys'])[:3]}.")
    return Pinned.take(made, ENCODERS).to(encoder.device)


def _block(name: str) -> int:
    """The number of the block that a tensor belongs to; -1 for none."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["encoder", "layers"] else -1


def _preprocessing(source: Any, settled: bool) -> Mapping[str, Any]:
    """What lies beside an encoder of how it takes sound; nothing for one in memory.

    settled: whether the caller said it all, so that a hub without the file is no error.
    """
    if isinstance(source, torch.nn.Module):
        return {}
    name, folder = "preprocessor_config.json", hub.as_folder(source)
    if folder is not None:
        path = folder / name
        if not path.is_file():
            return {}
    else:
        try:
            path = hub.file(str(source), name)
        except ZipperError as error:
            if settled:
                return {}
            raise ZipperError(f"{error} Or say how it takes sound: normalise=True or False.") from (
                error
            )
    said = read_json(path)
    if (rate := said.get("sampling_rate", RATE_HZ)) != RATE_HZ:
        raise ZipperError(f"{path} is of {rate!r:.80} Hz; encoders of {RATE_HZ} Hz are known.")
    return said


def _check_settings(
    vocoder: Pinned | None, voice: Any, steps: int, speaker: int, language: int
) -> None:
    """Raises ZipperError, before anything is fitted, for settings that would do nothing beside this
    vocoder, and for one whose mels are not known."""
    if vocoder is not None and vocoder.described["class"] == HIFIGAN:
        scale_of(vocoder.model.config)
        if speaker or language:
            raise ZipperError(
                "A speaker or language was asked for of a HiFi-GAN of mels, which has none. Give "
                "the sounds of a voice (voice=FOLDER)."
            )
    elif voice is not None or steps != RENDERER_STEPS:
        raise ZipperError(
            "A voice or steps were given, which only a renderer learns from. Give a HiFi-GAN of "
            f"mels as vocoder ({HIFIGAN}), or leave them out."
        )


def _below(voice: Any) -> Sequence[Any]:
    """Sounds: those that are given, or all files below a folder."""
    if not isinstance(voice, str | Path):
        return voice
    root = place(voice)
    found = sorted(
        file
        for file in root.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)
    )
    if not found:
        raise ZipperError(f"There are no sounds below {voice}. Give a folder of a voice's sounds.")
    return found


def _few(units: int, most: int) -> None:
    """Raises ZipperError for more units than are made into sound at once."""
    if units > most:
        raise ZipperError(
            f"Sound of {units} units or more was asked for; at most {most} ({MOST_S:g} s) are made "
            "at once. Decode it in parts."
        )


@contextmanager
def _refusing(model: Pinned | Voice) -> Iterator[None]:
    """What goes wrong in a model, as a ZipperError."""
    try:
        yield
    except ZipperError:
        raise
    except (ValueError, RuntimeError, IndexError) as error:
        raise ZipperError(
            f"The {model.described['class']} cannot be run: {error!s:.300}. Give a shorter sound, "
            "or another model."
        ) from error
