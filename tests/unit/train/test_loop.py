"""The loop against the textbook, against itself cut into other portions, and against interruptions."""

import os
import signal

import pytest
import torch
import torch.nn.functional as F

from ingot.data.loader import IGNORE, collate, microbatches
from ingot.errors import CheckpointError, IngotError, Interrupted
from ingot.parallel.apply import parallelize
from ingot.ranks import Ranks
from ingot.train.loop import fit, n_targets, plan_steps
from ingot.train.objectives import OBJECTIVES
from ingot.train.optim import lr_at


def curve(sharded, rows, recipe, folder, **options):
    losses = []
    fit(sharded, rows, recipe, folder, "hash", on_step=(lambda info: losses.append(info.loss),), **options)
    return losses


def test_equals_a_plain_loop_in_ten_lines(sharded, rows, make_recipe, make_model, tmp_path):
    recipe = make_recipe()
    losses = curve(sharded, rows, recipe, tmp_path)

    model = make_model()
    decayed = [p for p in model.parameters() if p.ndim >= 2 and p is not model.model.embed_tokens.weight]
    others = [p for p in model.parameters() if p.ndim < 2 or p is model.model.embed_tokens.weight]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=3e-3
    )
    expected = []
    for step, chosen in enumerate(plan_steps([len(row.ids) for row in rows.train], recipe.train)):
        batch = collate([rows.train[i] for i in chosen], 0)
        logits = model(input_ids=batch.ids_BT, attention_mask=batch.attention_BT).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels_BT[:, 1:].flatten(), ignore_index=IGNORE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, 20, recipe.optim)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())

    assert len(losses) == 20
    assert losses == pytest.approx(expected, abs=1e-5)
    assert losses[-1] < losses[0] - 0.1


def gradients(sharded, rows, chosen, world, budget, recipe):
    """The global gradient of one step, cut into `world` ranks and microbatches of `budget` tokens."""
    sharded.plain.zero_grad()
    lengths = [len(row.ids) for row in rows.train]
    divisor = n_targets([rows.train[i] for i in chosen])
    for rank in range(world):
        for part in microbatches(chosen, lengths, rank, world, budget):
            sharded.backward(
                OBJECTIVES["language-modeling"](
                    sharded, collate([rows.train[i] for i in part], 0), divisor, recipe.objective
                )
            )
    return {name: p.grad.clone() for name, p in sharded.plain.named_parameters()}


@pytest.mark.parametrize(("world", "budget"), [(1, 24), (1, 70), (2, 1000), (3, 50), (4, 24)])
def test_gradient_does_not_depend_on_how_the_batch_is_cut(sharded, rows, make_recipe, world, budget):
    chosen = list(range(24))
    whole = gradients(sharded, rows, chosen, 1, 10_000, make_recipe())
    parts = gradients(sharded, rows, chosen, world, budget, make_recipe())
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=0, atol=1e-6, msg=name)
    assert max(g.abs().max() for g in whole.values()) > 1e-3


def test_microbatch_size_changes_no_loss(rows, make_recipe, make_model, tmp_path):
    curves = []
    for budget in (32, 1000):
        recipe = make_recipe(train={"tokens_per_microbatch": budget})
        sharded = parallelize(make_model(), Ranks(), recipe.parallel, torch.device("cpu"), torch.float32)
        curves.append(curve(sharded, rows, recipe, tmp_path / str(budget)))
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)


def test_resumed_run_has_the_same_losses(sharded, rows, make_recipe, make_model, tmp_path):
    recipe = make_recipe(train={"checkpoint_every_steps": 5})
    whole = curve(sharded, rows, recipe, tmp_path / "whole")

    class Power(Exception):
        pass

    def cut(info):
        if info.step == 13:
            raise Power

    first = parallelize(make_model(), Ranks(), recipe.parallel, torch.device("cpu"), torch.float32)
    with pytest.raises(Power):
        fit(first, rows, recipe, tmp_path / "cut", "hash", on_step=(cut,))
    second = parallelize(make_model(seed=9), Ranks(), recipe.parallel, torch.device("cpu"), torch.float32)
    resumed = curve(second, rows, recipe, tmp_path / "cut", resume=True)
    assert resumed == whole[10:]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_signal_leaves_a_resumable_checkpoint(sharded, rows, make_recipe, make_model, tmp_path, number):
    recipe = make_recipe()
    before = signal.getsignal(number)

    def interrupt(info):
        if info.step == 7:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted) as caught:
        fit(sharded, rows, recipe, tmp_path, "hash", on_step=(interrupt,))
    assert caught.value.exit_code == 130
    assert signal.getsignal(number) is before
    # The signal came after step 7 was reported, so step 8 is the one that sees it.
    assert (tmp_path / "last").resolve().name == "step-000008"
    second = parallelize(make_model(seed=9), Ranks(), recipe.parallel, torch.device("cpu"), torch.float32)
    assert len(curve(second, rows, recipe, tmp_path, resume=True)) == 12


def test_best_checkpoint_is_the_one_with_the_lowest_validation_loss(sharded, rows, make_recipe, tmp_path):
    recipe = make_recipe(train={"evaluate_every_steps": 4, "max_steps": 40, "keep_checkpoints": 1}, optim={"lr": 2e-2})
    seen = {}
    fitted = fit(
        sharded, rows, recipe, tmp_path, "hash", on_step=(lambda info: seen.update({info.step: info.validation_loss}),)
    )
    measured = {step: loss for step, loss in seen.items() if loss is not None}
    assert list(measured) == list(range(4, 41, 4))
    best = min(measured, key=measured.__getitem__)
    assert best < 40, "random rows must overfit here, or the test shows nothing"
    assert (fitted.best_step, fitted.final_step) == (best, best)
    assert {path.name for path in tmp_path.glob("step-*")} == {f"step-{best:06d}", "step-000040"}


def test_infinite_loss_stops_the_run_and_names_rows(sharded, rows, make_recipe, tmp_path):
    with torch.no_grad():
        sharded.plain.lm_head.weight[5] = float("inf")
    with pytest.raises(IngotError, match=r"step 1: loss .*row:\d+"):
        curve(sharded, rows, make_recipe(), tmp_path)


def test_resume_refuses_another_recipes_checkpoint(sharded, rows, make_recipe, tmp_path):
    curve(sharded, rows, make_recipe(train={"max_steps": 2}), tmp_path)
    with pytest.raises(CheckpointError, match="another recipe"):
        fit(sharded, rows, make_recipe(), tmp_path, "other", resume=True)


def test_fractions_of_an_epoch(make_recipe):
    lengths = [10] * 100
    count = {
        epochs: len(
            plan_steps(lengths, make_recipe(train={"max_steps": None, "epochs": epochs, "tokens_per_step": 100}).train)
        )
        for epochs in (0.5, 1, 2.3)
    }
    assert count == {0.5: 5, 1: 10, 2.3: 23}


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedule_warms_up_peaks_and_ends(make_recipe, schedule):
    section = make_recipe(optim={"schedule": schedule, "warmup_share": 0.1, "min_lr_share": 0.1}).optim
    rates = [lr_at(step, 100, section) for step in range(101)]
    assert rates[0] == pytest.approx(section.lr / 11)
    assert max(rates) == rates[10] == section.lr
    assert rates[100] == pytest.approx(section.lr if schedule == "constant" else 0.1 * section.lr)
