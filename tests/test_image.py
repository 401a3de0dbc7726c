"""Pictures as codes: what is read, what is refused, and what comes back."""

import contextlib
import io
import json
import random
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers

from zipper import Pipeline, Segment, modality
from zipper.cli import main
from zipper.errors import ZipperError
from zipper.link import LinkConfig
from zipper.modality.image import VQ, Image, ImageConfig, _plain
from zipper.model import Zipper
from zipper.testing import tiny_tower

Pillow = pytest.importorskip("PIL.Image")
ImageOps = pytest.importorskip("PIL.ImageOps")
pytest.importorskip("sklearn")

SETTINGS: dict[str, dict[str, Any]] = {
    "ChameleonVQVAE": {"num_embeddings": 24, "resolution": 16},
    "Emu3VQVAE": {"codebook_size": 24, "attn_resolutions": [1], "hidden_size": 64},
    "JanusVQVAE": {"num_embeddings": 24, "num_patches": 8},
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    Image.example(folder)
    return folder


@pytest.fixture(scope="module")
def grey(digits: Path) -> Image:
    return Image.fitted(rows(digits), codes=48, patch=2, size=(8, 8), channels=1)


@pytest.fixture(scope="module")
def colour() -> Image:
    return Image.fitted([noise(seed) for seed in range(8)], codes=40, patch=4, size=(16, 16))


def vq_model(name: str) -> Any:
    """A random VQ model of a class of transformers."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    shape = {"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1}
    shape |= {"latent_channels": 8, "embed_dim": 8}
    model = cls(cls.config_class(**shape, **SETTINGS[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def vq(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random VQ models, saved as a folder of the hub is."""
    place = tmp_path_factory.mktemp("vq")
    for name in VQ:
        vq_model(name).save_pretrained(place / name)
    return {name: place / name for name in VQ}


def rows(folder: Path) -> list[Path]:
    lines = (folder / "manifest.jsonl").read_text().splitlines()
    return [folder / json.loads(line)["image"] for line in lines]


def noise(seed: int = 0, size: tuple[int, ...] = (16, 16, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def png(picture: Any, kind: str = "PNG", **settings: Any) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, **settings)
    return content.getvalue()


def small_file_of(width: int, height: int) -> bytes:
    """A PNG of one bit a pixel, all 0."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + check

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    data = zlib.compress(bytes((1 + (width + 7) // 8) * height), 9)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


# --- laws


def test_what_is_drawn_is_read_as_the_same_codes(grey: Image, colour: Image) -> None:
    chance = random.Random(0)
    for image in (grey, colour):
        for _ in range(20):
            many = image.config.grid[0] * image.config.grid[1]
            ids = [chance.randrange(image.codes) for _ in range(many)]
            assert image.encode(image.decode(ids)) == ids


def test_codes_are_nearer_than_one_colour_is(grey: Image, digits: Path) -> None:
    wanted = [grey.read(path) for path in rows(digits)]

    def mse(made: list[Any]) -> float:
        scored = grey.scores(wanted, made)["mse"]
        return sum(error for error, _ in scored) / sum(count for _, count in scored)

    assert mse(wanted) == 0
    mean = np.mean([np.asarray(picture) for picture in wanted]).round().astype(np.uint8)
    floor = mse([Pillow.new("L", (8, 8), int(mean))] * len(wanted))
    assert mse([grey.decode(grey.encode(picture)) for picture in wanted]) < floor / 4


def test_patches_are_read_row_by_row() -> None:
    codebook = np.array([[0] * 4, [255] * 4], np.float32)
    image = Image(ImageConfig(4, 4, 1, patch=2), codebook)
    pixels = np.zeros((4, 4), np.uint8)
    pixels[:2, 2:] = 255
    assert image.encode(pixels) == [0, 1, 0, 0]
    assert np.array_equal(np.asarray(image.decode([0, 1, 0, 0])), pixels)
    assert np.asarray(image.decode([0, 2, 3, 0])).tolist() == [[0] * 4] * 2 + [[255] * 4] * 2


def test_the_same_pictures_make_the_same_codebook(digits: Path, grey: Image) -> None:
    given: dict[str, Any] = {"codes": 48, "patch": 2, "size": (8, 8), "channels": 1}
    assert Image.fitted(rows(digits), **given).fingerprint == grey.fingerprint
    assert Image.fitted(rows(digits), **given, seed=1).fingerprint != grey.fingerprint


def test_whatever_changes_ids_changes_the_fingerprint(colour: Image) -> None:
    base, codebook = {"height": 16, "width": 16}, colour.codebook
    changed = [{}, {"fit": "squash"}, {"filter": "bilinear"}, {"width": 32}, {"first_frame": True}]
    made = [Image(ImageConfig(**base | change), codebook) for change in changed]  # type: ignore[arg-type]
    made.append(Image(ImageConfig(16, 16), codebook[::-1]))
    assert len({image.fingerprint for image in made}) == len(made)


def test_colours_are_those_of_imagegpt(tmp_path: Path) -> None:
    clusters = np.random.default_rng(0).uniform(-1, 1, (32, 3)).astype(np.float32)
    settings = {"clusters": clusters.tolist(), "size": {"height": 8, "width": 8}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    image, pixels = Image.from_imagegpt(tmp_path), noise(size=(8, 8, 3))
    values = (pixels.reshape(-1, 3).astype(np.float64) / 127.5) - 1
    distances = np.square(values[:, None] - clusters[None]).sum(2)
    assert image.encode(pixels) == distances.argmin(1).tolist()
    shown = np.asarray(image.decode([5] * 64))
    assert (shown == np.rint(127.5 * (clusters[5] + 1))).all()
    for wrong in ({}, {"clusters": [[1, 2]]}, {"clusters": "x"}, {**settings, "size": "x"}):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(wrong))
        with pytest.raises(ZipperError, match=r"holds no clusters|The size"):
            Image.from_imagegpt(tmp_path)


def test_asking_for_more_codes_than_there_are_patches_is_an_error() -> None:
    with pytest.raises(ZipperError, match=r"1 pictures with 1 different patches .* 2 codes"):
        Image.fitted([np.zeros((8, 8), np.uint8)], codes=2, patch=4, size=(8, 8))
    with pytest.raises(ZipperError, match="0 pictures"):
        Image.fitted([], codes=2)
    with pytest.raises(ZipperError, match="not made of whole patches"):
        ImageConfig(10, 8)


# --- what is read


def test_every_way_to_give_a_picture_means_the_same(colour: Image, tmp_path: Path) -> None:
    pixels = noise(3)
    picture, ids = Pillow.fromarray(pixels), colour.encode(pixels)
    (tmp_path / "a.png").write_bytes(content := png(picture))
    given = [picture, content, tmp_path / "a.png", str(tmp_path / "a.png"), pixels.tolist()]
    given += [{"path": str(tmp_path / "a.png")}, {"bytes": content, "path": None}]
    assert all(colour.encode(value) == ids for value in given)
    assert colour.encode(colour.read("a.png", tmp_path)) == ids
    assert colour.files({"path": "a.png"}, tmp_path) == [tmp_path / "a.png"]
    assert colour.files(content) == []


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "HSV"]
)
def test_pictures_of_every_mode_are_read(mode: str, colour: Image, grey: Image) -> None:
    if mode == "I;16":
        picture = Pillow.fromarray(np.full((16, 16), 0x8000, np.uint16))
    else:
        picture = Pillow.new("RGB", (16, 16), (128, 128, 128)).convert(mode)
    for image, wanted in ((colour, "RGB"), (grey, "L")):
        read = image.read(picture)
        assert read.mode == wanted
        assert mode == "1" or abs(int(np.asarray(read).mean()) - 128) < 4


def test_pixels_with_a_point_are_those_from_0_to_255(colour: Image) -> None:
    shades = np.linspace(0, 255, 256, dtype=np.float32).reshape(16, 16)
    read = np.asarray(colour.read(Pillow.fromarray(shades)))
    assert np.array_equal(read[..., 0], shades.round())
    with pytest.raises(ZipperError, match="numbers with a point from 0 to 1; 0 to 255 were wanted"):
        colour.read(Pillow.fromarray(shades / 255))


def test_what_is_transparent_is_white_and_a_camera_is_held_upright(colour: Image) -> None:
    clear = Pillow.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert (np.asarray(colour.read(png(clear))) == 255).all()
    half = noise(1, (16, 8, 3))
    turned = Pillow.fromarray(half)
    exif = Pillow.Exif()
    exif[0x0112] = 6
    read = colour.read(png(turned, exif=exif.tobytes()))
    assert np.array_equal(np.asarray(read), np.rot90(half, -1))


@pytest.mark.parametrize("number", range(1, 9))
def test_a_camera_is_held_upright_however_it_was_turned(number: int, colour: Image) -> None:
    exif = Pillow.Exif()
    exif[0x0112] = number
    content = png(Pillow.fromarray(noise(1, (16, 8, 3))), exif=exif.tobytes())
    with Pillow.open(io.BytesIO(content)) as picture:
        wanted = np.asarray(ImageOps.exif_transpose(picture))
    assert np.array_equal(np.asarray(colour.read(content)), wanted)


def test_a_colour_of_a_palette_that_is_transparent_is_white(colour: Image) -> None:
    picture = Pillow.new("P", (16, 16), 3)
    picture.putpalette([255, 0, 0] * 256)
    assert (np.asarray(colour.read(png(picture)))[..., 1] == 0).all()
    assert (np.asarray(colour.read(png(picture, transparency=3))) == 255).all()


def test_a_large_picture_is_shrunk_to_no_less_than_twice_the_size(colour: Image) -> None:
    wide = colour.read(np.zeros((1_000, 5_000), np.uint8))
    assert wide.width * wide.height < 100_000 and min(wide.size) >= 2 * 16
    small = colour.read(np.zeros((100, 500), np.uint8))
    assert small.size == (500, 100)


def shades(**settings: Any) -> Image:
    """Grey pictures of 8x8 pixels whose codes are their pixels."""
    config = ImageConfig(8, 8, 1, "colours", 1, **settings)
    return Image(config, np.arange(256, dtype=np.float32)[:, None])


def test_a_squashed_picture_is_resized_by_its_filter_and_has_no_border() -> None:
    pixels = noise(2, (24, 16))
    for name in ("lanczos", "bilinear"):
        how = Pillow.Resampling[name.upper()]
        wanted = np.asarray(Pillow.fromarray(pixels).resize((8, 8), how))
        assert shades(fit="squash", filter=name).encode(pixels) == wanted.ravel().tolist()


def test_how_pictures_were_fitted_is_how_they_are_read() -> None:
    image = Image.fitted(
        [noise(seed) for seed in range(4)], 8, size=(8, 16), fit="squash", first_frame=True
    )
    assert (image.config.height, image.config.width) == (8, 16)
    assert (image.config.fit, image.config.first_frame) == ("squash", True)
    assert image.about()["ids"] == "8 a picture, row by row"


def test_an_error_of_pixels_is_that_of_pixels_from_0_to_1() -> None:
    black, white = np.zeros((8, 8), np.uint8), np.full((8, 8), 255, np.uint8)
    assert shades().scores([black], [white]) == {"mse": [(64.0, 64.0)]}


def test_only_kinds_of_files_that_are_named_are_opened(colour: Image) -> None:
    for kind in ("PCX", "TGA", "ICO"):
        with pytest.raises(ZipperError, match="is no picture that can be read"):
            colour.read(png(Pillow.fromarray(noise()), kind))


def test_a_picture_of_one_pixel_and_a_long_one_are_fitted(colour: Image) -> None:
    config = ImageConfig(16, 16, 1, patch=4)
    image = Image(config, np.array([[0] * 16, [255] * 16], np.float32))
    assert image.encode(np.zeros((1, 1), np.uint8)) == [0] * 16
    assert image.encode(np.zeros((8, 16), np.uint8)) == [1] * 4 + [0] * 8 + [1] * 4  # on white
    assert len(colour.encode(noise(size=(1, 900, 3)))) == 16


def test_a_picture_that_moves_is_refused_unless_its_first_frame_is_asked_for(
    colour: Image,
) -> None:
    first, second = (Pillow.fromarray(noise(seed)) for seed in range(2))
    moving = png(first, "GIF", save_all=True, append_images=[second])
    with pytest.raises(ZipperError, match=r"has 2 frames; .*first_frame=True"):
        colour.encode(moving)
    image = Image(ImageConfig(16, 16, first_frame=True), colour.codebook)
    assert image.encode(moving) == image.encode(png(first, "GIF"))


@pytest.mark.parametrize(
    "value",
    [
        b"no picture",
        "missing.png",
        "",
        b"",
        None,
        3,
        {"path": "a.png", "start": 3},
        {},
        ".",
        "a\0b.png",
        np.zeros((4, 4)),
        np.full((4, 4), np.nan),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((0, 4), np.uint8),
        np.zeros((4,), np.uint8),
        [[0, 256]],
        [[0, -1]],
        [[0, 1], [2]],
        [["a"]],
        [[10**30]],
        small_file_of(30_000, 30_000)[:4_000],
        small_file_of(0, 4),
        png(Pillow.fromarray(noise()))[:300],
        png(Pillow.fromarray(noise()))[:20],
    ],
)
def test_what_is_no_picture_is_one_clear_error(value: Any, colour: Image) -> None:
    with pytest.raises(ZipperError) as found:
        colour.read(value)
    assert 20 < len(str(found.value)) < 800


def test_a_text_file_by_the_name_of_a_picture_is_named(colour: Image, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(ZipperError, match=r"a\.png is no picture"):
        colour.read("a.png", tmp_path)


def test_an_error_says_what_was_given_once(colour: Image, tmp_path: Path) -> None:
    for value, said in (
        ({"path": "a.png", "x": 1}, "{'path': 'a.png', 'x': 1} was given"),
        ("gone.png", "gone.png does not exist, or is no plain file. Give a picture."),
        (b"hello", "The picture given is no picture that can be read, or a damaged one. Give "),
    ):
        with pytest.raises(ZipperError) as found:
            colour.read(value, tmp_path)
        assert said in str(found.value)
        assert len(re.findall(r"\bgive\b", str(found.value), re.IGNORECASE)) == 1


def test_damaged_files_are_refused_or_read_and_nothing_else(colour: Image) -> None:
    chance = random.Random(0)
    whole = [png(Pillow.fromarray(noise()), kind) for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP")]
    for _ in range(300):
        content = bytearray(chance.choice(whole))
        for _ in range(chance.randrange(1, 4)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        with contextlib.suppress(ZipperError):
            assert len(colour.encode(bytes(content))) == 16


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB there")
def test_a_small_file_of_900_million_pixels_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(small_file_of(30_000, 30_000))
    assert (tmp_path / "large.png").stat().st_size < 1 << 20
    program = """
import resource, sys
import numpy as np
from zipper.errors import ZipperError
from zipper.modality.image import Image, ImageConfig
image = Image(ImageConfig(8, 8, 1, patch=8), np.zeros((1, 64), np.float32))
image.encode(np.zeros((8, 8), np.uint8))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    image.read(sys.argv[1])
except ZipperError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "large.png"],
        capture_output=True,
        text=True,
        check=True,
    )
    said, more = done.stdout.splitlines()
    assert "30000x30000 pixels; at most 24000000" in said or "far more than" in said
    assert int(more) < 200 << 10


