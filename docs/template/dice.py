"""A modality of one's own, to copy: rolls of a die, written as digits, "3146".

Rename, change `encode` and `decode`, and say in a package's pyproject.toml:

    [project.entry-points."zipper.modalities"]
    dice = "dice:Dice"

Then every command knows it: zipper fit, units, pretrain, train, run, evaluate, show, verify, push.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zipper.errors import ZipperError
from zipper.modality import Kind
from zipper.saving.files import read_json, write_json


class Dice(Kind):
    """Rolls <-> ids: side n is id n - 1, `sides` begins a segment, `sides` + 1 ends one."""

    name = "dice"
    takes = "rolls as digits, such as '3146'"
    like = "3146"

    def __init__(self, sides: int = 6) -> None:
        self.sides, self.begin, self.end, self.vocabulary = sides, sides, sides + 1, sides + 2

    @property
    def fingerprint(self) -> str:
        """Of all that decides the ids."""
        return hashlib.sha256(f"dice {self.sides}".encode()).hexdigest()

    def encode(self, raw: str) -> list[int]:
        """Ids without begin and end."""
        if not isinstance(raw, str) or not all(roll in "123456789"[: self.sides] for roll in raw):
            raise ZipperError(f"{raw!r:.80} was given; give {self.takes}, of {self.sides} sides.")
        return [int(roll) - 1 for roll in raw]

    def decode(self, ids: Sequence[int]) -> str:
        """Rolls; begin and end are passed over."""
        return "".join(str(number + 1) for number in ids if number < self.sides)

    def save(self, folder: str | Path) -> None:
        """All that `load` needs."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / "dice.json", {"sides": self.sides})

    @classmethod
    def load(cls, folder: str | Path) -> "Dice":
        """What `save` wrote; anything else is an error."""
        sides = read_json(Path(folder) / "dice.json").get("sides")
        if type(sides) is not int or not 1 < sides < 10:
            raise ZipperError(f"{folder} holds dice of {sides!r:.80} sides; 2 to 9 were wanted.")
        return cls(sides)

    @classmethod
    def fitted(cls, values: Sequence[Any], sides: int = 6) -> "Dice":
        """Dice as in these rolls, a string each."""
        made = cls(sides)
        for rolls in values:
            made.encode(rolls)
        return made

    @classmethod
    def example(cls, folder: Path) -> str:
        """A manifest of rolls and their sums in words; returns options of `zipper fit`."""
        words = {"11": "two", "12": "three", "66": "twelve", "34": "seven"}
        rows = [f'{{"text": "{sum_}", "dice": "{rolls}"}}\n' for rolls, sum_ in words.items()]
        (folder / "manifest.jsonl").write_text("".join(rows), encoding="utf-8")
        return "--set sides=6"
