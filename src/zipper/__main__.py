"""`python -m zipper`, which `torchrun -m zipper train ...` and `accelerate launch -m zipper train
...` need."""

import sys

from zipper.cli import main

if __name__ == "__main__":
    sys.exit(main())