def test_a_picture_is_written_shown_and_told(colour: Image, tmp_path: Path) -> None:
    picture = colour.decode(colour.encode(noise()))
    colour.write(picture, tmp_path / "made.png")
    assert np.array_equal(np.asarray(colour.read(tmp_path / "made.png")), np.asarray(picture))
    shown = colour.html(picture)
    assert "data:image/png;base64," in shown and "pixelated" in shown and 'width="128"' in shown
    assert colour.told(picture) == "a picture of 16x16 pixels"
    assert colour.about()["size"] == "16x16, 3 channels, 40 codes of 4x4 pixels"


# --- saved


def test_a_saved_one_is_the_same(colour: Image, tmp_path: Path) -> None:
    modality.save(colour, tmp_path / "image")
    again = modality.load(tmp_path / "image")
    assert again.fingerprint == colour.fingerprint and again.encode(noise()) == colour.encode(
        noise()
    )


@pytest.mark.parametrize(
    "codebook",
    [np.zeros((2, 3)), np.full((2, 4), np.nan), np.full((2, 4), 256.0), np.zeros((0, 4))],
)
def test_a_codebook_that_is_none_is_refused(codebook: np.ndarray) -> None:
    with pytest.raises(ZipperError, match="Fit the pictures anew"):
        Image(ImageConfig(4, 4, 1, patch=2), codebook.astype(np.float32))


