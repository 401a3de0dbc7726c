"""The errors that mean: the user gave something that cannot work. One tree: one `except` catches
all.

    ZipperError            bad input: what was given, what was wanted, what to do
    |- UnsupportedTower    a model that cannot be run part way as it runs itself
    |- Mismatch            another tower, tokenizer or codebook than at training
    |- DamagedFile         a saved file that is not what its manifest says
    |- LostTower           a frozen tower of a saved zip is in none of its places
    |- NoRoom              a tower that can read no further segment
    `- MissingExtra        an extra of the package that is asked for is not installed
       `- BrokenExtra      it is installed and cannot be imported

Topmost in the import order, so that every file may raise them. They know nothing of what was given;
the sentence does.
"""


class ZipperError(ValueError):
    """Bad input by the user: the message says what was given, what was wanted, what to do. The
    command line prints it and exits with 2."""


class UnsupportedTower(ZipperError):
    """A model that the driver cannot run exactly as the model runs itself."""


class Mismatch(ZipperError):
    """Another tower, tokenizer or codebook than the one that a model was trained with: hashes
    differ."""


class DamagedFile(ZipperError):
    """A saved file whose content is not what the manifest beside it says, or that cannot be read as
    what it should be."""


class LostTower(ZipperError):
    """A frozen tower of a saved zip is in none of its places. name: the tower's."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


class NoRoom(ZipperError):
    """A tower has no room for another segment."""


class MissingExtra(ZipperError):
    """Something is asked for that an extra of the package is for, and that is not installed: no
    data and no model is to blame."""


class BrokenExtra(MissingExtra):
    """It is installed and cannot be imported."""
