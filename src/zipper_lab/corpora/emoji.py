"""Emoji: some 1,900 named things, each drawn by two hands.

The public originals are the npm packages emoji-datasource-google and emoji-datasource-twitter
(16.0.0; pictures Apache-2.0 and CC BY 4.0): folders, or archives, of PNGs of 64 pixels, one of them
with emoji.json. Knows no model.
"""

import io
import json
import re
import unicodedata
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from zipper.data import manifests
from zipper.environment import extra
from zipper.errors import ZipperError
from zipper_lab.corpora.originals import contents, original, part

STYLES = ("google", "twitter")
HOME = "npm emoji-datasource-google and emoji-datasource-twitter, 16.0.0"
SIDE = 24  # pixels: 36 patches of 4 by 4
TONES = {
    "1F3FB": "light skin",
    "1F3FC": "medium light skin",
    "1F3FD": "medium skin",
    "1F3FE": "medium dark skin",
    "1F3FF": "dark skin",
}
SIGNS = {"&": "and", "*": "asterisk", "\N{RIGHT SINGLE QUOTATION MARK}": "'"}
#: Of all names; the rest is trained on.
SHARES = {"test": 0.1, "dev": 0.05}
#: Of the names that are trained on: those of which the second style is held back.
KNOWN = {"known": 0.1}


@dataclass(frozen=True)
class Named:
    """A thing that is drawn. base: its name without a tone of skin; name: with it. file: of its
    picture, in every style."""

    base: str
    name: str
    category: str
    file: str


def write(data: Path, folder: Path, seed: int = 0) -> None:
    """Manifests and pictures: pairs of a picture and its name.

    train.jsonl, dev.jsonl, test.jsonl: by name, so that both styles and all tones of skin of a
    thing are in one part. known.jsonl: things that train.jsonl has in the first style, in the
    second one. Rows hold "text" (the category and the name: "flags: andorra flag"), "styled:text"
    (the style before that), "image" (a PNG of SIDE pixels, on white), and for judges "name",
    "category" and "style". unpaired.jsonl: the pictures of train.jsonl, as they are and mirrored;
    texts.jsonl: its texts. data: the folder that holds the two originals. Raises ZipperError if one
    of them is missing.
    """
    places = {style: original(data, _patterns(style), HOME) for style in STYLES}
    things = {thing.file: thing for thing in _named(places)}
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "dev": [], "test": [], "known": []}
    alone: list[dict[str, Any]] = []
    for style, place in places.items():
        for name, content in contents(place, ".png"):
            thing = things.get(Path(name).name)
            if thing is None:
                continue
            row = _row(style, thing)
            owner = part(f"{seed} {thing.base}", SHARES)
            if owner == "train" and style != STYLES[0]:
                owner = part(f"{seed} style {thing.base}", KNOWN)
            picture = _small(content, name)
            _save(picture, folder / row["image"])
            rows[owner].append(row)
            if owner == "train":
                mirrored = row["image"].replace(".png", "-mirrored.png")
                _save(picture[:, ::-1], folder / mirrored)
                alone += [{"id": row["id"], "image": row["image"]}]
                alone += [{"id": f"{row['id']}-mirrored", "image": mirrored}]
    if not rows["train"]:
        raise ZipperError(
            f"{data} holds none of the {len(things)} pictures that emoji.json names. Fetch {HOME} "
            "again."
        )
    for owner, some in rows.items():
        manifests.write(folder / f"{owner}.jsonl", some)
    manifests.write(folder / "unpaired.jsonl", alone)
    said = {row["text"] for row in rows["train"]} | {row["styled:text"] for row in rows["train"]}
    manifests.write(folder / "texts.jsonl", [{"text": text} for text in sorted(said)])


def _patterns(style: str) -> tuple[str, ...]:
    return f"emoji-datasource-{style}*", f"emoji*{style}*", style


def _named(places: dict[str, Path]) -> list[Named]:
    """What emoji.json says, from whichever original has one."""
    found_in = chain.from_iterable(contents(place, "emoji.json") for place in places.values())
    listed = [content for name, content in found_in if Path(name).name == "emoji.json"]
    if not listed:
        raise ZipperError(
            f"None of {', '.join(str(place) for place in places.values())} holds emoji.json, which "
            f"names the pictures. Take it from {HOME}."
        )
    found = []
    for entry in json.loads(listed[0]):
        base = _plain(entry["name"])
        kind = _plain(entry["category"])
        found.append(Named(base, base, kind, entry["image"]))
        for tones, drawn in entry.get("skin_variations", {}).items():
            skin = " and ".join(TONES.get(tone, tone.lower()) for tone in tones.split("-"))
            found.append(Named(base, f"{base}, {skin}", kind, drawn["image"]))
    return found


def _plain(said: str) -> str:
    """In small ASCII letters, with words for signs: no part has a character that another lacks."""
    for sign, word in SIGNS.items():
        said = said.replace(sign, word)
    said = unicodedata.normalize("NFKD", said.lower()).encode("ascii", "ignore").decode()
    return " ".join(re.sub(r"[^a-z0-9':,]", " ", said).split())


def _row(style: str, thing: Named) -> dict[str, Any]:
    stem = f"{style}-{thing.file.removesuffix('.png')}"
    return {
        "id": stem,
        "text": f"{thing.category}: {thing.name}",
        "styled:text": f"{style}, {thing.category}: {thing.name}",
        "image": f"pictures/{stem}.png",
        "name": thing.name,
        "category": thing.category,
        "style": style,
    }


def _small(content: bytes, name: str) -> Any:
    """The picture on white, SIDE by SIDE pixels, as an array (side, side, 3) of bytes."""
    images = extra("PIL.Image")
    try:
        drawn = images.open(io.BytesIO(content)).convert("RGBA")
    except OSError as error:
        raise ZipperError(f"{name} is no picture ({error}). Fetch {HOME} again.") from error
    white = images.new("RGBA", drawn.size, "white")
    white.alpha_composite(drawn)
    return np.asarray(white.convert("RGB").resize((SIDE, SIDE), images.Resampling.LANCZOS))


def _save(picture: Any, path: Path) -> None:
    extra("PIL.Image").fromarray(picture.copy()).save(path)
