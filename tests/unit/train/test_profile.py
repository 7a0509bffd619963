"""The profiler's files, and what is turned away before training."""

import json

import pytest
import torch

from ingot.errors import RecipeError
from ingot.recipe import Diagnose
from ingot.train.profile import check, recorded

CPU = torch.device("cpu")


def names_in(path):
    return [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]


def test_trace_holds_the_asked_steps_by_phase(sharded, row_lists, make_recipe, curve, tmp_path):
    said = []
    with recorded(Diagnose(profile_steps=3), tmp_path / "profile", 0, CPU, said.append) as hooks:
        curve(sharded, row_lists, make_recipe(train={"tokens_per_microbatch": 1000, "max_steps": 9}), on_step=hooks)
    trace = names_in(tmp_path / "profile" / "rank-0.json")
    # The hook runs between steps, so three whole steps of one microbatch each are in it.
    assert trace.count("ingot.forward") == trace.count("ingot.backward") == trace.count("ingot.step") == 3
    assert "aten::mm" in trace
    table = (tmp_path / "profile" / "rank-0.txt").read_text()
    assert "ingot.backward" in table
    assert "Self CPU" in table
    assert len(said) == 1
    assert "rank-0.json" in said[0]
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["rank-0.json", "rank-0.txt"]


def test_short_run_leaves_what_there_was_or_says_so(sharded, row_lists, make_recipe, curve, tmp_path):
    for steps, files in ((3, 2), (1, 0)):
        said = []
        folder = tmp_path / str(steps)
        with recorded(Diagnose(profile_steps=50), folder, 0, CPU, said.append) as hooks:
            curve(sharded, row_lists, make_recipe(train={"max_steps": steps}), f"run-{steps}", on_step=hooks)
        assert len(list(folder.iterdir())) == files
        assert ("nothing was recorded" in said[0]) == (files == 0)


def test_nothing_is_made_without_the_setting(tmp_path):
    with recorded(Diagnose(), tmp_path / "profile", 0, CPU, print) as hooks:
        assert hooks == []
    assert not (tmp_path / "profile").exists()


def test_losses_are_the_same_under_it(make_sharded, row_lists, make_recipe, curve, tmp_path):
    recipe = make_recipe()
    plain = curve(make_sharded(recipe), row_lists, recipe, "plain")
    with recorded(Diagnose(profile_steps=2), tmp_path / "profile", 0, CPU, print) as hooks:
        assert curve(make_sharded(recipe), row_lists, recipe, "seen", on_step=hooks) == plain


def test_snapshot_is_refused_before_training_where_there_is_none():
    check(Diagnose(profile_steps=3), CPU)
    with pytest.raises(RecipeError, match=r"diagnose\.memory_snapshot = True: torch records no allocations on a CPU"):
        check(Diagnose(memory_snapshot=True, profile_steps=3), CPU)
    with pytest.raises(RecipeError, match=r"diagnose\.profile_steps=3"):
        check(Diagnose(memory_snapshot=True), torch.device("cuda"))


@pytest.mark.gpu
def test_snapshot_of_a_device(row_lists, make_recipe, make_model, curve, tmp_path):
    from ingot.parallel.strategies import parallelize
    from ingot.ranks import Ranks

    recipe = make_recipe()
    device = torch.device("cuda")
    sharded = parallelize(make_model(), Ranks(), recipe, device, torch.float32)
    said = []
    section = Diagnose(memory_snapshot=True, profile_steps=2)
    with recorded(section, tmp_path / "profile", 0, device, said.append) as hooks:
        curve(sharded, row_lists, recipe, on_step=hooks)
    assert (tmp_path / "profile" / "memory-rank-0.pickle").stat().st_size > 10_000
    assert any("memory_viz" in line for line in said)
    kernels = names_in(tmp_path / "profile" / "rank-0.json")
    assert any("gemm" in str(name).lower() for name in kernels)
