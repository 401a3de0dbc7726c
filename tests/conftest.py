"""What every test stands on: shapes checked at run time, one thread, no hub, the same random examples every time.

The shapes in the signatures of zipper are checked here and nowhere else; users do not pay for it. This file must not
import zipper: the import hook only reaches modules that are imported after it.
"""

import os

# Before torch is imported: one thread a process, and sleeping rather than spinning while another process works.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jaxtyping
import torch
from hypothesis import settings

jaxtyping.install_import_hook("zipper", "beartype.beartype")
torch.set_num_threads(1)
settings.register_profile("zipper", deadline=None, derandomize=True)
settings.load_profile("zipper")
