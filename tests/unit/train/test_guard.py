"""Loss spikes in a list of losses and in the loop; the same bits twice; operations that cannot give them."""

import os
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from ingot.errors import NotFinite, RecipeError
from ingot.ranks import Ranks
from ingot.train import guard
from ingot.train.checkpoint import Checkpoints, Progress
from ingot.train.guard import LEAST_STEPS, RECENT_STEPS, is_spike
from ingot.train.loop import _rewound, fit
from ingot.train.objectives import OBJECTIVES

SPIKE_AT = 31


def test_spike_is_told_from_the_spread_of_the_losses_before():
    calm = [2.0 + 0.01 * (step % 5) for step in range(30)]
    assert is_spike(2.5, calm, 6)
    assert not is_spike(2.05, calm, 6)
    assert not is_spike(0.1, calm, 6), "a fall is none"
    wild = [2.0 + 0.3 * (step % 5) for step in range(30)]
    assert not is_spike(2.5, wild, 6)


def test_spikes_among_the_losses_hide_no_later_one():
    assert is_spike(9.0, [2.0 + 0.01 * (step % 5) for step in range(40)] + [9.0] * 10, 6)


def test_few_losses_or_equal_ones_say_little():
    assert not is_spike(9.0, [2.0] * (LEAST_STEPS - 1), 6)
    assert not is_spike(2.01, [2.0] * LEAST_STEPS, 6), "a median deviation of 0 is not a spread of 0"
    assert is_spike(2.02, [2.0] * LEAST_STEPS, 6)


@pytest.fixture
def spiked(monkeypatch, row_lists, make_recipe, make_sharded, make_feed, tmp_path):
    """spiked(on_spike, name, **train) -> (infos, what was said, weights before each step), with other labels at one
    step: what a broken file in the middle of a set does.
    """
    original = OBJECTIVES["language-modeling"]
    count = {"step": 0, "spikes": {SPIKE_AT}, "nan": 0}

    def objective(sharded, batch, divisor, section):
        if torch.is_grad_enabled() and count["step"] + 1 == count["nan"]:
            return original(sharded, batch, divisor, section) * torch.nan
        if torch.is_grad_enabled() and count["step"] + 1 in count["spikes"]:
            ids = batch.labels_BT
            batch = replace(batch, labels_BT=torch.where(ids < 0, ids, 3 + (ids * 31 + 17) % 90))
        return original(sharded, batch, divisor, section)

    monkeypatch.setitem(OBJECTIVES, "language-modeling", objective)

    def run(on_spike, name="", *, first=0, spikes=(SPIKE_AT,), nan=0, resume=False, on_step=(), **train):
        # The same short rows at every step: the loss falls evenly, and what is not one of them stands out.
        lists = ([row_lists[0][0]] * 8, row_lists[1])
        recipe = make_recipe(
            train={"max_steps": 40, "spike_factor": 3, "on_spike": on_spike, "checkpoint_every_steps": 10, **train},
            optim={"lr": 1e-2, "schedule": "constant"},
        )
        count.update(step=first, spikes=set(spikes), nan=nan)
        sharded, infos, said, weights = make_sharded(recipe), [], [], []

        def note(info):
            count["step"] = info.step
            infos.append(info)
            weights.append(sharded.plain.lm_head.weight.detach().clone())

        checkpoints = Checkpoints(tmp_path / name, sharded.layout.ranks, "hash", 9)
        fit(
            sharded,
            make_feed(lists, recipe),
            recipe,
            checkpoints,
            on_step=(note, *on_step),
            notify=said.append,
            resume=resume,
        )
        return infos, said, weights

    return run


def test_warn_says_so_and_learns_it(spiked):
    infos, said, weights = spiked("warn")
    assert [info.applied for info in infos] == [True] * 40
    [line] = said
    assert line.startswith(f"step {SPIKE_AT}: the loss ")
    assert not torch.equal(weights[SPIKE_AT - 1], weights[SPIKE_AT - 2])


def test_skip_leaves_the_weights_alone(spiked):
    infos, said, weights = spiked("skip")
    assert [info.step for info in infos if not info.applied] == [SPIKE_AT]
    assert torch.equal(weights[SPIKE_AT - 1], weights[SPIKE_AT - 2])
    assert [line for line in said if "left out" in line] == said != []
    assert infos[SPIKE_AT].loss < infos[SPIKE_AT - 1].loss / 2, "the next step is as before"
    assert infos[-1].step == 40


def test_rewind_goes_back_to_the_checkpoint_and_on_with_the_next_rows(spiked):
    infos, said, weights = spiked("rewind")
    assert torch.equal(weights[SPIKE_AT - 1], weights[29]), "step 30 was the last checkpoint"
    infos, said, weights = spiked("rewind", "later", spikes=(35,))
    assert torch.equal(weights[34], weights[29])
    assert not torch.equal(weights[33], weights[29])
    assert any("went back to the weights of step 30" in line for line in said)
    assert infos[-1].step == 40


