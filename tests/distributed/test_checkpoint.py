"""Checkpoints of states that are spread over gloo ranks: resharded exactly, and every rank sees the same failure."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch for all cases: ranks are forked, imports cost more than all of them."""
    folder = tmp_path_factory.mktemp("saves")
    env = os.environ | {"PYTHONPATH": str(HERE.parents[1] / "engine"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "sharded_saves.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "stderr").write_text(done.stderr)
    return folder


@pytest.fixture
def saw(folder: Path) -> Any:
    """saw(case) -> what each rank saw, in order."""
    results = json.loads((folder / "results.json").read_text())

    def of(case: str) -> list[dict[str, Any]]:
        found = [seen for _, seen in sorted(results[case].items())]
        bad = [seen for seen in found if seen.get("code", 0) not in (0, -9)]
        assert not bad, (case, found, (folder / "stderr").read_text()[-3000:])
        return found

    return of


def test_two_ranks_save_while_the_loop_talks(saw):
    for seen in saw("reshard_1_save_on_two"):
        assert seen["busy"], "the write was over before the loop's collectives: the test shows nothing"
        assert seen["sums"]
        assert (seen["step"], seen["differs"]) == (1, [])


@pytest.mark.parametrize(
    "case", ["reshard_2_to_one_and_back", "reshard_3_from_one_to_three", "reshard_4_from_three_to_two"]
)
def test_another_number_of_ranks_reads_the_same_bits(saw, case):
    assert [seen["differs"] for seen in saw(case)] == [[]] * len(saw(case))


def test_everything_is_written_once_as_safetensors_and_json(folder, saw):
    first, second = saw("reshard_1_save_on_two")
    sizes: dict[str, int] = {}
    path = folder / "resharded" / "step-000001"
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    assert len(list(path.glob("shard-*"))) == 2
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118 (no mapping)
                sizes[name] = sizes.get(name, 0) + math.prod(content.get_slice(name).get_shape())
    expected = {
        "model/uneven": 15,
        "model/one_row": 6,
        "model/columns": 28,
        "model/everywhere": 9,
        "model/plain": 22,
        "optimizer/uneven/step": 1,
        "optimizer/uneven/exp_avg": 15,
        "optimizer/columns/step": 1,
    }
    assert sizes == expected
    assert first["copied"] + second["copied"] == sum(expected.values())
    # Tensors that both hold are shared out too: no rank copies more than about its half.
    assert max(first["copied"], second["copied"]) < 0.6 * sum(expected.values())
    content = json.loads((path / "checkpoint.json").read_text())
    assert (content["world"], content["strategy"]) == (2, "test")


def test_groups_that_hold_the_same_write_it_once(saw):
    found = saw("sharded_and_replicated")
    assert [seen["differs"] for seen in found] == [[]] * 4
    assert sum(seen["copied"] for seen in found) == 97


def test_a_rank_that_cannot_write_stops_all_and_costs_nothing(saw):
    for seen in saw("one_rank_cannot_write"):
        for part in ("step-000002", "(rank 1: No space left on device)", "full/step-000001. Free some disk"):
            assert part in seen["said"]
        assert (seen["step"], seen["differs"]) == (1, [])
        assert seen["left"] == ["last", "step-000001"]


def test_all_ranks_fall_back_to_the_same_one(saw):
    first, second = saw("damaged_newest")
    assert first == second
    assert (first["step"], first["differs"]) == (1, [])
    assert "step-000002 is damaged (shard-00002-" in first["said"][0]


@pytest.mark.parametrize(
    ("case", "part"), [("nothing_usable", "step-000001: checkpoint.json is not"), ("other_recipe", "another recipe")]
)
def test_all_ranks_refuse(saw, case, part):
    for seen in saw(case):
        assert part in seen["said"]


def test_a_rank_that_dies_in_a_save_is_no_endless_wait(saw):
    alive, dead = saw("rank_dies_in_a_save")
    assert dead == {"code": -9}
    for part in ("another rank ended meanwhile", "step-000001. Mend that, then --resume"):
        assert part in alive["said"]
    assert alive["left"] == ["last", "step-000001"]


@pytest.mark.gpu
def test_a_gpus_state_is_copied_and_written_beside_training(tmp_path):
    """The copy is in pinned host memory and complete before the next step changes what it was taken from."""
    import torch

    from ingot.ranks import Ranks
    from ingot.train.checkpoint import Checkpoints, Progress

    class Bag:
        device = torch.device("cuda", 0)

        def __init__(self, value: float) -> None:
            self.tensors = {"model/a": torch.full((4096, 1024), value, device="cuda")}

        def state(self) -> dict[str, torch.Tensor]:
            return dict(self.tensors)

        def load(self, state: dict[str, torch.Tensor]) -> None:
            self.tensors |= state

    kept, bag = Checkpoints(tmp_path, Ranks(), "hash", keep=1), Bag(1.0)
    kept.save(bag, Progress(steps=2, recipe_hash="hash", step=1))
    bag.tensors["model/a"].add_(1.0)
    assert all(buffer.is_pinned() for buffer in kept._buffers.values())
    kept.wait()
    other = Bag(0.0)
    kept.load(other, "last", pytest.fail)
    assert bool((other.tensors["model/a"] == 1.0).all())
    assert other.tensors["model/a"].is_cuda
