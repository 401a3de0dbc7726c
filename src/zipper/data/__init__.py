"""From people's files to rows of ids."""

from zipper.data.manifests import Sample as Sample
from zipper.data.manifests import Taken as Taken
from zipper.data.manifests import encode as encode
from zipper.data.manifests import manifest as manifest
from zipper.data.manifests import read as read
from zipper.data.manifests import samples as samples
from zipper.data.manifests import take as take
from zipper.data.manifests import write as write
from zipper.data.rows import Row as Row
from zipper.data.rows import Rows as Rows
from zipper.former import names_of

__getattr__ = names_of(__name__, ("zipper.data.manifests",))
