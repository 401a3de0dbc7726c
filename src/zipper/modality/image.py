"""Pictures as codes: a picture to a row of codes and back, one code a square patch, row by row.

The codes are k-means of patches (with a patch of one pixel: of colours, as ImageGPT has them), or
those of a VQ model of transformers. Nothing here knows of towers, text or sound.
"""

import base64
import hashlib
import io
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64, UInt8
from safetensors import SafetensorError

from zipper.environment import extra
from zipper.errors import ZipperError
from zipper.modality.codebook import kmeans, load_codebook, save_codebook
from zipper.modality.kind import Kind, Scores
from zipper.modality.pinned import Pinned
from zipper.saving import hub
from zipper.saving.files import (
    parse,
    place,
    read_json,
    settle,
    write,
    write_json,
)

if TYPE_CHECKING:
    from PIL import Image as Pillow
    from PIL import ImageOps
else:
    Pillow, ImageOps = extra("PIL.Image"), extra("PIL.ImageOps")

#: Of a picture that is read: as many as decoded take 100 MB at 4 bytes each. A JPEG may have more:
#: it is decoded at a fraction of its size.
MOST_PIXELS = 24_000_000
#: Beyond this many, a picture is shrunk as soon as it is decoded; twice the modality's size stays.
LARGE_PIXELS = 4_000_000
MOST_FILE_BYTES = 256 << 20
PROCESSOR = "preprocessor_config.json"
#: What is read, of all that Pillow reads: none of these runs another program.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
MOST_POINTS = 1 << 18  # that a codebook is fitted on, drawn from all
STEPS = 150  # of the k-means, as for speech; never tuned
FILTERS = {"lanczos": Pillow.Resampling.LANCZOS, "bilinear": Pillow.Resampling.BILINEAR}
MODES = {1: "L", 3: "RGB"}
WORDS = "zero one two three four five six seven eight nine".split()
EXAMPLES = 60
#: Models of transformers whose codes a picture may be made of, all with a grid of codes.
VQ = ("ChameleonVQVAE", "Emu3VQVAE", "JanusVQVAE")
DRAWING = VQ[1:]  # those that transformers has a decoder of
LIMITS = {
    "height": (1, 4_096),
    "width": (1, 4_096),
    "channels": (1, 3),
    "patch": (1, 512),
    "mean": (-10.0, 10.0),
    "std": (1e-3, 10.0),
}


