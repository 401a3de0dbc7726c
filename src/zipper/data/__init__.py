"""From people's files to rows of ids."""

from zipper.data.manifests import *  # noqa: F403
