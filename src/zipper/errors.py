"""The one error that means: the user gave something that cannot work.

Topmost in the import order, so that every file may raise it. It knows nothing of what was given;
the sentence does.
"""


class ZipperError(ValueError):
    """Bad input by the user: the message says what was given, what was wanted, what to do. The CLI
    prints it, exits 2."""
