"""Checkpoints on one rank: exact, in the background, published whole or not at all, and verified before use."""

import errno
import json
import os
import re
import subprocess
import threading
from dataclasses import replace

import pytest
import torch

from ingot.data.plan import Cursor
from ingot.errors import CheckpointError
from ingot.ranks import Ranks
from ingot.train import manifest, shards
from ingot.train.checkpoint import Checkpoints, Progress


class Bag:
    """The part of a Sharded that checkpoints use: a state that is replaced or filled."""

    device = torch.device("cpu")

    def __init__(self, value: float = 0.0) -> None:
        self.tensors = {
            "model/a": torch.full((5, 3), value),
            "model/b": torch.full((4,), value, dtype=torch.bfloat16),
            "optimizer/a/step": torch.tensor(value),
            "optimizer/a/exp_avg": torch.full((3, 5), value).t(),
        }

    def state(self) -> dict[str, torch.Tensor]:
        return dict(self.tensors)

    def load(self, state: dict[str, torch.Tensor]) -> None:
        self.tensors |= state

    @property
    def values(self) -> dict[str, float]:
        for tensor in self.tensors.values():
            assert bool((tensor == tensor.flatten()[0]).all())
        return {name: tensor.flatten()[0].item() for name, tensor in self.tensors.items()}


def everywhere(value: float) -> dict[str, float]:
    return dict.fromkeys(Bag().tensors, value)


def progress(step: int, **more: object) -> Progress:
    return replace(Progress(steps=100, recipe_hash="hash", step=step), **more)


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path, Ranks(), "hash", keep=2)