def test_rewind_without_a_checkpoint_only_leaves_out(spiked):
    _, said, weights = spiked("rewind", checkpoint_every_steps=40)
    assert torch.equal(weights[SPIKE_AT - 1], weights[SPIKE_AT - 2])
    assert any("no checkpoint to go back to" in line for line in said)


def test_losses_that_stay_high_stop_being_spikes(spiked):
    infos, _, _ = spiked("rewind", spikes=range(SPIKE_AT, 200), max_steps=100)
    left_out = [info.step for info in infos if not info.applied]
    assert left_out[0] == SPIKE_AT
    assert 5 < len(left_out) <= RECENT_STEPS, "a run that only skips from here on would never end well"
    assert all(after == before + 1 for before, after in pairwise(left_out))
    assert infos[-1].loss < infos[SPIKE_AT - 1].loss


def test_spikes_do_not_use_up_the_budget_for_what_is_not_finite(spiked):
    infos, said, _ = spiked("skip", spikes=(29, SPIKE_AT), nan=35, nonfinite_budget=1)
    assert [info.step for info in infos if not info.applied] == [29, SPIKE_AT, 35]
    assert "step 35: the loss is nan; the step is left out (1 of at most 1)" in said
    with pytest.raises(NotFinite, match="step 29"):
        spiked("skip", "none", spikes=(28,), nan=29)


@pytest.mark.parametrize(("skipped", "expected"), [(1, (9.0, 9.1)), (6, (1.0, 9.9))], ids=["learned", "only spikes"])
def test_weights_of_a_checkpoint_are_compared_with_their_own_losses(monkeypatch, tmp_path, skipped, expected):
    """Ten steps back losses were higher: by those of now every next one would be a spike."""
    checkpoints = Checkpoints(tmp_path, Ranks(), "hash", 2)
    then = Progress(steps=99, recipe_hash="hash", step=40, skipped=1, recent_losses=(9.0, 9.1))
    monkeypatch.setattr(Checkpoints, "load", lambda *_: then)
    (tmp_path / "last").touch()
    now = Progress(steps=99, recipe_hash="hash", step=45, skipped=skipped, recent_losses=(1.0, 9.9))
    assert _rewound(None, checkpoints, now, print) == expected


def test_resumed_run_sees_the_same_losses_before(spiked):
    """The spike comes right after resuming: judged by what is in the checkpoint alone."""
    whole, said, _ = spiked("skip", "whole")

    class Power(Exception):
        pass

    def cut(info):
        if info.step == 30 + 1:
            raise Power

    with pytest.raises(Power):
        spiked("skip", "cut", on_step=(cut,), spikes=())
    resumed, again, _ = spiked("skip", "cut", first=30, resume=True)
    assert [(i.step, i.loss, i.applied) for i in resumed] == [(i.step, i.loss, i.applied) for i in whole[30:]]
    assert again == said


def test_two_runs_give_the_same_bits(row_lists, make_recipe, make_sharded, make_feed, tmp_path):
    ends = []
    for name in ("one", "two"):
        recipe = make_recipe(train={"deterministic": True})
        sharded = make_sharded(recipe)
        flags = []
        checkpoints = Checkpoints(tmp_path / name, sharded.layout.ranks, "hash", 2)
        fit(
            sharded,
            make_feed(row_lists, recipe),
            recipe,
            checkpoints,
            on_step=(lambda info, flags=flags: flags.append(torch.are_deterministic_algorithms_enabled()),),
        )
        assert flags == [True] * 20
        ends.append(sharded.state())
    assert not torch.are_deterministic_algorithms_enabled(), "others' work in this process is not slowed down"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_unwritten_memory_is_filled():
    with guard.deterministic(True):
        assert torch.empty(64).isnan().all()


def test_operation_without_a_deterministic_kernel_is_named(monkeypatch, sharded, row_lists, make_recipe, curve):
    def objective(sharded, batch, divisor, section):
        line = torch.zeros(4).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))  # which of the two wins?
        return original(sharded, batch, divisor, section) + 0 * line.sum()

    original = OBJECTIVES["language-modeling"]
    monkeypatch.setitem(OBJECTIVES, "language-modeling", objective)
    with pytest.raises(RecipeError, match=r"train\.deterministic = True: put_ has no kernel") as caught:
        curve(sharded, row_lists, make_recipe(train={"deterministic": True}))
    assert "set it to false" in str(caught.value)
    curve(sharded, row_lists, make_recipe(), "without")


def test_other_errors_stay_as_they_are():
    error = RuntimeError("shapes do not match")
    assert guard.explained(error) is error
    cublas = RuntimeError(
        "not deterministic ... torch.use_deterministic_algorithms(True) ... CUBLAS_WORKSPACE_CONFIG=:4"
    )
    assert "start a new one" in str(guard.explained(cublas))