@dataclass(frozen=True)
class ImageConfig:
    """How a picture becomes pixels, and pixels become patches.

    height, width: in pixels, whole patches. channels: 1 (grey) or 3 (red, green, blue). patch: the
    side of a square, in pixels; with a VQ model, of what one code stands for. fit: "pad" keeps the
    aspect and fills up with white, "squash" does neither. filter: how it is resized. first_frame:
    whether a picture that moves is taken as its first frame, or refused. mean, std: what a VQ model
    has its pixels (0 to 1) normalised by. method: "patches", "colours" (a code a pixel, for towers
    like ImageGPT, which know no end) or "vq", by a model.
    """

    height: int
    width: int
    channels: int = 3
    method: Literal["patches", "colours", "vq"] = "patches"
    patch: int = 4
    fit: Literal["pad", "squash"] = "pad"
    filter: Literal["lanczos", "bilinear"] = "lanczos"
    first_frame: bool = False
    mean: float = 0.5
    std: float = 0.5

    def __post_init__(self) -> None:
        settle(self, LIMITS)
        if self.channels not in MODES:
            raise ZipperError(f"{self.channels} channels were given. Take 1 (grey) or 3 (colour).")
        if self.method == "colours" and self.patch != 1:
            raise ZipperError(
                f"A patch of {self.patch} pixels was given; a colour is that of one. Leave it out, "
                "or take the method patches."
            )
        if self.height % self.patch or self.width % self.patch:
            raise ZipperError(
                f"A picture of {self.height}x{self.width} pixels is not made of whole patches of "
                f"{self.patch}x{self.patch}. Give a size that is."
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes."""
        return self.height // self.patch, self.width // self.patch


@final
class Image(Kind):
    """Pictures <-> codes. Ids 0 .. K-1 are codes, row by row from the top left; K begins and K+1
    ends a segment. Of colours K both begins and ends it, as ImageGPT's sos is the only id beside
    its colours: a whole picture says the end.

    What is no RGB is turned into it: transparency is laid on white, and the orientation that a
    camera noted is applied.
    """

    name = "image"
    takes: ClassVar[str] = (
        'a picture: a path, the content of a file, {"path" or "bytes"}, a PIL image, or pixels of '
        "0 to 255 by row, column (and channel)"
    )
    suffix: ClassVar[str] = ".png"
    CODEBOOK, CONFIG, MODEL = "codebook.safetensors", "image.json", "vq"

    def __init__(
        self,
        config: ImageConfig,
        codebook: Float32[np.ndarray, "codes patch_values"] | None = None,
        model: Pinned | None = None,
    ) -> None:
        """codebook: for "patches" and "colours", of values from 0 to 255. model: for "vq"."""
        self.config, self.model = config, model
        if (config.method == "vq") != (model is not None) or (codebook is None) == (model is None):
            raise ZipperError(
                f"The method {config.method!r} needs a "
                f"{'model' if config.method == 'vq' else 'codebook'}, and that alone."
            )
        self.codebook = np.zeros((0, 0), np.float32) if codebook is None else codebook.copy()
        if model is None:
            width = config.patch**2 * config.channels
            held = self.codebook
            if held.ndim != 2 or held.shape[1] != width or not len(held):
                raise ZipperError(
                    f"a codebook of shape {held.shape} was given, (codes, {width}) was wanted. Fit "
                    "the pictures anew."
                )
            if not ((held >= 0) & (held <= 255)).all():  # NaN is neither
                raise ZipperError(
                    "a codebook was given with values outside 0 to 255. Fit the pictures anew."
                )
        self.codes = len(self.codebook) if model is None else _codes(model)
        alone = config.method != "colours"  # the end is an id of its own
        self.begin, self.end = self.codes, self.codes + alone
        self.vocabulary = self.end + 1
        self.length = 0 if alone else config.height * config.width

    @classmethod
    def fitted(  # its own settings, by name
        cls,
        values: Sequence[Any],
        codes: int = 256,
        patch: int | None = None,
        size: Sequence[int] = (32, 32),
        channels: int = 3,
        seed: int = 0,
        fit: Literal["pad", "squash"] = "pad",
        first_frame: bool = False,
        method: Literal["patches", "colours"] = "patches",
    ) -> "Image":
        """Codes for pictures like these: k-means of their patches, or of the colours of pixels.

        values: whatever `read` takes. size: height and width in pixels. patch: by default 4, of
        colours 1. The same codebook for the same arguments. Raises ZipperError where there are
        fewer different patches than codes.
        """
        height, width = _sides(size)
        if patch is None:
            patch = 1 if method == "colours" else 4
        config = ImageConfig(height, width, channels, method, patch, fit, first_frame=first_frame)
        chance = np.random.default_rng(seed)
        share = max(1, MOST_POINTS // max(1, len(values)))
        found = [
            chance.permutation(_patches(_pixels(_picture(value, Path(), config), config), config))[
                :share
            ].copy()  # a view would keep them all
            for value in values
        ]
        width_of_one = patch**2 * channels
        points = np.concatenate([np.zeros((0, width_of_one), np.uint8), *found])
        different = np.unique(points, axis=0)
        if not 0 < codes <= len(different):
            raise ZipperError(
                f"{len(values)} pictures with {len(different)} different patches of "
                f"{patch}x{patch} pixels were given, and {codes} codes asked for. "
                "Give more pictures, or ask for fewer codes."
            )
        centroids = kmeans(points.astype(np.float32), codes, seed, STEPS, points_of="patches")
        return cls(config, _distinct(centroids, different, codes))

    @classmethod
    def from_imagegpt(cls, source: str | Path, size: Sequence[int] | None = None) -> "Image":
        """The colours of ImageGPT: one code a pixel, by the clusters in preprocessor_config.json of
        a folder or a hub id (openai/imagegpt-small). Pictures are squashed to `size` (height,
        width), by default its own, 32x32 if it does not say, and resized bilinearly, as there. A
        tower with as many positions as there are pixels cannot read begin and end beside them: take
        a row less, (31, 32). Raises ZipperError where there are no clusters."""
        path = _beside(source, PROCESSOR)
        described = read_json(path)
        own = described.get("size", 32)
        sides = (own.get("height"), own.get("width")) if isinstance(own, dict) else (own, own)
        height, width = _sides(sides if size is None else size)
        try:
            clusters = np.asarray(described.get("clusters"), np.float32)
        except (TypeError, ValueError, OverflowError):
            clusters = np.zeros(0, np.float32)
        if clusters.ndim != 2 or clusters.shape[1:] != (3,) or not (np.abs(clusters) <= 1).all():
            raise ZipperError(
                f"{path} holds no clusters of colours from -1 to 1. Give an ImageGPT such as "
                "openai/imagegpt-small."
            )
        config = ImageConfig(height, width, 3, "colours", 1, "squash", "bilinear")
        return cls(config, np.float32(127.5) * (clusters + 1))

    @classmethod
    def from_model(
        cls,
        source: Any,
        size: Sequence[int],
        mean: float = 0.5,
        std: float = 0.5,
        fit: Literal["pad", "squash"] = "pad",
        device: str | None = None,
    ) -> "Image":
        """The codes of a VQ model of transformers (one of VQ), by hub id or folder, or in memory.

        size: height and width in pixels. mean, std: what its pixels (0 to 1) are normalised by.
        Raises ZipperError for another model, and for a size that it does not take.
        """
        model = Pinned.take(source, VQ).to(device)
        settings = model.model.config
        patch = 2 ** (len(settings.channel_multiplier) - 1)
        height, width = _sides(size)
        config = ImageConfig(
            height, width, settings.in_channels, "vq", patch, fit, mean=mean, std=std
        )
        made = cls(config, model=model)
        made.encode(Pillow.new("RGB", (width, height), "white"))  # a size that it does not take
        return made

    @classmethod
    def of_model(  # its own settings, by name
        cls,
        source: str | Path,
        size: Sequence[int] | None = None,
        mean: float = 0.5,
        std: float = 0.5,
        fit: Literal["pad", "squash"] = "pad",
        device: str | None = None,
    ) -> "Image":
        """See `Kind.of_model`: the colours of an ImageGPT (`from_imagegpt`), where the folder or
        the hub id is one, else the codes of a VQ model (`from_model`), which want a size."""
        if _is_imagegpt(source):
            return cls.from_imagegpt(source, size)
        if size is None:
            raise ZipperError(
                "A VQ model reads pictures of the size that it was made for. Say which: "
                "size=[height,width]."
            )
        return cls.from_model(source, size, mean, std, fit, device)

    @property
    def fingerprint(self) -> str:
        """sha256 of the codebook, or of the model, and of how pictures become pixels."""
        held = self.codebook.tobytes() if self.model is None else self.model.fingerprint.encode()
        described = json.dumps(asdict(self.config), sort_keys=True).encode()
        return hashlib.sha256(held + described).hexdigest()

    def read(self, value: Any, folder: Path = Path()) -> Pillow.Image:
        """The picture that a row means: a path, the content of a file, {"path" or "bytes"}, a PIL
        image or an array of bytes (height, width) or (height, width, 1, 3 or 4).

        It has the mode RGB, or L of a modality with one channel. Of more than LARGE_PIXELS it is
        shrunk, to no less than twice the modality's size. Raises ZipperError for what is no
        picture, damaged, empty, of more than MOST_PIXELS, or moves.
        """
        return _picture(value, folder, self.config)

    def files(self, value: Any, folder: Path = Path()) -> list[Path]:
        """See `Kind.files`."""
        value = value.get("path") if isinstance(value, Mapping) else value
        return [folder / place(value)] if isinstance(value, str | Path) and value else []

    def encode(self, raw: Any) -> list[int]:
        """Codes of a picture, or of anything that `read` takes: one a patch, row by row."""
        pixels = _pixels(self.read(raw), self.config)
        if self.model is None:
            codes = _nearest(_patches(pixels, self.config), self.codebook)
        else:
            codes = self._looked_at(self.model, pixels)
        ids: list[int] = codes.tolist()
        return ids

    def decode(self, ids: Sequence[int]) -> Pillow.Image:
        """The picture of codes. Ids that are none are passed over; beyond a whole picture they are
        dropped, and where there are too few the rest is white. Raises ZipperError for codes of a
        model that only reads."""
        config, (rows, columns) = self.config, self.config.grid
        codes = np.array([i for i in ids if 0 <= i < self.codes][: rows * columns], np.int64)
        if self.model is not None:
            return _image(self._drawn(self.model, codes))
        patches = np.full((rows * columns, self.codebook.shape[1]), 255, np.uint8)
        patches[: len(codes)] = np.rint(self.codebook[codes]).astype(np.uint8)
        side = config.patch
        pixels = patches.reshape(rows, columns, side, side, config.channels).swapaxes(1, 2)
        return _image(pixels.reshape(config.height, config.width, config.channels))

    def write(self, raw: Pillow.Image, path: Path) -> None:
        """As PNG, whatever the ending."""
        write(path, _png(raw))

    def told(self, raw: Any) -> Any:
        """How large it is: pixels are for files."""
        picture = self.read(raw)
        return f"a picture of {picture.height}x{picture.width} pixels"

    def html(self, raw: Any) -> str:
        """The picture, in squares if it is small."""
        picture = self.read(raw)
        scale = max(1, 128 // max(picture.size))
        content = base64.b64encode(_png(picture)).decode()
        return (
            f'<img alt="{escape(self.told(picture))}" width="{picture.width * scale}" '
            f'height="{picture.height * scale}" style="image-rendering: pixelated" '
            f'src="data:image/png;base64,{content}">'
        )

    def about(self) -> Mapping[str, Any]:
        """See `Kind.about`."""
        c = self.config
        codes = "of a VQ model, each" if self.model else "of"
        return {
            "size": f"{c.height}x{c.width}, {c.channels} channel{'s' * (c.channels > 1)}, "
            f"{self.codes} codes {codes} {c.patch}x{c.patch} pixels",
            "ids": f"{c.grid[0] * c.grid[1]} a picture, row by row",
        }

    def scores(self, wanted: Sequence[Any], made: Sequence[Any]) -> Scores:
        """The mean squared error of pixels from 0 to 1, at the modality's size."""
        scored = []
        for one, other in zip(wanted, made, strict=True):
            pair = [
                _pixels(self.read(each), self.config).astype(np.float64) for each in (one, other)
            ]
            error = np.square((pair[0] - pair[1]) / 255)
            scored.append((float(error.sum()), float(error.size)))
        return {"mse": scored}

    @classmethod
    def example(cls, folder: Path) -> str:
        """Sixty pictures of handwritten digits, 8x8 and grey, from scikit-learn (Alpaydin and
        Kaynak 1998), in img/, and manifest.jsonl, which says what each is."""
        digits = extra("sklearn.datasets").load_digits()
        (folder / "img").mkdir(parents=True, exist_ok=True)
        rows = []
        for number in range(EXAMPLES):
            pixels = np.rint(digits.images[number] * (255 / 16)).astype(np.uint8)
            path = f"img/{number:04}.png"
            write(folder / path, _png(_image(pixels[:, :, None])))
            rows.append(json.dumps({"text": WORDS[digits.target[number]], "image": path}) + "\n")
        write(folder / "manifest.jsonl", "".join(rows).encode())
        return "--set size=[8,8] --set channels=1 --set patch=2 --set codes=16"

    def save(self, folder: str | Path) -> None:
        """Writes image.json and, beside it, codebook.safetensors or the files of the model;
        the first pins the others by their hash, and itself."""
        folder = place(folder)
        folder.mkdir(parents=True, exist_ok=True)
        described: dict[str, Any] = {**asdict(self.config), "codes": self.codes}
        if self.model is None:
            save_codebook(self.codebook, folder / self.CODEBOOK)
        else:
            self.model.save(folder, self.MODEL)
        write_json(folder / self.CONFIG, {**described, "sha256": self.fingerprint})

    @classmethod
    def load(cls, folder: str | Path) -> "Image":
        """Reads what `save` wrote. Raises ZipperError for anything else."""
        folder = place(folder)
        try:
            described = read_json(folder / cls.CONFIG)
            codes = described.pop("codes", None)
            pinned = described.pop("sha256", None)
            config = parse(ImageConfig, described, str(folder / cls.CONFIG), LIMITS)
            if config.method == "vq":
                model = Pinned.load(folder, cls.MODEL, VQ)
                loaded = cls(config, model=model)
                patch = 2 ** (len(model.model.config.channel_multiplier) - 1)
                if (patch, model.model.config.in_channels) != (config.patch, config.channels):
                    raise ZipperError(f"{folder / cls.CONFIG} does not fit the model beside it.")
            else:
                wide = config.patch**2 * config.channels
                loaded = cls(config, load_codebook(folder / cls.CODEBOOK, codes, wide))
        except (OSError, SafetensorError, ZipperError) as error:
            raise ZipperError(
                f"{folder} holds no modality of pictures: {error} It needs {cls.CONFIG} and what "
                "lies beside it, written by save."
            ) from error
        if (pinned, codes) != (loaded.fingerprint, loaded.codes):
            raise ZipperError(
                f"{folder} holds foreign codes, not those that its {cls.CONFIG} describes: they "
                "would mean other pictures. Restore its files from the run that made them."
            )
        return loaded

    def _looked_at(
        self, model: Pinned, pixels: UInt8[np.ndarray, "height width channels"]
    ) -> Int64[np.ndarray, " codes"]:
        """Codes by the model."""
        given = torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)[None]
        given = ((given - self.config.mean) / self.config.std).to(model.device)
        network: Any = model.model
        named = {}
        if model.described["class"] == "Emu3VQVAE":
            named["image_sizes"] = torch.tensor([pixels.shape[:2]])
        with torch.no_grad(), _refusing(model, self.config):
            tokens = network.encode(given, **named).image_tokens
        tokens = tokens[0] if isinstance(tokens, list) else tokens
        codes: np.ndarray = tokens.reshape(-1).cpu().numpy().astype(np.int64)
        rows, columns = self.config.grid
        if len(codes) != rows * columns:
            raise ZipperError(
                f"The model makes {len(codes)} codes of a picture of {pixels.shape[0]}x"
                f"{pixels.shape[1]} pixels; {rows * columns} were expected. Take another size."
            )
        return codes

    def _drawn(
        self, model: Pinned, codes: Int64[np.ndarray, " codes"]
    ) -> UInt8[np.ndarray, "height width channels"]:
        """Pixels by the model; code 0 where there are too few, and white over it."""
        network: Any = model.model
        (rows, columns), side = self.config.grid, self.config.patch
        if model.described["class"] not in DRAWING:
            raise ZipperError(
                f"A {model.described['class']} of transformers has no decoder: it reads pictures "
                "and draws none. Use an Emu3VQVAE or a JanusVQVAE where pictures are to be made."
            )
        whole = np.zeros(rows * columns, np.int64)
        whole[: len(codes)] = codes
        given = torch.from_numpy(whole).to(model.device)[None]
        if model.described["class"] == "Emu3VQVAE":
            given = given.reshape(1, rows, columns)
        with torch.no_grad(), _refusing(model, self.config):
            drawn = network.decode(given)[0].float().cpu()
        scaled = ((drawn * self.config.std + self.config.mean) * 255).round().clamp(0, 255)
        pixels: np.ndarray = scaled.permute(1, 2, 0).to(torch.uint8).numpy()
        known = np.arange(rows * columns).reshape(rows, columns) < len(codes)
        shown = known.repeat(side, 0).repeat(side, 1)[..., None]
        return np.where(shown, pixels, np.uint8(255))


