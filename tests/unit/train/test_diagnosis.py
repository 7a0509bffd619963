"""What is not finite: the first bad tensor is named, its batch can be loaded again, nothing was changed by it."""

import json
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from ingot.data.loader import collate
from ingot.data.plan import Divisor
from ingot.data.template import Encoded
from ingot.errors import NotFinite
from ingot.model.adapters import attach_adapter
from ingot.parallel.recompute import recompute_blocks
from ingot.parallel.strategies import parallelize
from ingot.ranks import Ranks
from ingot.recipe import Adapter
from ingot.train import diagnosis
from ingot.train.diagnosis import load_batch, save_batch
from ingot.train.objectives import OBJECTIVES

ODD = 96  # a token that only one row holds


@pytest.fixture
def lists(row_lists):
    """Rows of which only number 7 holds `ODD`."""
    train = [replace(row, ids=[min(token, ODD - 1) for token in row.ids]) for row in row_lists[0]]
    train[7] = replace(train[7], ids=[ODD if place == 1 else token for place, token in enumerate(train[7].ids)])
    return train, []


@pytest.fixture
def untied(make_model, make_recipe):
    """untied(**more of the recipe) -> (sharded, recipe) of a model whose embeddings are not its head."""

    def make(**sections):
        model = make_model()
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        recipe = make_recipe(**sections)
        return parallelize(model, Ranks(), recipe, torch.device("cpu"), torch.float32), recipe

    return make


def weights(sharded):
    return {name: p.detach().clone() for name, p in sharded.plain.named_parameters()}


def same(before, sharded):
    return all(torch.equal(before[n].nan_to_num(), p.nan_to_num()) for n, p in sharded.plain.named_parameters())


def saved_of(message):
    return re.search(r"Its batch: (\S+\.safetensors)", message)[1]


@pytest.mark.parametrize("batches", ["padded", "padding-free"])
def test_bad_row_of_an_embedding_names_the_weight_and_the_one_batch(untied, lists, curve, tmp_path, batches):
    sharded, recipe = untied(data={"batches": batches})
    with torch.no_grad():
        sharded.plain.model.embed_tokens.weight[ODD, 3] = float("nan")
    seen = []
    with pytest.raises(NotFinite) as caught:
        curve(
            sharded,
            lists,
            recipe,
            folder=tmp_path / "run",
            on_step=(lambda info: seen.append((info.step, weights(sharded))),),
        )
    message = str(caught.value)
    assert re.match(rf"step {len(seen) + 1}: the loss is nan; no weight was changed by it", message)
    assert (
        "weight model.embed_tokens.weight: 1 of 3,104 values here are not finite, the first is nan at [96, 3]"
        in message
    )
    assert "then output of model.embed_tokens: " in message
    assert "earlier checkpoint" in message
    assert caught.value.exit_code == 1
    if seen:
        assert same(seen[-1][1], sharded)
    batch = load_batch(saved_of(message))
    assert (batch.ids_BT == ODD).any()
    assert (batch.row_lengths is None) == (batches == "padded")
    facts = json.loads(
        (tmp_path / "run" / "not-finite" / (saved_of(message).split("/")[-1][:-12] + ".json")).read_text()
    )
    assert "row:7" in facts["where"]
    assert facts["step"] == len(seen) + 1
    # Loaded again it does it again.
    loss = OBJECTIVES["language-modeling"](sharded, batch, Divisor(batch.n_targets, 1), recipe.objective)
    assert loss.isnan()
    [other] = [p for p in (tmp_path / "run" / "not-finite").iterdir() if p.suffix == ".safetensors"]
    assert str(other) == saved_of(message)


def test_infinite_weight_is_named(sharded, row_lists, make_recipe, curve):
    with torch.no_grad():
        sharded.plain.model.layers[1].mlp.down_proj.weight[2, 5] = float("inf")
    with pytest.raises(NotFinite, match=r"weight model\.layers\.1\.mlp\.down_proj\.weight: 1 of .* inf at \[2, 5\]"):
        curve(sharded, row_lists, make_recipe())


