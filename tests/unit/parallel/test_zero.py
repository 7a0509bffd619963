"""The door to deepspeed. What it does behind it is looked at by ranks: tests/distributed/test_zero.py."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ingot.errors import IngotError, MissingPackage
from ingot.parallel import zero
from ingot.parallel.optim import make_optimizer
from ingot.ranks import Ranks, process_group
from ingot.recipe import Optim, Parallel

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def test_without_deepspeed_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(MissingPackage, match=r"zero3 needs the package deepspeed: pip install deepspeed"):
        zero._joined(CPU)


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old, ops = ModuleType("deepspeed"), ModuleType("deepspeed.ops")
    vars(old).update(__version__="0.17.5", __version_major__=0, __version_minor__=17, ops=ops, __path__=[])
    monkeypatch.setitem(sys.modules, "deepspeed", old)
    monkeypatch.setitem(sys.modules, "deepspeed.ops", ops)
    with pytest.raises(IngotError, match=r"deepspeed 0\.17\.5 is installed.*pip install 'deepspeed==0\.19\.\*'"):
        zero._joined(CPU)


def test_other_strategies_do_not_import_it() -> None:
    root = Path(__file__).resolve().parents[3] / "engine"
    code = (
        "import sys, ingot.verbs, ingot.parallel.strategies, ingot.parallel.fsdp; print('deepspeed.ops' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert done.stdout.strip().splitlines()[-1] == "False", done.stderr


def test_one_rank_gets_a_group_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """deepspeed wants one, and LOCAL_RANK; others do not, and nothing is left behind."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with process_group(Ranks(), Parallel(strategy="zero3", backend="gloo"), CPU):
        assert dist.get_world_size() == 1
        assert os.environ["LOCAL_RANK"] == "0"
    assert not dist.is_initialized()
    assert "LOCAL_RANK" not in os.environ
    with process_group(Ranks(), Parallel(strategy="none", backend="gloo"), CPU):
        assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("offload", "moved"),
    [("none", set()), ("optimizer", {"offload_optimizer"}), ("parameters", {"offload_optimizer", "offload_param"})],
)
def test_what_is_offloaded(offload: str, moved: set[str]) -> None:
    section = Parallel(strategy="zero3", offload=offload)
    found = zero.settings(3, nn.Linear(3, 3), section, CPU, torch.float32)["zero_optimization"]
    assert {name for name in found if name.startswith("offload")} == moved
    assert found["reduce_bucket_size"] == 12


def test_cut_matrices_are_decayed_like_whole_ones() -> None:
    """Under ZeRO-3 a parameter is an empty vector, and `ds_shape` is what it was."""
    model = nn.Linear(3, 2)
    for parameter in model.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    decays = {
        id(p): group["weight_decay"]
        for group in make_optimizer(model, Optim(weight_decay=0.1)).param_groups
        for p in group["params"]
    }
    assert decays == {id(model.weight): 0.1, id(model.bias): 0.0}