def _sides(size: Any) -> tuple[int, int]:
    """A height and a width."""
    sides = [*size] if isinstance(size, Sequence) else []
    if len(sides) != 2 or not all(type(side) is int for side in sides):
        raise ZipperError(f"The size {size!a:.80} was given; [height, width] in pixels was wanted.")
    return sides[0], sides[1]


def _beside(source: str | Path, name: str) -> Path:
    """A file of a folder or a hub id."""
    local = hub.as_folder(source) is not None
    return place(source) / name if local else hub.file(str(source), name)


def _is_imagegpt(source: str | Path) -> bool:
    """Whether a folder or a hub id is an ImageGPT, or its processor alone."""
    path = _beside(source, "config.json")
    if path.is_file():
        return bool(read_json(path).get("model_type") == "imagegpt")
    return path.with_name(PROCESSOR).is_file()


def _picture(value: Any, folder: Path, config: ImageConfig) -> Pillow.Image:
    """See `Image.read`."""
    if isinstance(value, Pillow.Image):
        _check(value, "The picture given", config)
        try:
            value.load()  # of a file that was opened, and is read only now
        except Exception as error:  # whatever a stranger's file leads Pillow to
            raise ZipperError(f"The picture given cannot be read: {error!s:.200}.") from error
        return _plain(value, config)
    if isinstance(value, np.ndarray | list | tuple):
        return _plain(_from_pixels(value), config)
    if isinstance(value, Mapping) and value.keys() <= {"path", "bytes"}:
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, str | Path | bytes) or not value:
        raise ZipperError(f"{value!r:.200} was given; give {Image.takes}.")
    named, content = "The picture given", b""
    if isinstance(value, bytes):
        content = value
    else:
        path = folder / place(value)
        named, content = str(path), _content(path)
    if len(content) > MOST_FILE_BYTES:
        raise ZipperError(f"{named} has more than {MOST_FILE_BYTES} bytes. Give a smaller picture.")
    return _opened(content, named, config)


