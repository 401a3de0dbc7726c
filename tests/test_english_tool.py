"""`tools/english.py train`, in tiny sizes: all three stages, and a call that goes on."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

from zipper.data import manifests
from zipper.pipeline import Pipeline

ROOT = Path(__file__).parents[1]
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    path = ROOT / "tools" / "english.py"
    spec = importlib.util.spec_from_file_location("english_tool", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "english_tool", module)
    spec.loader.exec_module(module)
    whole = module.configs

    def configs(folder: Path, output: Path) -> Any:
        for name, config in whole(folder, output):
            few = {"mixed_precision": "no", "eval_rows": 4, "warmup": 2}
            yield name, replace(config, **few, calibrate=8 if name == "zip" else 0)

    for name, value in {
        "configs": configs,
        "PROBE": 6,
        "LEAST": 4,
        "STAGES": dict.fromkeys(module.STAGES, (0.0, 4)),
        "TEXT_TOWER": module.TEXT_TOWER | SMALL,
        "SPEECH_TOWER": module.SPEECH_TOWER | SMALL,
    }.items():
        monkeypatch.setattr(module, name, value)
    return module


@pytest.mark.slow
def test_three_stages_end_in_a_zip_and_a_second_call_has_nothing_to_do(
    tool: Any, tmp_path: Path
) -> None:
    text, units = tiny.text(), tiny.units()
    text.save(tmp_path / "text")
    units.save(tmp_path / "speech")
    rows = [tool._ids(row, text) for row in tiny.pairs(24)]
    for name in (*tool.PAIRS, "dev"):
        manifests.write(tmp_path / f"{name}.jsonl", rows)
    for name in ("text", "speech"):
        manifests.write(tmp_path / f"{name}.jsonl", [{name: row[name]} for row in rows])
    out = tmp_path / "out"
    (out / "text-probe").mkdir(parents=True)  # what a killed call left
    (out / "text-probe" / "config.json").write_text("{}")
    tool.run(tmp_path, out, 1.0, out / "told.json")
    told = json.loads((out / "told.json").read_text())
    assert [*told] == ["text", "speech", "zip"]
    assert all(stage["rows"][-1]["step"] == stage["steps"] >= 4 for stage in told.values())
    made = Pipeline.from_pretrained(out / "zip" / "model")
    assert made.zip.config.towers["speech"].train and not made.zip.config.towers["text"].train
    before = (out / "zip" / "metrics.jsonl").read_bytes()
    tool.run(tmp_path, out, 1.0, out / "again.json")
    assert (out / "zip" / "metrics.jsonl").read_bytes() == before
