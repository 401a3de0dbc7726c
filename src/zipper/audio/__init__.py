"""Sound: read, written and disturbed."""

from zipper.audio.sound import HIGHEST_RATE_HZ as HIGHEST_RATE_HZ
from zipper.audio.sound import LONGEST_S as LONGEST_S
from zipper.audio.sound import LOWEST_RATE_HZ as LOWEST_RATE_HZ
from zipper.audio.sound import Audio as Audio
from zipper.audio.sound import Front as Front
from zipper.audio.sound import Mel as Mel
from zipper.audio.sound import check_writable as check_writable
from zipper.audio.sound import read as read
from zipper.audio.sound import write as write
from zipper.former import names_of

__getattr__ = names_of(__name__, ("zipper.audio.sound",))
