"""A failing disk costs the new checkpoint, never the last good one."""

import errno

import pytest
import torch
from safetensors import SafetensorError

from ingot.errors import CheckpointError
from ingot.train import checkpoint
from ingot.train.checkpoint import Progress
from ingot.train.optim import make_optimizer


def progress(step: int, best: int | None = None) -> Progress:
    return Progress(step, 10, step * 100, "hash", None, best, None)


@pytest.fixture
def trained(make_model, make_recipe):
    model = make_model()
    optimizer = make_optimizer(model, make_recipe().optim)
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    optimizer.step()
    return model, optimizer


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL, ids=["OSError", "SafetensorError"])
def test_full_disk_keeps_the_last_good_checkpoint(trained, tmp_path, monkeypatch, error):
    model, optimizer = trained
    checkpoint.save(tmp_path, model, optimizer, progress(1), keep=1)

    real = checkpoint.save_file

    def full(tensors, path):
        real(tensors, path)  # half of it gets there
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left.*step-000001"):
        checkpoint.save(tmp_path, model, optimizer, progress(2), keep=1)
    monkeypatch.undo()

    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-000001"]
    assert checkpoint.load(tmp_path / "last", model, optimizer, "hash").step == 1


def test_keeps_the_newest_and_the_best(trained, tmp_path):
    model, optimizer = trained
    for step in range(1, 6):
        checkpoint.save(tmp_path, model, optimizer, progress(step, best=2), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best",
        "last",
        "step-000002",
        "step-000004",
        "step-000005",
    ]
    assert (tmp_path / "best").resolve().name == "step-000002"


def test_moments_and_weights_come_back_exactly(trained, make_model, make_recipe, tmp_path):
    model, optimizer = trained
    checkpoint.save(tmp_path, model, optimizer, progress(1), keep=1)
    other = make_model(seed=5)
    moments = make_optimizer(other, make_recipe().optim)
    checkpoint.load(tmp_path / "last", other, moments, "hash")
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        for key, value in optimizer.state[a].items():
            assert torch.equal(value, moments.state[b][key]), (name, key)


@pytest.mark.parametrize("damage", ["missing", "cut", "not json"])
def test_damaged_checkpoint_is_an_error_with_its_path(trained, tmp_path, damage):
    model, optimizer = trained
    path = checkpoint.save(tmp_path, model, optimizer, progress(1), keep=1)
    weights, state = path / "trainable.safetensors", path / "progress.json"
    if damage == "missing":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:100])
    else:
        state.write_text("{")
    with pytest.raises(CheckpointError, match=r"step-000001|last"):
        checkpoint.load(tmp_path / "last", model, optimizer, "hash")