def saved(checkpoints: Checkpoints, *steps: int, **more: object) -> None:
    """Checkpoints whose values are their step."""
    for step in steps:
        checkpoints.save(Bag(step), progress(step, **more))
    checkpoints.wait()


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Gate:
    """Holds the writer until `open`; `reached` when it is there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.open, real = threading.Event(), threading.Event(), shards.write

        def write(*args: object) -> list[str]:
            self.reached.set()
            assert self.open.wait(60)
            return real(*args)

        monkeypatch.setattr(shards, "write", write)


# --- what comes back -------------------------------------------------------------------------------------------------


def test_weights_moments_and_progress_come_back_exactly(sharded, row_lists, make_recipe, make_sharded, curve, tmp_path):
    curve(sharded, row_lists, make_recipe(train={"max_steps": 3}))
    checkpoints = Checkpoints(tmp_path, Ranks(), "hash", keep=2)
    other = make_sharded(make_recipe(), seed=5)
    found = checkpoints.load(other, "last", pytest.fail)
    before, after = sharded.state(), other.state()
    assert before.keys() == after.keys()
    assert sum(name.startswith("optimizer/") for name in after) == 3 * sum(n.startswith("model/") for n in after)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert (found.step, found.steps, len(found.recent_losses)) == (3, 3, 3)
    assert found.cursor.position > 0


def test_every_field_of_progress_comes_back(checkpoints):
    whole = Progress(
        steps=100,
        recipe_hash="hash",
        step=7,
        tokens=12345678901,
        cursor=Cursor(3, 41),
        skipped=2,
        recent_losses=(1.1, 0.1 + 0.2, 3e-17),
        validation_loss=0.7,
        best_step=7,
        best_loss=0.7,
    )
    checkpoints.save(Bag(), whole)
    checkpoints.wait()
    assert checkpoints.load(Bag(), "last", pytest.fail) == whole


def test_dtypes_scalars_and_transposed_moments_come_back(checkpoints):
    bag, other = Bag(), Bag()
    for tensor in bag.tensors.values():
        tensor.copy_(torch.randn(tensor.shape))
    checkpoints.save(bag, progress(1))
    checkpoints.load(other, "last", pytest.fail)
    for name, tensor in bag.tensors.items():
        assert torch.equal(tensor, other.tensors[name]), name
        assert tensor.dtype == other.tensors[name].dtype


def test_weights_only_leaves_moments_alone(checkpoints):
    saved(checkpoints, 1)
    bag = Bag(9)
    checkpoints.load(bag, "last", pytest.fail, weights_only=True)
    assert bag.values == {name: 1.0 if name.startswith("model/") else 9.0 for name in bag.tensors}


def test_only_safetensors_and_json_are_written(checkpoints, tmp_path):
    saved(checkpoints, 1)
    assert names(tmp_path / "last") == ["checkpoint.json", "shard-00001-model-00001-of-00001.safetensors"]
    content = json.loads((tmp_path / "last" / "checkpoint.json").read_text())
    assert set(content) == {"progress", "files", "world", "strategy", "versions", "sha256"}
    assert content["versions"]["torch"]


def test_large_parts_become_several_files(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "FILE_BYTES", 60)
    saved(checkpoints, 4)
    assert len(names(tmp_path / "last")) == 1 + 2
    bag = Bag()
    checkpoints.load(bag, "last", pytest.fail)
    assert bag.values == everywhere(4.0)


# --- in the background -----------------------------------------------------------------------------------------------


def test_training_goes_on_while_a_copy_is_written(checkpoints, tmp_path, monkeypatch):
    gate, bag = Gate(monkeypatch), Bag(1)
    checkpoints.save(bag, progress(1))
    assert gate.reached.wait(60)
    for tensor in bag.tensors.values():  # what the next step does
        tensor.add_(1)
    assert checkpoints.failed() is None
    assert not (tmp_path / "last").exists()
    assert names(tmp_path) == [".step-000001.partial"]
    gate.open.set()
    checkpoints.wait()
    other = Bag()
    assert checkpoints.load(other, "last", pytest.fail).step == 1
    assert other.values == everywhere(1.0)


def test_a_second_save_waits_for_the_first(checkpoints, monkeypatch):
    gate = Gate(monkeypatch)
    checkpoints.save(Bag(1), progress(1))
    assert gate.reached.wait(60)
    second = threading.Thread(target=lambda: checkpoints.save(Bag(2), progress(2)))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    gate.open.set()
    second.join()
    other = Bag()
    assert checkpoints.load(other, "last", pytest.fail).step == 2
    assert other.values == everywhere(2.0)


def test_what_is_under_way_is_published_although_training_fails(checkpoints, tmp_path, monkeypatch):
    gate = Gate(monkeypatch)

    def fails():
        with checkpoints:
            checkpoints.save(Bag(1), progress(1))
            threading.Timer(0.2, gate.open.set).start()
            raise ValueError("own")

    with pytest.raises(ValueError, match="own"):
        fails()
    assert names(tmp_path) == ["last", "step-000001"]


def test_ctrl_c_does_not_wait(checkpoints, tmp_path, monkeypatch):
    gate = Gate(monkeypatch)

    def interrupted():
        with checkpoints:
            checkpoints.save(Bag(1), progress(1))
            assert gate.reached.wait(60)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == [".step-000001.partial"]
    gate.open.set()
    checkpoints.wait()


# --- failures of the disk --------------------------------------------------------------------------------------------


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place", ["write", "digests", "sync"])
def test_full_disk_keeps_the_last_good_checkpoint(checkpoints, tmp_path, monkeypatch, place):
    saved(checkpoints, 1)
    monkeypatch.setattr(shards if place == "write" else manifest, place, full)
    checkpoints.save(Bag(2), progress(2))
    checkpoints._thread.join()
    said = str(checkpoints.failed())
    for part in ("step-000002", "No space left", f"the last good one is {tmp_path / 'step-000001'}", "--resume"):
        assert part in said
    with pytest.raises(CheckpointError, match="No space left") as caught:
        checkpoints.wait()
    assert str(caught.value) == said
    monkeypatch.undo()

    assert names(tmp_path) == ["last", "step-000001"]
    checkpoints.wait()  # raises once
    bag = Bag()
    assert checkpoints.load(bag, "last", pytest.fail).step == 1
    assert bag.values == everywhere(1.0)


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    checkpoints = Checkpoints(tmp_path / "file", Ranks(), "hash", keep=1)
    checkpoints.save(Bag(), progress(1))
    with pytest.raises(CheckpointError, match=r"step-000001 .*file.*there is no earlier one"):
        checkpoints.wait()


def test_an_empty_tensor_is_not_saved(checkpoints):
    bag = Bag()
    bag.tensors["model/a"] = torch.empty(0)
    with pytest.raises(CheckpointError, match=r"1 of 4 tensors .* empty: \['model/a'\]"):
        checkpoints.save(bag, progress(1))


def test_a_tensor_in_pieces_that_lack_one_is_not_published(checkpoints, tmp_path, monkeypatch):
    saved(checkpoints, 1)
    real = shards.take

    def lossy(*args):
        part = real(*args)
        [item] = [item for item in part.items if item.index.fqn == "model/a"]
        part.copies["model/a"] = part.copies["model/a"][:2]
        part.items[part.items.index(item)] = replace(
            item,
            tensor_data=replace(item.tensor_data, chunk=replace(item.tensor_data.chunk, offsets=torch.Size([2, 0]))),
        )
        return part

    monkeypatch.setattr(shards, "take", lossy)
    checkpoints.save(Bag(2), progress(2))
    with pytest.raises(CheckpointError, match=r"6 of 12 elements of model/a"):
        checkpoints.wait()
    assert names(tmp_path) == ["last", "step-000001"]


# --- which ones are there --------------------------------------------------------------------------------------------


def test_keeps_the_newest_and_the_best(checkpoints, tmp_path):
    saved(checkpoints, 1)
    checkpoints.save(Bag(2), progress(2).watched(0.5))
    for step in (3, 4, 5):
        checkpoints.save(Bag(step), progress(step, best_step=2, best_loss=0.5))
    checkpoints.wait()
    assert names(tmp_path) == ["best", "last", "step-000002", "step-000004", "step-000005"]
    assert (tmp_path / "best").resolve().name == "step-000002"
    assert (tmp_path / "last").resolve().name == "step-000005"
    bag = Bag()
    assert checkpoints.load(bag, "best", pytest.fail, weights_only=True).step == 2


def test_more_than_a_million_steps_stay_in_order(checkpoints, tmp_path):
    saved(checkpoints, 999_998, 999_999, 1_000_000)
    assert names(tmp_path) == ["last", "step-1000000", "step-999999"]
    assert checkpoints.load(Bag(), "last", pytest.fail).step == 1_000_000


def test_leftovers_of_killed_writes_are_removed_at_the_next_start(checkpoints, tmp_path):
    saved(checkpoints, 1)
    for leftover in (".step-000002.partial", ".step-000000.old.partial"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    (tmp_path / ".last.partial").symlink_to("step-000001")
    with Checkpoints(tmp_path, Ranks(), "hash", keep=2) as found:
        assert names(tmp_path) == ["last", "step-000001"]
    assert found.load(Bag(), "last", pytest.fail).step == 1


def test_killed_between_publishing_and_the_links(checkpoints, tmp_path):
    saved(checkpoints, 1, best_step=1, best_loss=0.9)
    checkpoints.save(Bag(2), progress(2).watched(0.5))
    checkpoints.wait()
    for link in ("last", "best"):  # as they were one instruction earlier
        (tmp_path / link).unlink()
        (tmp_path / link).symlink_to("step-000001")
    assert checkpoints.load(Bag(), "last", pytest.fail).step == 2
    assert [(tmp_path / link).resolve().name for link in ("last", "best")] == ["step-000002"] * 2


# --- damage ----------------------------------------------------------------------------------------------------------


def flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "missing": (lambda weights, _: weights.unlink(), r"shard-00001-model-00001-of-00001.safetensors: No such file"),
    "cut": (lambda weights, _: os.truncate(weights, 100), r"shard-\S+ has 100 bytes instead of"),
    "one bit": (lambda weights, _: flip(weights), r"shard-\S+ is not what was written: its SHA-256 differs"),
    "a file too many": (
        lambda weights, _: weights.with_name("a.safetensors").write_bytes(b""),
        r"a.safetensors does not",
    ),
    "no manifest": (lambda _, manifest: manifest.unlink(), r"checkpoint.json: No such file"),
    "cut manifest": (lambda _, manifest: os.truncate(manifest, 100), r"checkpoint.json is not what was written"),
    "changed manifest": (
        lambda _, manifest: manifest.write_text(manifest.read_text().replace('"step": 2', '"step": 3')),
        r"checkpoint.json is not what was written: its SHA-256 differs",
    ),
    "manifest of another kind": (lambda _, manifest: manifest.write_text("[]"), r"checkpoint.json is not what was"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_falls_back_to_the_one_before_and_says_so(checkpoints, tmp_path, damage):
    saved(checkpoints, 1, 2)
    path = tmp_path / "step-000002"
    spoil, message = DAMAGES[damage]
    spoil(path / "shard-00001-model-00001-of-00001.safetensors", path / "checkpoint.json")
    said: list[str] = []
    bag = Bag()
    assert checkpoints.load(bag, "last", said.append).step == 1
    assert bag.values == everywhere(1.0)
    assert len(said) == 1
    for part in ("step-000002 is damaged", "step-000001 is taken"):
        assert part in said[0]
    assert re.search(message, said[0]), said[0]
    assert names(tmp_path) == ["damaged-step-000002", "last", "step-000001"]
    assert (tmp_path / "last").resolve().name == "step-000001"
    # What is set aside neither counts as one to keep nor comes back.
    saved(checkpoints, 2, 3)
    assert names(tmp_path) == ["damaged-step-000002", "last", "step-000002", "step-000003"]


def test_no_usable_checkpoint_names_them_all_and_touches_none(checkpoints, tmp_path):
    saved(checkpoints, 1, 2)
    for name in ("step-000001", "step-000002"):
        os.truncate(tmp_path / name / "checkpoint.json", 10)
    with pytest.raises(
        CheckpointError, match=r"(?s)usable.*step-000002: checkpoint.json.*step-000001: checkpoint.json"
    ):
        checkpoints.load(Bag(), "last", pytest.fail)
    assert names(tmp_path) == ["last", "step-000001", "step-000002"]


def test_no_checkpoint_at_all(checkpoints, tmp_path):
    with pytest.raises(CheckpointError, match=f"no checkpoint in {tmp_path}; start a new run"):
        checkpoints.load(Bag(), "last", pytest.fail)


def test_a_damaged_best_is_an_error_with_the_way_out(checkpoints, tmp_path):
    checkpoints.keep = 3
    state = progress(0)
    for step, loss in ((1, 0.9), (2, 0.5), (3, 0.7)):
        state = replace(state, step=step).watched(loss)
        checkpoints.save(Bag(step), state)
    checkpoints.wait()
    flip(tmp_path / "best" / "shard-00001-model-00001-of-00001.safetensors")
    bag = Bag()
    with pytest.raises(CheckpointError, match=r"best cannot be loaded.*SHA-256") as caught:
        checkpoints.load(bag, "best", pytest.fail, weights_only=True)
    assert bag.values == everywhere(0.0)
    command = ["ln", "-sfn", "step-000003", str(tmp_path / "best")]
    assert " ".join(command) in str(caught.value)
    subprocess.run(command, check=True)
    assert checkpoints.load(bag, "best", pytest.fail, weights_only=True).step == 3


def test_a_damaged_last_is_not_replaced_in_what_is_exported(checkpoints, tmp_path):
    saved(checkpoints, 1, 2)
    flip(tmp_path / "last" / "shard-00001-model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match=r"step-000002.*--resume trains again from the one before"):
        checkpoints.load(Bag(), "last", pytest.fail, weights_only=True)
    assert checkpoints.load(Bag(), "last", lambda _: None).step == 1


def test_another_recipes_checkpoint_is_refused(checkpoints, tmp_path):
    saved(checkpoints, 1)
    other = Checkpoints(tmp_path, Ranks(), "other", keep=2)
    with pytest.raises(CheckpointError, match=r"step-000001 was written by another recipe \(hash hash, now other\)"):
        other.load(Bag(), "last", pytest.fail)


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_a_checkpoint_that_does_not_fit_the_model(checkpoints, change):
    saved(checkpoints, 1)
    bag = Bag()
    if change == "missing":
        bag.tensors["model/c"] = torch.zeros(2)
    elif change == "extra":
        del bag.tensors["optimizer/a/step"]
    else:
        bag.tensors["model/a"] = torch.zeros(3, 5)
    said = {"missing": r"1 tensors are missing \['model/c'\]", "extra": r"1 have no place \['optimizer/a/step'\]"}
    with pytest.raises(CheckpointError, match=said.get(change, r"model/a has shape \[5, 3\], .*wants \[3, 5\]")):
        checkpoints.load(bag, "last", pytest.fail)