# --- VQ models


@pytest.mark.parametrize("name", VQ)
def test_a_vq_model_reads_draws_and_is_kept(name: str, vq: dict[str, Path], tmp_path: Path) -> None:
    image = Image.from_model(vq[name], (16, 16))
    assert image.vocabulary == 26 and image.config.grid == (8, 8)
    ids = image.encode(noise())
    assert len(ids) == 64 and len(set(ids)) > 4
    model = getattr(transformers, name).from_pretrained(vq[name]).eval()
    given = torch.tensor(noise() / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1)[None]
    named = {"image_sizes": torch.tensor([[16, 16]])} if name == "Emu3VQVAE" else {}
    with torch.no_grad():
        own = model.encode(given, **named).image_tokens
    assert ids == (own[0] if isinstance(own, list) else own).flatten().tolist()
    modality.save(image, tmp_path / "image")
    again = modality.load(tmp_path / "image")
    assert again.fingerprint == image.fingerprint and again.encode(noise()) == ids
    assert not [path for path in (tmp_path / "image").iterdir() if path.is_dir()]  # as zips want it
    if name == "ChameleonVQVAE":
        with pytest.raises(ZipperError, match="has no decoder"):
            again.decode(ids)
    else:
        drawn = np.asarray(again.decode(ids))
        assert drawn.shape == (16, 16, 3) and len(np.unique(drawn)) > 8
        assert (np.asarray(again.decode(ids[:8]))[2:] == 255).all()


