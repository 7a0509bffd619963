"""The loop against the textbook, against itself cut into other portions, and against interruptions."""

import os
import signal

import pytest
import torch
import torch.nn.functional as F

from ingot.data.loader import IGNORE, batches_of, collate
from ingot.data.plan import Cursor
from ingot.errors import CheckpointError, IngotError, Interrupted
from ingot.parallel.optim import lr_at
from ingot.train.checkpoint import Checkpoints
from ingot.train.loop import fit
from ingot.train.objectives import OBJECTIVES


def test_equals_a_plain_loop_in_ten_lines(sharded, row_lists, make_recipe, make_model, make_feed, curve):
    recipe = make_recipe()
    losses = curve(sharded, row_lists, recipe)

    model = make_model()
    decayed = [p for p in model.parameters() if p.ndim >= 2 and p is not model.model.embed_tokens.weight]
    others = [p for p in model.parameters() if p.ndim < 2 or p is model.model.embed_tokens.weight]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=3e-3
    )
    expected = []
    for step, portion in enumerate(make_feed(row_lists, recipe).train.start(Cursor())):
        batch = collate([row_lists[0][i] for i in portion.indices], 0)
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


def gradients(sharded, portion, world, budget, recipe, flat=False):
    """The global gradient of one step, cut into `world` ranks and microbatches of `budget` tokens."""
    sharded.plain.zero_grad()
    for rank in range(world):
        for part in batches_of(portion, rank, world, budget, flat=flat, even=False):
            batch = collate(part, 0, flat=flat)
            sharded.backward(OBJECTIVES["language-modeling"](sharded, batch, portion.divisor, recipe.objective))
    return {name: p.grad.clone() for name, p in sharded.plain.named_parameters()}


@pytest.mark.parametrize("flat", [False, True], ids=["padded", "end to end"])
@pytest.mark.parametrize(("world", "budget"), [(1, 24), (1, 70), (2, 1000), (3, 50), (4, 24)])
def test_gradient_does_not_depend_on_how_the_batch_is_cut(
    sharded, row_lists, make_recipe, make_feed, world, budget, flat
):
    recipe = make_recipe(train={"tokens_per_step": 400})
    portion = next(iter(make_feed(row_lists, recipe).train.start(Cursor())))
    assert len(portion.indices) > 20
    whole = gradients(sharded, portion, 1, 10_000, recipe)
    parts = gradients(sharded, portion, world, budget, recipe, flat)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=0, atol=1e-6, msg=name)
    assert max(g.abs().max() for g in whole.values()) > 1e-3


def test_neither_microbatches_nor_padding_change_a_loss(row_lists, make_recipe, make_sharded, curve):
    curves = []
    for budget, batches in ((32, "padded"), (1000, "padded"), (64, "padding-free")):
        recipe = make_recipe(train={"tokens_per_microbatch": budget}, data={"batches": batches})
        curves.append(curve(make_sharded(recipe), row_lists, recipe, f"{budget}{batches}"))
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    assert curves[0] == pytest.approx(curves[2], abs=1e-5)


def test_packed_steps_learn_every_row_in_fewer_steps(row_lists, make_recipe, make_sharded, make_feed, curve):
    recipe = make_recipe(
        data={"batches": "packed", "max_tokens": 60}, train={"max_steps": None, "tokens_per_microbatch": 70}
    )
    padded = make_recipe(train={"max_steps": None})
    portions = list(make_feed(row_lists, recipe).train.start(Cursor()))
    assert sorted(index for portion in portions for index in portion.indices) == list(range(60))
    assert len(portions) < make_feed(row_lists, padded).train.steps
    longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": 4.0})})
    losses = curve(make_sharded(recipe), row_lists, longer)
    assert len(losses) == 4 * len(portions)
    assert losses[-1] < losses[0] - 0.1


class Power(Exception):
    """A failure that nobody expects."""


def test_resumed_run_has_the_same_losses(row_lists, make_recipe, make_sharded, curve):
    recipe = make_recipe(train={"checkpoint_every_steps": 5})
    whole = curve(make_sharded(recipe), row_lists, recipe, "whole")

    def cut(info):
        if info.step == 13:
            raise Power

    with pytest.raises(Power):
        curve(make_sharded(recipe), row_lists, recipe, "cut", on_step=(cut,))
    resumed = curve(make_sharded(recipe, seed=9), row_lists, recipe, "cut", resume=True)
    assert resumed == whole[10:]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_signal_leaves_a_resumable_checkpoint(row_lists, make_recipe, make_sharded, curve, tmp_path, number):
    recipe = make_recipe()
    before = signal.getsignal(number)

    def interrupt(info):
        if info.step == 7:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted) as caught:
        curve(make_sharded(recipe), row_lists, recipe, on_step=(interrupt,))
    assert caught.value.exit_code == 130
    assert signal.getsignal(number) is before
    # The signal came after step 7 was reported, so step 8 is the one that sees it.
    assert (tmp_path / "last").resolve().name == "step-000008"
    assert len(curve(make_sharded(recipe, seed=9), row_lists, recipe, resume=True)) == 12


def test_best_checkpoint_is_the_one_with_the_lowest_validation_loss(
    sharded, row_lists, make_recipe, make_feed, tmp_path
):
    recipe = make_recipe(train={"evaluate_every_steps": 4, "max_steps": 40, "keep_checkpoints": 1}, optim={"lr": 2e-2})
    seen = {}
    fitted = fit(
        sharded,
        make_feed(row_lists, recipe),
        recipe,
        Checkpoints(tmp_path, sharded.layout.ranks, "hash", 1),
        on_step=(lambda info: seen.update({info.step: info.validation_loss}),),
    )
    measured = {step: loss for step, loss in seen.items() if loss is not None}
    assert list(measured) == list(range(4, 41, 4))
    best = min(measured, key=measured.__getitem__)
    assert best < 40, "random rows must overfit here, or the test shows nothing"
    assert (fitted.best_step, fitted.final_step) == (best, best)
    assert {path.name for path in tmp_path.glob("step-*")} == {f"step-{best:06d}", "step-000040"}


def test_infinite_loss_stops_the_run_and_names_rows(sharded, row_lists, make_recipe, curve):
    with torch.no_grad():
        sharded.plain.lm_head.weight[5] = float("inf")
    with pytest.raises(IngotError, match=r"step 1: .*row:\d+"):
        curve(sharded, row_lists, make_recipe())


def test_resume_refuses_another_recipes_checkpoint(sharded, row_lists, make_recipe, make_feed, curve, tmp_path):
    curve(sharded, row_lists, make_recipe(train={"max_steps": 2}))
    recipe = make_recipe()
    other = Checkpoints(tmp_path, sharded.layout.ranks, "other", 2)
    with pytest.raises(CheckpointError, match="another recipe"):
        fit(sharded, make_feed(row_lists, recipe), recipe, other, resume=True)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedule_warms_up_peaks_and_ends(make_recipe, schedule):
    section = make_recipe(optim={"schedule": schedule, "warmup_share": 0.1, "min_lr_share": 0.1}).optim
    rates = [lr_at(step, 100, section) for step in range(101)]
    assert rates[0] == pytest.approx(section.lr / 11)
    assert max(rates) == rates[10] == section.lr
    assert rates[100] == pytest.approx(section.lr if schedule == "constant" else 0.1 * section.lr)
