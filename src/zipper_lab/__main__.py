"""`python -m zipper_lab`: the command line with the laboratory's commands, also where zipper runs
from a checkout and is not installed."""

import sys

from zipper.cli import main
from zipper_lab.commands import commands

if __name__ == "__main__":
    sys.exit(main(beside=commands))