def test_a_vq_model_has_its_pixels_normalised_as_it_was_told(vq: dict[str, Path]) -> None:
    image = Image.from_model(vq["JanusVQVAE"], (16, 16), mean=0.25, std=0.75)
    model = transformers.JanusVQVAE.from_pretrained(vq["JanusVQVAE"]).eval()
    given = torch.tensor((noise() / 255 - 0.25) / 0.75, dtype=torch.float32)
    with torch.no_grad():
        ids = model.encode(given.permute(2, 0, 1)[None]).image_tokens.reshape(1, -1)
        drawn = model.decode(ids)[0]
    assert image.encode(noise()) == ids[0].tolist()
    wanted = ((drawn * 0.75 + 0.25) * 255).clamp(0, 255).permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(image.decode(ids[0].tolist())) - wanted).max() < 1


def test_another_model_or_size_or_a_damaged_one_is_refused(
    vq: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ZipperError, match="whole patches"):
        Image.from_model(vq["Emu3VQVAE"], (15, 16))
    tiny_tower("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ZipperError, match="a model of the type 'gpt2'"):
        Image.from_model(tmp_path / "gpt2", (16, 16))
    with pytest.raises(ZipperError, match=r"no config\.json"):
        Image.from_model(tmp_path / "nothing", (16, 16))
    Image.from_model(vq["JanusVQVAE"], (16, 16)).save(tmp_path / "image")
    for name, harm in {
        "vq.json": lambda c: c.replace(b'"embed_dim": 8', b'"embed_dim": 9'),
        "vq.safetensors": lambda c: c[:-4] + b"\0\0\0\1",
        "image.json": lambda c: c.replace(b'"patch": 2', b'"patch": 4'),
    }.items():
        folder = Path(shutil.copytree(tmp_path / "image", tmp_path / name))
        content = (folder / name).read_bytes()
        changed = harm(content)
        assert changed != content
        (folder / name).write_bytes(changed)
        with pytest.raises(ZipperError, match=r"holds no modality of pictures|holds foreign codes"):
            Image.load(folder)


def test_the_command_takes_the_codes_of_a_model(
    vq: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["fit", "image", "--vq", str(vq["JanusVQVAE"]), "-o", str(tmp_path / "vq")]
    assert main([*given, "--set", "size=[16,16]"]) == 0
    assert "image of 26 ids" in capsys.readouterr().out
    made = Image.from_model(vq["JanusVQVAE"], (16, 16))
    assert modality.load(tmp_path / "vq").fingerprint == made.fingerprint
    settings = {"clusters": [[-1.0, 0, 1], [1, 1, 1]], "size": {"height": 4, "width": 4}}
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "preprocessor_config.json").write_text(json.dumps(settings))
    taken = ["fit", "image", "--model", str(tmp_path / "gpt"), "-o"]
    assert main([*taken, str(tmp_path / "colours")]) == 0
    assert modality.load(tmp_path / "colours").vocabulary == 3
    assert main([*taken, str(tmp_path / "less"), "--set", "size=[3,4]"]) == 0
    assert modality.load(tmp_path / "less").length == 12
    capsys.readouterr()
    for wrong, said in (
        ([*given[:5], str(tmp_path / "new")], "Say which: size"),
        ([*given[:5], str(tmp_path / "new"), "--set", "codes=3"], "'codes' is no setting"),
        (["fit", "signal", "--model", "x", "-o", str(tmp_path / "new")], "stands on no model"),
        (["fit", "image", "a", "--vq", "b", "-o", str(tmp_path / "new")], "instead of data"),
    ):
        assert main(wrong) == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


# --- zipped


def test_a_zip_with_pictures_is_saved_loaded_and_runs(colour: Image, tmp_path: Path) -> None:
    modalities: dict[str, Any] = {"text": tiny.text(), "image": colour}
    towers, ends = {}, {}
    for name, each in modalities.items():
        towers[name] = tiny_tower("llama", vocabulary=each.vocabulary)
        ends[name] = each.begin, each.end
    link = LinkConfig(head_width=16)
    model = Zipper.from_towers(towers, train=("image",), ends=ends, link=link)
    pipe = Pipeline(model, modalities)
    pipe.save_pretrained(tmp_path / "zip", include=["text"])
    again = Pipeline.from_pretrained(tmp_path / "zip")
    given = [Segment("image", colour.read(noise()))]
    said = pipe.run(given, ["text"], limits={"text": 3})
    assert again.run(given, ["text"], limits={"text": 3}) == said
    (drawn,) = again.run([Segment("text", "anna")], ["image"], limits={"image": 16})
    assert drawn.content.size == (16, 16)


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_deep_pictures_are_read_alike_by_any_pillow_and_stay_upright(mode: str) -> None:
    def deep(values: Any) -> Pillow.Image:
        picture = Pillow.fromarray(np.asarray(values, np.uint16))
        return picture if mode == "I;16" else picture.convert("I")

    shallow = deep(np.full((16, 16), 200))
    assert np.unique(np.asarray(_plain(shallow, ImageConfig(16, 16)))).tolist() == [200]
    whole = deep(np.linspace(0, 65_535, 256).reshape(16, 16))
    assert np.asarray(_plain(whole, ImageConfig(16, 16))).max() == 255
    tall = deep(np.zeros((16, 8)))
    tall.getexif()[0x0112] = 6
    assert _plain(tall, ImageConfig(16, 16)).size == (16, 8)


def test_a_picture_that_breaks_off_is_refused_however_it_is_given(
    colour: Image, tmp_path: Path
) -> None:
    Pillow.fromarray(noise(0, (64, 64, 3))).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ZipperError, match="The picture given cannot be read"):
        colour.encode(Pillow.open(tmp_path / "cut.png"))