class Overflow(nn.Module):
    """Finite forward, infinite backward: the root of zero."""

    def forward(self, hidden_BTD):
        return hidden_BTD + (0 * hidden_BTD).abs().sqrt()


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_gradient_that_overflows_names_where_it_began(untied, row_lists, curve, recompute):
    sharded, recipe = untied()
    sharded.plain.model.layers[1].mlp.act_fn = nn.Sequential(nn.SiLU(), Overflow())
    if recompute:
        recompute_blocks(sharded.plain)
    before = weights(sharded)
    with pytest.raises(NotFinite) as caught:
        curve(sharded, row_lists, recipe)
    message = str(caught.value)
    assert re.match(r"step 1: the loss is \d\.\d+, but the gradient's norm is nan", message)
    assert "gradient of the output of model.layers.1.mlp.act_fn.0" in message
    assert "weight" not in message.split("To do")[0].replace("no weight was", "")
    assert same(before, sharded)
    assert all(p.grad is None for p in sharded.plain.parameters())


def test_output_that_overflows_names_the_module(untied, row_lists, curve):
    sharded, recipe = untied()
    with torch.no_grad():
        sharded.plain.model.layers[0].mlp.up_proj.weight.fill_(3e38)
    with pytest.raises(NotFinite, match=r"First bad tensor on rank 0: output of model\.layers\.0\.mlp\.up_proj: "):
        curve(sharded, row_lists, recipe)


def test_adapter_over_a_bad_base(make_model, make_recipe, row_lists, curve):
    recipe = make_recipe(adapter={"kind": "lora"})
    model = attach_adapter(make_model(), Adapter(dropout=0.1), "language-modeling", 0)
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.v_proj.base_layer.weight[0, 0] = float("nan")
    sharded = parallelize(model, Ranks(), recipe, torch.device("cpu"), torch.float32)
    with pytest.raises(NotFinite, match=r"layers\.0\.self_attn\.v_proj\.base_layer\.weight"):
        curve(sharded, row_lists, recipe)


def test_budget_leaves_steps_out_and_then_stops(untied, lists, curve):
    for budget, epochs, fine in ((2, 2, True), (1, 2, False)):
        sharded, recipe = untied(train={"max_steps": None, "epochs": epochs, "nonfinite_budget": budget})
        with torch.no_grad():
            sharded.plain.model.embed_tokens.weight[ODD] = float("nan")
        infos, said = [], []
        options = {"on_step": (infos.append,), "notify": said.append}
        if fine:  # the row comes once an epoch
            curve(sharded, lists, recipe, f"{budget}", **options)
            assert [info.applied for info in infos].count(False) == 2
            assert "the step is left out (1 of at most 2)" in said[0]
        else:
            with pytest.raises(NotFinite):
                curve(sharded, lists, recipe, f"{budget}", **options)
            assert len(said) == 1
        assert all(p.isfinite().all() for n, p in sharded.plain.named_parameters() if "embed" not in n)


def test_batch_that_cannot_be_saved_keeps_the_message(untied, lists, curve, tmp_path):
    sharded, recipe = untied()
    with torch.no_grad():
        sharded.plain.model.norm.weight[0] = float("nan")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(NotFinite, match=r"model\.norm\.weight.*cannot be saved \("):
        curve(sharded, lists, recipe, folder=tmp_path / "file")


def test_sum_that_overflows_names_no_wrong_tensor(untied, row_lists, curve):
    """Every tensor is finite and the norm is not: the squares of large gradients overflow."""
    sharded, recipe = untied()
    sharded.plain.model.norm.weight.register_hook(lambda gradient: gradient * 1e25)
    with pytest.raises(
        NotFinite, match=r"norm is inf.*Every tensor .* is finite; its first rows are row:\d+.*overflow"
    ):
        curve(sharded, row_lists, recipe)


def test_hooks_are_gone_afterwards(sharded):
    findings = diagnosis._Findings()
    with diagnosis._watched(sharded.plain, findings):
        assert sharded.plain.lm_head._forward_hooks
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in sharded.plain.modules())
    assert not any(p._backward_hooks for p in sharded.plain.parameters())


@pytest.mark.parametrize("flat", [False, True], ids=["padded", "end to end"])
def test_saved_batch_is_the_same_batch(tmp_path, flat):
    rows = [Encoded([5, 6, 7], [False, True, True], [2], "a"), Encoded([8, 9], [False, True], [0], "b")]
    batch = collate(rows, 0, flat=flat)
    again = load_batch(save_batch(batch, tmp_path / "deep" / "batch", {"why": "é"}))
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(again, name)), name
        else:
            assert value == getattr(again, name), name
