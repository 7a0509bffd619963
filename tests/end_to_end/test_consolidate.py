"""`ingot consolidate`: what a user types after a run died, or to look at an early checkpoint."""

import os

import torch
from safetensors.torch import load_file


def test_a_runs_adapter_and_an_earlier_one(ingot, project):
    project.write(train={"checkpoint_every_steps": 2, "keep_checkpoints": 2})
    assert ingot("finetune", project.recipe).code == 0
    run = project.run
    done = ingot("consolidate", run, "out", "--json")
    assert done.code == 0, done.err
    assert done.json() == {"folder": "out"}
    found, exported = (
        load_file(path / "adapter_model.safetensors") for path in (project.folder / "out", run / "adapter")
    )
    assert found.keys() == exported.keys()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in found.items())
    assert ingot("consolidate", run / "checkpoints" / "step-000002", "early").code == 0
    early = load_file(project.folder / "early" / "adapter_model.safetensors")
    assert early.keys() == exported.keys()
    assert any(not torch.equal(tensor, exported[name]) for name, tensor in early.items())

    done = ingot("consolidate", run, "out")
    assert done.code == 2
    assert "OUT = 'out': something is there already; name a new folder" in done.err
    os.truncate(next((run / "checkpoints" / "last").glob("shard-*")), 99)
    done = ingot("consolidate", run / "checkpoints" / "last", "damaged")
    assert done.code == 1
    assert "is damaged: shard-" in done.err
    assert not (project.folder / "damaged").exists()


def test_neither_a_run_nor_a_checkpoint(ingot, project):
    done = ingot("consolidate", project.folder, "out")
    assert done.code == 2
    assert "is neither a run nor a checkpoint: it has no run.json and no checkpoint.json" in done.err
    assert "Traceback" not in done.err
    done = ingot("consolidate", "--help")
    assert done.code == 0
    assert "ingot consolidate runs/quickstart" in done.out
