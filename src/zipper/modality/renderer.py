"""Units -> log-mels by a small network that is trained on the sounds of a voice, and log-mels ->
sound by a HiFi-GAN of transformers (Kong, Kim and Bae 2020).

Where units that follow themselves are merged, how often each stood there is guessed too
(FastSpeech's predictor of durations, Ren et al. 2019). Nothing here knows of towers or encoders.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int64
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from zipper.audio.sound import Audio
from zipper.errors import DamagedFile, ZipperError
from zipper.modality.pinned import Pinned, content_hash
from zipper.saving.files import (
    check_finite,
    header,
    parse,
    read_json,
    replacing,
    settle,
    write_json,
)

HIFIGAN = "SpeechT5HifiGan"
MOST_S = 120.0  # of sound that is made at once
LONGEST = 50  # times that a merged unit may stand there; 1.2 s at 41.7 a second
NEAR, CONTEXT = 7, 2  # width of every convolution; blocks over units
CROP, BATCH = 192, 8  # frames and pieces of a training step
STEPS = 1200  # of training, eight minutes of one core; docs/voices.md has what that buys
RATE, DECAY, DURATION = 1e-3, 0.01, 0.1  # of AdamW; weight of the durations' loss. Not tuned
AHEAD = 12  # units that are known before sound of a part is made; see `Voice.stream`
LIMITS = {
    "codes": (1, 1 << 20),
    "bins": (1, 1024),
    "width": (1, 4096),
    "blocks": (0, 64),
    "frames_per_unit": (0.01, 1000.0),
}


class MelScale(NamedTuple):
    """How a HiFi-GAN's log-mels are made; its configuration says only how many, at which rate.

    tens: logarithms to the base of ten. centred: whether frame n lies around sample n hops, not
    half a hop later.
    """

    fft: int
    low_hz: float
    high_hz: float
    floor: float
    tens: bool
    centred: bool


#: By rate in Hz: as the first HiFi-GANs have them (jik876/hifi-gan), and SpeechT5's.
SCALES = {
    22_050: MelScale(1024, 0.0, 8000.0, 1e-5, False, False),
    16_000: MelScale(1024, 80.0, 7600.0, 1e-10, True, True),
}


def scale_of(config: Any) -> MelScale:
    """Of a HiFi-GAN of this configuration. Raises ZipperError for a rate whose mels are not
    known."""
    rate_hz = int(config.sampling_rate)
    if rate_hz not in SCALES:
        raise ZipperError(
            f"A HiFi-GAN of {rate_hz} Hz was given; how its mels are made is known for "
            f"{' and '.join(map(str, SCALES))} Hz. Give one of these."
        )
    return SCALES[rate_hz]


def log_mels(sound: Audio, config: Any) -> Float32[np.ndarray, "frames bins"]:
    """What a HiFi-GAN of this configuration makes the sound of, a frame for every whole hop, at
    least one. Raises ZipperError as `scale_of` does."""
    from transformers import audio_utils  # seconds

    scale, rate_hz = scale_of(config), int(config.sampling_rate)
    hop, bins = prod(config.upsample_rates), int(config.model_in_dim)
    bank = audio_utils.mel_filter_bank(
        scale.fft // 2 + 1, bins, scale.low_hz, scale.high_hz, rate_hz, "slaney", "slaney"
    )
    samples = sound.resample(rate_hz).samples
    samples = np.pad(samples, (0, max(0, hop - len(samples))))
    around = scale.fft if scale.centred else scale.fft - hop
    made: np.ndarray = audio_utils.spectrogram(
        np.pad(samples, (around // 2, around - around // 2), mode="reflect"),
        audio_utils.window_function(scale.fft, "hann"),
        scale.fft,
        hop,
        power=1.0,
        center=False,
        mel_filters=bank,
        mel_floor=scale.floor,
        log_mel="log10" if scale.tens else "log",
    )
    return made.T[: len(samples) // hop].astype(np.float32)


@dataclass(frozen=True)
class RendererConfig:
    """codes: how many units there are. bins: of a frame of log-mels. frames_per_unit: how many
    frames a unit lasts that is not merged. merged: whether units that follow themselves were left
    out, so that it is to be guessed how long each lasts."""

    codes: int
    bins: int
    frames_per_unit: float
    merged: bool
    width: int = 256
    blocks: int = 4

    def __post_init__(self) -> None:
        settle(self, LIMITS)


class Renderer(nn.Module):
    """Units -> log-mels: an embedding, convolutions over units, which also guess how long each
    lasts, and ConvNeXt blocks (Liu et al. 2022) over frames."""

    def __init__(self, config: RendererConfig) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.embed = nn.Embedding(config.codes, width)
        self.context = nn.ModuleList(Block(width) for _ in range(CONTEXT))
        self.duration = nn.Linear(width, 1)
        self.place = nn.Linear(2, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, config.bins)

    def units(
        self, ids: Int[Tensor, "batch units"], there: Bool[Tensor, "batch units"]
    ) -> Float[Tensor, "batch units width"]:
        """What is known of each unit beside its neighbours. there: False behind the last one."""
        states: Tensor = self.embed(ids)
        for block in self.context:
            states = block(states, there)
        return states

    def log_counts(
        self, states: Float[Tensor, "batch units width"]
    ) -> Float[Tensor, "batch units"]:
        """The logarithm of how often each unit stood there."""
        guessed: Tensor = self.duration(states).squeeze(-1)
        return guessed

    def counts(self, states: Float[Tensor, "1 units width"]) -> Int64[np.ndarray, " units"]:
        """How often each unit stood there: 1 where none are merged."""
        if not self.config.merged:
            return np.ones(states.shape[1], np.int64)
        guessed = self.log_counts(states)[0].exp().nan_to_num(1.0, LONGEST).clamp(1, LONGEST)
        counts: np.ndarray = guessed.round().long().cpu().numpy()
        return counts

    def mels(
        self,
        states: Float[Tensor, "batch units width"],
        at: Int[Tensor, "batch frames"],
        places: Float[Tensor, "batch frames 2"],
        there: Bool[Tensor, "batch frames"],
    ) -> Float[Tensor, "batch frames bins"]:
        """Of frames. at: the unit of each. places: as `laid_out` has them. there: False behind the
        last frame."""
        frames = states.gather(1, at[..., None].expand(-1, -1, states.shape[-1]))
        frames = frames + self.place(places)
        for block in self.blocks:
            frames = block(frames, there)
        made: Tensor = self.out(self.norm(frames))
        return made


class Block(nn.Module):
    """ConvNeXt's, over time: each channel by itself, then all channels of a moment. What is not
    there is as what lies beyond the edges, 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.near = nn.Conv1d(width, width, NEAR, padding=NEAR // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(
        self, x: Float[Tensor, "batch time width"], there: Bool[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time width"]:
        """x, and what the block adds to it."""
        near = self.near((x * there[..., None]).transpose(1, 2)).transpose(1, 2)
        made: Tensor = x + self.down(F.gelu(self.up(self.norm(near))))
        return made


def frames_before(units: int, frames_per_unit: float) -> int:
    """How many frames have their middle in so many units (not merged) from the first one on."""
    return max(0, math.ceil(units * frames_per_unit - 0.5))


def laid_out(
    counts: Int64[np.ndarray, " units"], frames_per_unit: float, before: int = 0
) -> tuple[Int64[np.ndarray, " frames"], Float32[np.ndarray, "frames 2"]]:
    """For every frame the unit that its middle lies in, and (where in it, 0 to 1; the logarithm of
    how often the unit stands there). before: how many units, not merged, lie before these."""
    ends = before + np.cumsum(counts)
    first, stop = (frames_before(t, frames_per_unit) for t in (before, int(ends[-1])))
    times = (np.arange(first, stop) + 0.5) / frames_per_unit
    at = np.minimum(np.searchsorted(ends, times, side="right"), len(counts) - 1)
    inside = (times - (ends[at] - counts[at])) / counts[at]
    return at, np.stack([inside, np.log(counts[at])], 1).astype(np.float32)


@final
@dataclass(frozen=True)
class Voice:
    """Units -> sound: a renderer, and the HiFi-GAN whose mels it learnt to make."""

    renderer: Renderer
    hifigan: Pinned

    FILE = "renderer"  # and what a Pinned of the name given writes

    @property
    def described(self) -> dict[str, Any]:
        """For people: the class of the HiFi-GAN, as `Pinned` has it."""
        return {"class": f"{self.hifigan.described['class']} behind a renderer"}

    @property
    def fingerprint(self) -> str:
        """sha256 of both networks."""
        held = content_hash(asdict(self.renderer.config), self.tensors)
        return content_hash({"renderer": held, "hifigan": self.hifigan.fingerprint}, {})

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The renderer's, in half precision, which it was rounded to when it was trained."""
        held = self.renderer.state_dict()
        return {key: value.half().cpu().contiguous() for key, value in held.items()}

    @property
    def rate_hz(self) -> int:
        """Of the sound that is made."""
        settings: Any = self.hifigan.model.config
        return int(settings.sampling_rate)

    def to(self, device: str | torch.device | None) -> "Voice":
        """On a device; None leaves it where it is."""
        self.hifigan.to(device)
        if device is not None:
            self.renderer.to(device)
        return self

    def decode(self, ids: Sequence[int]) -> Audio:
        """Sound of units. Raises ZipperError for more than MOST_S of it."""
        parts = [part.samples for part in self.stream(ids, max(1, len(ids)))]
        return Audio(np.concatenate([np.zeros(0, np.float32), *parts]), self.rate_hz)

    def stream(self, ids: Iterable[int], chunk: int = 10, ahead: int = AHEAD) -> Iterator[Audio]:
        """Sound of units while they are made: `chunk` of them at a time, each when `ahead` more are
        known.

        All of it is as long as what `decode` makes of them (from 6 ahead on), and the same within
        rounding from `reach` on; by AHEAD it differed by a part 90 dB below the sound or less, by 8
        ahead 25 dB (three sentences, docs/voices.md). Raises ZipperError for a chunk of less than
        one unit, and for more than MOST_S at once.
        """
        if chunk < 1:
            raise ZipperError(f"Sound in parts of {chunk} units was asked for. Take at least 1.")
        window = _Window(self)
        for i in ids:
            window.ids.append(i)
            if len(window.ids) - len(window.told) == chunk + ahead:
                yield window.go_on(chunk)
        if left := len(window.ids) - len(window.told):
            yield window.go_on(left)

    @property
    def reach(self) -> int:
        """How many units to either side a moment of the sound can depend on."""
        config = self.renderer.config
        frames = config.blocks * (NEAR // 2) + reach_of(self.hifigan.model.config)
        return CONTEXT * (NEAR // 2) + math.ceil(frames / config.frames_per_unit) + 1

    def save(self, folder: Path, name: str) -> None:
        """Writes renderer.json, renderer.safetensors and the HiFi-GAN as NAME.json and
        NAME.safetensors."""
        with replacing(folder / f"{self.FILE}.safetensors") as beside:
            save_file(self.tensors, beside)
        write_json(folder / f"{self.FILE}.json", asdict(self.renderer.config))
        self.hifigan.save(folder, name)

    @classmethod
    def load(cls, folder: Path, name: str) -> "Voice":
        """What `save` wrote. Raises ZipperError for anything else; that it is the voice that was
        saved, who pins its fingerprint knows."""
        path, weights = folder / f"{cls.FILE}.json", folder / f"{cls.FILE}.safetensors"
        config = parse(RendererConfig, read_json(path), str(path), LIMITS)
        entries = header(weights)
        with torch.device("meta"):
            made = Renderer(config)
        wanted = {key: ("F16", tuple(value.shape)) for key, value in made.state_dict().items()}
        if {key: (entry.dtype, entry.shape) for key, entry in entries.items()} != wanted:
            raise DamagedFile(
                f"{weights} does not hold what {path} describes. Copy the folder again."
            )
        check_finite(weights, entries)
        tensors = {key: value.float() for key, value in load_file(weights).items()}
        made.load_state_dict(tensors, assign=True)
        hifigan = Pinned.load(folder, name, (HIFIGAN,))
        _check(hifigan.model.config, config)
        return cls(made.eval().requires_grad_(False), hifigan)


class _Window:
    """What a stream of units goes on from: units, of which the first were told, how long each of
    these lasts, and how many units, not merged, lie before them."""

    def __init__(self, voice: Voice) -> None:
        self.voice, self.ids, self.before = voice, list[int](), 0
        self.told: np.ndarray = np.zeros(0, np.int64)

    @torch.no_grad()
    def go_on(self, new: int) -> Audio:
        """The sound of the next `new` units; what no later one depends on is forgotten."""
        network, hifigan = self.voice.renderer, self.voice.hifigan
        device, per_unit = network.out.weight.device, network.config.frames_per_unit
        settings: Any = hifigan.model.config
        ids = torch.tensor([self.ids], device=device)
        states = network.units(ids, torch.ones_like(ids, dtype=torch.bool))
        counts, past = network.counts(states), len(self.told)
        counts[:past] = self.told
        _few(int(counts[past:].sum()) * per_unit, settings)
        at, places = (
            torch.from_numpy(each)[None] for each in laid_out(counts, per_unit, self.before)
        )
        there = torch.ones_like(at, dtype=torch.bool, device=device)
        mels = network.mels(states, at.to(device), places.to(device), there)
        begin, first, last = (
            frames_before(self.before + int(counts[:many].sum()), per_unit)
            for many in (0, past, past + new)
        )
        room = reach_of(settings)
        low, high = max(begin, first - room), min(begin + mels.shape[1], last + room)
        samples = np.zeros(0, np.float32)
        if last > first:
            made = hifigan.model(mels[:, low - begin : high - begin])[0].float().cpu().numpy()
            hop = prod(settings.upsample_rates)
            samples = made[(first - low) * hop : (last - low) * hop]
        gone = max(0, past + new - self.voice.reach)
        self.before += int(counts[:gone].sum())
        self.ids, self.told = self.ids[gone:], counts[gone : past + new]
        return Audio(samples, self.voice.rate_hz)


def reach_of(settings: Any) -> int:
    """How many frames to either side a sample of a HiFi-GAN's can depend on; settings: its
    configuration."""
    reach, rate = 3.0, 1  # of its first convolution, in frames; samples a frame so far
    for up, kernel in zip(settings.upsample_rates, settings.upsample_kernel_sizes, strict=True):
        reach += -(-kernel // up) / rate
        rate *= up
        blocks = zip(settings.resblock_kernel_sizes, settings.resblock_dilation_sizes, strict=True)
        reach += max((wide // 2) * (sum(far) + len(far)) for wide, far in blocks) / rate
    return math.ceil(reach + 3 / rate)


def _few(frames: float, settings: Any) -> None:
    seconds = frames * prod(settings.upsample_rates) / int(settings.sampling_rate)
    if seconds > MOST_S:
        raise ZipperError(
            f"Units of {seconds:.0f} s of sound were given; at most {MOST_S:g} s are made at once. "
            "Decode them in parts."
        )


def _check(settings: Any, config: RendererConfig) -> None:
    if int(settings.model_in_dim) != config.bins:
        raise ZipperError(
            f"A HiFi-GAN of {settings.model_in_dim} mels was given; the renderer makes "
            f"{config.bins}. Give the one that it was trained for."
        )


# --- training


@dataclass(frozen=True)
class Example:
    """One sound to learn from. ids: its units. counts: how often each stood there. mels: of a
    HiFi-GAN's scale."""

    ids: Int64[np.ndarray, " units"]
    counts: Int64[np.ndarray, " units"]
    mels: Float32[np.ndarray, "frames bins"]


def fitted(
    examples: Sequence[Example],
    config: RendererConfig,
    steps: int = STEPS,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Renderer:
    """A network that renders units like these: least absolute error of the mels, least squares of
    the logarithms of the counts. With a progress bar that tells the loss.

    Rounded to half precision, which it is saved in. The same network for the same arguments on one
    machine. Raises ZipperError where there is nothing to learn from.
    """
    if not examples:
        raise ZipperError(
            "No sounds were given that a renderer could learn from. Give some of the voice."
        )
    if type(steps) is not int or steps < 1:
        raise ZipperError(f"{steps!r} steps were asked for. Ask for at least 1.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = Renderer(config)
    with torch.no_grad():  # it begins with the mean of all frames
        made.out.bias.copy_(torch.from_numpy(np.mean([each.mels.mean(0) for each in examples], 0)))
    made.to(device)
    learner = torch.optim.AdamW(made.parameters(), RATE, (0.9, 0.98), weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(learner, RATE, steps + 1, pct_start=0.05)
    chance = np.random.default_rng(seed)
    share = np.array([len(each.mels) for each in examples], np.float64)
    told = tqdm(range(steps), desc="render", unit="step", disable=None)
    for _ in told:
        drawn = chance.choice(len(examples), BATCH, p=share / share.sum())
        loss = _loss(made, [_piece(examples[i], config, chance) for i in drawn])
        learner.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        learner.step()
        schedule.step()
        told.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return made.cpu().half().float().eval().requires_grad_(False)


class _Piece(NamedTuple):
    """CROP frames of a sound and the units they belong to, with as many units around them as their
    states depend on. inside: of the units, those that frames belong to; there, spoken: which units
    and frames are any."""

    ids: Tensor
    counts: Tensor
    there: Tensor
    inside: Tensor
    at: Tensor
    places: Tensor
    mels: Tensor
    spoken: Tensor


def _loss(made: Renderer, pieces: Sequence[_Piece]) -> Tensor:
    device = made.out.weight.device
    batch = _Piece(*(torch.stack(part).to(device) for part in zip(*pieces, strict=True)))
    states = made.units(batch.ids, batch.there)
    mels = made.mels(states, batch.at, batch.places, batch.spoken)
    loss = (mels - batch.mels)[batch.spoken].abs().mean()
    if made.config.merged:
        wrong = made.log_counts(states) - batch.counts.log()
        loss = loss + DURATION * wrong[batch.inside].square().mean()
    return loss


def _piece(example: Example, config: RendererConfig, chance: np.random.Generator) -> _Piece:
    at, places = laid_out(example.counts, config.frames_per_unit)
    frames = min(len(at), len(example.mels))
    begin = int(chance.integers(0, max(1, frames - CROP + 1)))
    stop = min(frames, begin + CROP)
    first, last, around = int(at[begin]), int(at[stop - 1]), CONTEXT * (NEAR // 2)
    low, high = max(0, first - around), min(len(example.ids), last + around + 1)
    room = math.ceil(CROP / config.frames_per_unit) + 2 + 2 * around

    def filled(part: np.ndarray, size: int, value: int = 0) -> Tensor:
        wide = np.full((size, *part.shape[1:]), value, part.dtype)
        wide[: len(part)] = part
        return torch.from_numpy(wide)

    here = np.arange(low, high)
    return _Piece(
        filled(example.ids[low:high], room),
        filled(example.counts[low:high], room, 1),
        filled(np.ones(high - low, bool), room),
        filled((first <= here) & (here <= last), room),
        filled(at[begin:stop] - low, CROP),
        filled(places[begin:stop], CROP),
        filled(example.mels[begin:stop], CROP),
        filled(np.ones(stop - begin, bool), CROP),
    )
