"""Unit files: rows on disk are the rows that were written; mixtures keep their weights and read
every row once an epoch."""

import json
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from zipper.data import rows
from zipper.data.rows import Row, Rows, draws
from zipper.errors import ZipperError

FIRST: list[Row] = [{"text": [1, 2], "speech": [5]}, {"text": []}, {"speech": [7, 8, 9]}]
SECOND: list[Row] = [{"text": [70_000, 3]}, {"text": [4], "hint": [1]}]


def shard(folder: Path, content: list[Row], name: str) -> Path:
    path = folder / f"units-{name * 32}.safetensors"
    rows.write_shard(
        path,
        content,
        [f"{name}{n}" for n in range(len(content))],
        [0.5 * n for n in range(len(content))],
        {"a": 1},
    )
    return path


def two(folder: Path) -> Rows:
    return Rows([shard(folder, FIRST, "a"), shard(folder, SECOND, "b")])


def test_rows_are_those_that_were_written(tmp_path: Path) -> None:
    found = two(tmp_path)
    assert len(found) == 5 and list(found) == FIRST + SECOND
    assert found[-1] == SECOND[-1] and list(found[1:4]) == [*FIRST[1:], SECOND[0]]
    assert found.fields == ["hint", "speech", "text"]
    assert found.lengths.tolist() == [3, 0, 3, 2, 2] and found.lengths_of("text").tolist() == [
        2,
        0,
        -1,
        2,
        1,
    ]
    assert found.seconds.tolist() == [0.0, 0.5, 1.0, 0.0, 0.5]
    assert [found.name(n) for n in range(5)] == ["a0", "a1", "a2", "b0", "b1"]
    with pytest.raises(IndexError):
        found[5]


def test_selections_and_joins_are_views_in_the_order_asked_for(tmp_path: Path) -> None:
    found = two(tmp_path)
    long = found.select((found.lengths >= 2) & (found.lengths_of("speech") < 3))
    assert list(long) == [FIRST[0], *SECOND]
    both = Rows.join([long, found.select(np.array([4, 2]))])
    assert list(both) == [FIRST[0], *SECOND, SECOND[1], FIRST[2]]
    assert both.lengths.tolist() == [3, 2, 2, 2, 3] and both.name(4) == "a2"


def test_a_pickle_holds_paths_and_no_content(tmp_path: Path) -> None:
    big = shard(tmp_path, [{"text": list(range(30_000))}] * 4, "c")
    found = Rows([big])[1:]
    pickled = pickle.dumps(found)
    assert len(pickled) < 1_000
    assert list(pickle.loads(pickled)) == list(found)


def test_the_same_rows_are_the_same_bytes_and_ids_take_two_where_they_can(tmp_path: Path) -> None:
    path = shard(tmp_path, FIRST, "a")
    before = path.read_bytes()
    assert shard(tmp_path, FIRST, "a").read_bytes() == before and [
        p.name for p in tmp_path.iterdir()
    ] == [path.name]
    assert (
        load_file(path)["ids.text"].dtype == np.int16
        and load_file(shard(tmp_path, SECOND, "b"))["ids.text"].dtype == np.int32
    )
    assert rows.read_record(path) == {"a": 1}
    path.write_bytes(before[:-1])
    assert rows.read_record(path) is None and rows.read_record(tmp_path / "gone") is None


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ZipperError, match=r"model.safetensors is no unit file: 'seconds'"):
        Rows([tmp_path / "model.safetensors"])
    held = load_file(shard(tmp_path, FIRST, "a"))
    save_file(
        held | {"lengths.text": np.array([2, 1, -1], np.int32)}, tmp_path / "wrong.safetensors"
    )
    with pytest.raises(ZipperError, match="the lengths of 'text' do not add up"):
        Rows([tmp_path / "wrong.safetensors"])
    with pytest.raises(ZipperError, match="holds no finished unit files"):
        Rows.open(tmp_path)
    for told in (
        {},
        {"modalities": {}, "shards": [{"file": "../secret"}]},
        {"modalities": [], "shards": []},
        {"shards": 3},
    ):
        (tmp_path / rows.PROVENANCE).write_text(json.dumps(told))
        with pytest.raises(ZipperError, match="is damaged, or no list of unit files"):
            Rows.open(tmp_path)


def test_a_mixture_has_its_weights_in_every_thousand_draws_and_every_epoch_reads_each_row_once() -> (
    None
):
    sizes, weights = [50, 700, 3], [3.0, 6.9, 0.1]
    found = draws(range(7_000), 0, sizes, weights)
    for start in range(0, 7_000, 1_000):
        assert Counter(source for source, _ in found[start : start + 1_000]) == {
            0: 300,
            1: 690,
            2: 10,
        }
    for source, size in enumerate(sizes):
        places = [place for s, place in found if s == source]
        epochs = [places[start : start + size] for start in range(0, len(places) - size + 1, size)]
        assert len(epochs) >= 6 and all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_a_draw_depends_on_its_number_and_the_seed_alone() -> None:
    sizes, weights = [50, 700], [1.0, 2.0]
    found = draws(range(3_000), 5, sizes, weights)
    assert [draws(range(k, k + 1), 5, sizes, weights)[0] for k in (2_999, 0, 1_500)] == [
        found[k] for k in (2_999, 0, 1_500)
    ]
    assert found != draws(range(3_000), 6, sizes, weights)


def test_more_sources_than_a_thousand_draws_can_hold_are_refused() -> None:
    assert {source for source, _ in draws(range(1_000), 0, [5] * 1_000, [1.0] * 1_000)} == {
        *range(1_000)
    }
    with pytest.raises(ZipperError, match="1001 sources were to be mixed; 1000 are the most"):
        draws(range(3), 0, [5] * 1_001, [1.0] * 1_001)


def test_one_source_is_read_in_the_order_that_runs_have_always_had() -> None:
    wanted = [
        np.random.default_rng(
            np.random.SeedSequence((3, epoch, 2)).generate_state(1)[0]
        ).permutation(40)
        for epoch in range(60)
    ]
    assert draws(range(2_400), 3, [40], [0.1]) == [
        (0, int(place)) for epoch in wanted for place in epoch
    ]
    assert draws(range(80), 3, [40, 7], [1.0, 0.0]) == draws(range(80), 3, [40], [1.0])


def test_a_rare_source_is_drawn_all_the_same() -> None:
    assert Counter(s for s, _ in draws(range(1_000), 0, [5, 5, 5], [1.0, 1e-9, 1e-9])) == {
        0: 998,
        1: 1,
        2: 1,
    }


@pytest.mark.parametrize(
    ("sizes", "weights"),
    [([3], [0.0]), ([3, 0], [1.0, 1.0]), ([3], [1.0, 1.0]), ([], []), ([3], [float("inf")])],
)
def test_a_mixture_of_nothing_is_refused(sizes: list[int], weights: list[float]) -> None:
    with pytest.raises(ZipperError, match="were to be mixed by"):
        draws(range(1), 0, sizes, weights)


def test_many_sources_of_less_than_a_draw_take_from_the_largest_one_by_one() -> None:
    weights = [1.0] * 20 + [1e-6] * 100
    found = Counter(source for source, _ in draws(range(1000), 0, [10] * 120, weights))
    assert {*found} == {*range(120)} and all(found[n] == 1 for n in range(20, 120))
    assert {found[n] for n in range(20)} == {45}
