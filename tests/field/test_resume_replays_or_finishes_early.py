"""A resumed run is another run.

transformers#11284, #26251, #31441 (the data is read again for hours), #26413 (it ends at once, as if it were done);
torchtitan#816 (ranks' loaders are lost with another number of ranks), #1136, #1702 (uneven shards come back wrong).
"""

import contextlib
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from ingot.data.loader import batches_of
from ingot.data.plan import Cursor, PlannedFeed
from ingot.data.rows import ListRows
from ingot.errors import CheckpointError
from ingot.parallel.strategies import parallelize
from ingot.ranks import Ranks
from ingot.train import shards
from ingot.train.checkpoint import Checkpoints, Progress
from ingot.train.loop import Rows, fit

ROWS, STEPS, CUT = 60, 24, 9  # dies in the step after CUT, whose checkpoint is the last


class Power(Exception):
    """It is gone."""


class ReadRows(ListRows):
    """Remembers which rows were asked for."""

    def __init__(self, rows) -> None:
        super().__init__(rows)
        self.read = Counter()

    def __getitem__(self, index):
        self.read[index] += 1
        return super().__getitem__(index)


@pytest.fixture
def run(cells, tmp_path):
    """run(name, cut=None, resume=False) -> (rows that were read, steps that were done, how fit ended)."""

    def train(name, *, cut=None, resume=False):
        recipe = cells.recipe_of({"train": {"max_steps": STEPS, "checkpoint_every_steps": 3}})
        rows = ReadRows(cells.random_rows(ROWS, 1))
        sharded = parallelize(cells.small_model("llama"), Ranks(), recipe, torch.device("cpu"), torch.float32)
        steps = []

        def on_step(info):
            steps.append((info.step, info.loss))
            if cut is not None and info.step > cut:
                raise Power

        feed = Rows(PlannedFeed(rows, recipe.data, recipe.train), ListRows([]), pad_id=0)
        fitted = None
        with contextlib.suppress(Power):
            fitted = fit(
                sharded, feed, recipe, Checkpoints(tmp_path / name, Ranks(), "hash", 3), resume=resume,
                on_step=(on_step,),
            )  # fmt: skip
        return rows.read, steps, fitted

    return train


def test_resume_reads_no_row_again_and_does_every_step_once(run):
    whole_read, whole_steps, _ = run("whole")
    assert [step for step, _ in whole_steps] == list(range(1, STEPS + 1))
    assert max(whole_read.values()) > 2, "an epoch or two must pass, or the test shows nothing"
    run("cut", cut=CUT)
    read, steps, fitted = run("cut", resume=True)
    assert steps == whole_steps[CUT:]
    assert fitted.final_step == STEPS
    # What it read is exactly what the whole run read after the cut: nothing was skimmed to find the place.
    first_read, _, _ = run("first", cut=CUT)
    ahead = sum(first_read.values()) + sum(read.values()) - sum(whole_read.values())
    per_step = sum(whole_read.values()) / STEPS
    # The first run did one step more than it saved, and had fetched a few ahead when it died.
    assert 0 <= ahead <= 5 * per_step
    assert sum(read.values()) < sum(whole_read.values()) * (STEPS - CUT + 1) / STEPS


def test_a_finished_run_says_so_and_another_length_is_refused(run, tmp_path):
    run("done")
    read, steps, fitted = run("done", resume=True)
    assert (steps, fitted.final_step, sum(read.values())) == ([], STEPS, 0)
    # More steps are another recipe: going on with it as if it were not done would change the schedule unseen.
    other = Checkpoints(tmp_path / "done", Ranks(), "hash of more steps", 3)
    with pytest.raises(CheckpointError, match="another recipe"):
        other.load(None, "last", print)


@pytest.mark.parametrize("worlds", [(2, 3), (4, 1), (1, 5)])
def test_each_row_is_learned_once_an_epoch_across_another_number_of_ranks(cells, worlds):
    recipe = cells.recipe_of({"train": {"max_steps": None, "epochs": 2}})
    rows = ListRows(cells.random_rows(ROWS, 1))
    feed = PlannedFeed(rows, recipe.data, recipe.train)
    learned, cursor = Counter(), Cursor()
    for number, world in enumerate(worlds):
        for portion in feed.start(cursor):
            for rank in range(world):
                for part in batches_of(portion, rank, world, 48, flat=True, even=False):
                    learned.update(row.where for row in part if any(row.trainable))
            cursor = portion.cursor
            if number == 0 and cursor.position > ROWS // 2:
                break  # the job dies in the middle of an epoch
    assert set(learned.values()) == {2}
    assert len(learned) == ROWS


@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 3), (4, 1), (1, 4)])
def test_uneven_shards_come_back_bit_for_bit(tmp_path, before, after):
    """Five rows over four ranks: one of them holds none."""
    whole = {
        "model/a": torch.randn(5, 3),
        "model/b": torch.randn(1, 7).bfloat16(),
        "optimizer/a/step": torch.tensor(3.0),
    }
    for rank in range(before):
        with Rank(rank, before) as cut:
            shards.write(tmp_path, shards.take(cut(whole), Ranks(rank, before), {}), rank)
    shards.Written(tmp_path).check_complete()
    for rank in range(after):
        with Rank(rank, after) as cut:
            expected, found = cut(whole), cut({name: torch.zeros_like(tensor) for name, tensor in whole.items()})
            shards.Written(tmp_path).fill(found)
            for name, tensor in found.items():
                assert torch.equal(local(tensor), local(expected[name])), (rank, name)


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Rank:
    """This process as one of several; cuts a state along its first dimension."""

    def __init__(self, rank, world) -> None:
        self.rank, self.world = rank, world

    def __enter__(self):
        if self.world == 1:
            return dict
        dist.init_process_group("fake", rank=self.rank, world_size=self.world, store=FakeStore())
        self.mesh = init_device_mesh("cpu", (self.world,))
        return self.cut

    def __exit__(self, *_):
        if self.world > 1:
            dist.destroy_process_group()

    def cut(self, state):
        return {name: self.part(tensor) if tensor.ndim else tensor for name, tensor in state.items()}

    def part(self, tensor):
        chunks = tensor.chunk(self.world)
        mine = chunks[self.rank] if self.rank < len(chunks) else tensor[:0]
        return DTensor.from_local(
            mine.clone(), self.mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride()
        )


def test_progress_is_checked_against_the_recipe_not_the_step_count(tmp_path):
    """What makes a run "finished" is in the checkpoint: steps that were done, not files that are there."""
    checkpoints = Checkpoints(tmp_path, Ranks(), "hash", 2)
    checkpoints.folder.mkdir(exist_ok=True)
    (tmp_path / "step-000024").mkdir()  # a name alone
    with pytest.raises(CheckpointError, match=r"usable \(step-000024: checkpoint.json: No such file"):
        checkpoints.load(None, "last", print)
    assert Progress(steps=STEPS, recipe_hash="hash").step == 0
