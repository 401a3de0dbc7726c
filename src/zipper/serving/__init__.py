"""A server for one model: its requests share steps, its answers have the shapes that existing
clients of speech and chat services read.

Nothing in zipper imports it but the command `zipper serve`; its packages are the extra `serve`.
"""

from zipper.environment import need

need("serve")  # here, for its files take classes of these packages apart and inherit from them