def _content(path: Path) -> bytes:
    """A file, as far as a picture may go."""
    try:
        if not path.is_file():
            raise ZipperError(f"{path} does not exist, or is no plain file. Give a picture.")
        with path.open("rb") as file:
            return file.read(MOST_FILE_BYTES + 1)
    except ZipperError:
        raise
    except (OSError, ValueError) as error:
        raise ZipperError(f"{path!s:.200} cannot be read: {error}. Give a picture.") from error


def _opened(content: bytes, named: str, config: ImageConfig) -> Pillow.Image:
    """The picture in the content of a file; its size is looked at before it is decoded."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of sizes, which are checked here
            picture = Pillow.open(io.BytesIO(content), formats=FORMATS)
            picture.draft(MODES[config.channels], (2 * config.width, 2 * config.height))
            _check(picture, named, config)
            picture.load()
            return _plain(picture, config)
    except ZipperError:
        raise
    except Pillow.DecompressionBombError as error:
        raise ZipperError(
            f"{named} asks for far more than {MOST_PIXELS} pixels. Give a smaller picture."
        ) from error
    except Exception as error:  # whatever a stranger's file leads Pillow to
        # Pillow knows the content by its address in memory.
        why = "" if "BytesIO" in str(error) else f": {error!s:.200}"
        raise ZipperError(
            f"{named} is no picture that can be read, or a damaged one{why}. Give "
            f"{', '.join(FORMATS)}."
        ) from error


def _check(picture: Pillow.Image, named: str, config: ImageConfig) -> None:
    """Raises ZipperError for a picture that would take too much memory, is none or moves."""
    width, height = picture.size
    if width * height > MOST_PIXELS:
        raise ZipperError(
            f"{named} has {width}x{height} pixels; at most {MOST_PIXELS} are read. Shrink it first."
        )
    if not width * height:
        raise ZipperError(f"{named} has {width}x{height} pixels, which is none. Give a picture.")
    if (frames := getattr(picture, "n_frames", 1)) > 1 and not config.first_frame:
        raise ZipperError(
            f"{named} has {frames} frames; one picture was wanted. Save one of them, or make the "
            "modality with first_frame=True."
        )


def _plain(picture: Pillow.Image, config: ImageConfig) -> Pillow.Image:
    """In the mode of the modality, upright and on white; shrunk, if it is very large."""
    _check(picture, "The picture given", config)
    clear = "transparency" in picture.info or picture.mode in ("LA", "La", "PA", "RGBA", "RGBa")
    shown = picture
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):  # 16 bits, by any Pillow
        values = np.nan_to_num(np.asarray(picture)).clip(0, 65_535)
        if picture.mode == "F" and 0 < values.max() <= 1:
            raise ZipperError(
                "The picture given holds numbers with a point from 0 to 1; 0 to 255 were wanted. "
                "Save 255 times as much."
            )
        deep = values.max() > 255
        shown = Pillow.fromarray((values / (257 if deep else 1)).round().astype(np.uint8))
    mode = "RGBA" if clear else MODES[config.channels]
    shown = shown if shown.mode == mode else _converted(shown, mode)
    width, height = shown.size
    # Turned by EXIF or not, the shorter side stays at twice what the longer one is wanted to be.
    times = min(width, height) // (2 * max(config.width, config.height))
    if width * height > LARGE_PIXELS and times > 1:
        shown = shown.reduce(times)
    shown = _upright(shown, picture)
    if clear:
        white = Pillow.new("RGBA", shown.size, "white")
        white.alpha_composite(shown)
        shown = white.convert(MODES[config.channels])
    return shown


def _converted(picture: Pillow.Image, mode: str) -> Pillow.Image:
    """In another mode. Raises ZipperError where there is no way to it."""
    try:
        if mode == "L" and picture.mode not in ("1", "L"):  # of all colours there is a way to RGB
            return picture.convert("RGB").convert("L")
        return picture.convert(mode)
    except (ValueError, OSError) as error:
        raise ZipperError(
            f"A picture of the mode {picture.mode!r} was given, which cannot be turned into "
            f"{mode}: {error}. Save it as RGB."
        ) from error


def _upright(shown: Pillow.Image, picture: Pillow.Image) -> Pillow.Image:
    """As the camera was held, by the EXIF of the picture as it was; broken EXIF says nothing."""
    turns = Pillow.Transpose
    by_number = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_270,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_90,
    }
    try:
        turn = by_number.get(picture.getexif().get(0x0112, 1))
    except Exception:  # whatever a stranger's EXIF leads Pillow to
        turn = None
    return shown if turn is None else shown.transpose(turn)


def _from_pixels(value: Any) -> Pillow.Image:
    """A picture of an array or of nested lists."""
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError) as error:
        raise ZipperError(
            "Rows of different lengths were given; a picture is a rectangle."
        ) from error
    shape = array.shape
    if (
        len(shape) not in (2, 3)
        or (len(shape) == 3 and shape[2] not in (1, 3, 4))
        or not array.size
    ):
        raise ZipperError(
            f"An array of shape {shape} was given; (height, width) or (height, width, 1, 3 or 4) "
            "was wanted."
        )
    if shape[0] * shape[1] > MOST_PIXELS:
        raise ZipperError(
            f"{shape[0]}x{shape[1]} pixels were given; at most {MOST_PIXELS} are read."
        )
    numbers = array.dtype == np.uint8 or (
        not isinstance(value, np.ndarray)
        and array.dtype.kind == "i"
        and array.min() >= 0
        and array.max() <= 255
    )
    if not numbers:
        raise ZipperError(
            f"An array of {array.dtype} was given; whole numbers from 0 to 255 (uint8) were "
            "wanted. Of pixels from 0 to 1 make (255 * pixels).round().astype('uint8')."
        )
    array = array.astype(np.uint8)
    return _image(array if array.ndim == 3 else array[:, :, None])


def _pixels(
    picture: Pillow.Image, config: ImageConfig
) -> UInt8[np.ndarray, "height width channels"]:
    """A picture in the size and the channels of the modality."""
    size, mode = (config.width, config.height), MODES[config.channels]
    picture = picture if picture.mode == mode else _converted(picture, mode)
    if picture.size != size:
        how = FILTERS[config.filter]
        ratio = min(size[0] / picture.width, size[1] / picture.height)
        if config.fit == "pad" and round(min(picture.size) * ratio) < 1:
            # A long picture keeps one pixel of its width, which Pillow below 13 rounds away.
            width, height = (max(1, round(side * ratio)) for side in picture.size)
            picture = picture.resize((width, height), how)
        picture = (
            ImageOps.pad(picture, size, how, color="white")
            if config.fit == "pad"
            else picture.resize(size, how)
        )
    return np.array(picture, np.uint8).reshape(config.height, config.width, config.channels)


def _patches(
    pixels: UInt8[np.ndarray, "height width channels"], config: ImageConfig
) -> UInt8[np.ndarray, "patches patch_values"]:
    """Squares, row by row, each a row of its pixels."""
    (rows, columns), side = config.grid, config.patch
    cut = pixels.reshape(rows, side, columns, side, config.channels).swapaxes(1, 2)
    return cut.reshape(rows * columns, -1)


def _nearest(
    patches: UInt8[np.ndarray, "patches patch_values"],
    codebook: Float32[np.ndarray, "codes patch_values"],
) -> Int64[np.ndarray, " patches"]:
    """The nearest code of each patch (Euclid), the lowest of equals; in fp64, in which bytes are
    compared exactly."""
    codes = codebook.astype(np.float64)
    half: Float64[np.ndarray, " codes"] = np.square(codes).sum(axis=1) / 2
    step = max(1, (4 << 20) // len(codes))  # 32 MB of distances
    found = [
        (half - patches[start : start + step].astype(np.float64) @ codes.T).argmin(axis=1)
        for start in range(0, len(patches), step)
    ]
    return np.concatenate(found)


def _distinct(
    centroids: Float32[np.ndarray, "codes patch_values"],
    different: UInt8[np.ndarray, "points patch_values"],
    codes: int,
) -> Float32[np.ndarray, "codes patch_values"]:
    """Centroids in whole numbers, so that what is drawn is read as the same code. Where two become
    one, the patches that lie farthest from all take their place."""
    rounded = np.unique(np.rint(centroids).clip(0, 255).astype(np.uint8), axis=0)
    if len(rounded) < codes:
        known = rounded.astype(np.float32)
        gaps = np.square(different - known[_nearest(different, known)]).sum(axis=1)
        farthest = np.argsort(-gaps, kind="stable")[: codes - len(rounded)]
        rounded = np.concatenate([rounded, different[farthest]])
    return rounded.astype(np.float32)


def _image(pixels: UInt8[np.ndarray, "height width channels"]) -> Pillow.Image:
    """A picture of one, three or four channels."""
    return Pillow.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _png(picture: Pillow.Image) -> bytes:
    """As a file has it."""
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


def _codes(model: Pinned) -> int:
    """How many codes a VQ model has."""
    settings: Any = model.model.config
    emu = model.described["class"] == "Emu3VQVAE"
    return int(settings.codebook_size if emu else settings.num_embeddings)


@contextmanager
def _refusing(model: Pinned, config: ImageConfig) -> Iterator[None]:
    """What goes wrong in a model, as a ZipperError."""
    try:
        yield
    except (ValueError, RuntimeError, IndexError) as error:
        raise ZipperError(
            f"The {model.described['class']} takes no pictures of {config.height}x{config.width} "
            f"pixels: {error!s:.300}. Give the size that it was made for."
        ) from error
