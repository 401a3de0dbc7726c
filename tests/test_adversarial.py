"""Raw data that nobody should give: an answer or one clear sentence, in the memory of the data and
200 MB, for every kind that is shipped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# What may become ids: little, odd or of another colour, and never much.
TAKEN = {"nothing", "one sample", "one pixel", "CMYK", "one step"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_every_kind_answers_or_refuses_in_little_memory(tmp_path: Path) -> None:
    program = [sys.executable, str(Path(__file__).with_name("adversarial.py")), str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {one["kind"] for one in found} == {
        "text",
        "symbols",
        "speech",
        "codec",
        "units",
        "image",
        "signal",
    }
    for one in found:
        assert one["rise_mb"] <= 200, one
        assert one["said"].startswith("refused: ") != (one["what"] in TAKEN), one
