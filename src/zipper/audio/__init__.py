"""Sound: read, written and disturbed."""

from zipper.audio.sound import *  # noqa: F403
