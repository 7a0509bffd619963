"""Packed rows attend to each other although a setting says that they do not.

axolotl#449 and PR #3796 (three years, and the mask believed to isolate them was inert), trl#805, #1230 and PR #3526,
LlamaFactory PR #4224 (the first patch touched a function that the model never calls).

Shown by gradient and through the objective that training uses: what one row's loss depends on.
"""

import pytest
import torch

from ingot.data.loader import IGNORE, collate
from ingot.data.plan import Divisor
from ingot.model import attention
from ingot.model.adapters import attach_adapter
from ingot.model.attention import implementation
from ingot.model.documents import Documents
from ingot.model.lines import trial
from ingot.parallel.recompute import recompute_blocks
from ingot.parallel.strategies import parallelize
from ingot.ranks import Ranks
from ingot.recipe import Adapter
from ingot.train.objectives import next_token

CPU = torch.device("cpu")


def crossing(cells, model, rows, device=CPU, dtype=torch.float32):
    """Largest gradient of a row's loss with respect to another row's embeddings, over all pairs."""
    recipe = cells.recipe_of({})
    sharded = parallelize(model, Ranks(), recipe, device, dtype)
    embedded = []
    model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: embedded.append(output))
    worst, start = 0.0, 0
    for number, row in enumerate(rows):
        batch = collate(rows, 0, flat=True)
        own = slice(start, start + len(row.ids))
        batch.labels_BT[:, : own.start] = IGNORE
        batch.labels_BT[:, own.stop :] = IGNORE
        [gradient] = torch.autograd.grad(next_token(sharded, batch, Divisor(1, 1), recipe.objective), embedded[-1])
        assert gradient[0, own].abs().sum() > 0, number
        gradient[0, own] = 0
        worst = max(worst, float(gradient.abs().max()))
        start = own.stop
    return worst


def built(cells, kind, backend="sdpa", **changes):
    model = cells.small_model(kind, **changes)
    model.set_attn_implementation(implementation(backend))
    return model


GEMMA = {"head_dim": 8, "sliding_window": 6}


@pytest.mark.parametrize(
    ("kind", "backend", "changes"),
    [
        ("llama", "sdpa", {}),
        ("llama", "eager", {}),
        ("mistral", "sdpa", {"sliding_window": 6}),
        ("gemma2", "eager", GEMMA),
        ("mixtral", "sdpa", {"num_local_experts": 4}),
    ],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_rows_loss_depends_on_that_row_alone(cells, kind, backend, changes, recompute):
    model = built(cells, kind, backend, **changes)
    if recompute:
        recompute_blocks(model)
    assert crossing(cells, model, cells.random_rows(4, 1)) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["varlen", "flash", "flex", "sdpa", "eager"])
def test_a_rows_loss_depends_on_that_row_alone_on_a_gpu(cells, backend):
    if backend == "flash":
        pytest.importorskip("flash_attn")
    if backend == "varlen" and attention.varlen_kernel() is None:
        pytest.skip("this torch has no varlen_attn with a window (2.11)")
    model = built(cells, "llama", backend, head_dim=32)
    rows = cells.random_rows(4, 1)
    assert crossing(cells, model, rows, torch.device("cuda"), torch.bfloat16) == 0


def test_the_same_test_sees_a_leak(cells, monkeypatch):
    """Bounds that hold the whole line: packing as it was for years elsewhere."""
    whole = Documents.of

    def one(lengths, *rest):
        return whole((sum(lengths),), *rest)

    monkeypatch.setattr(Documents, "of", one)
    assert crossing(cells, built(cells, "llama"), cells.random_rows(4, 1)) > 1e-6


def test_an_attention_that_was_never_told_ends_in_nan_not_in_a_leak(cells):
    """The mask patch that the model does not call: transformers' own attention in a model that gets lines."""
    recipe = cells.recipe_of({})
    for theirs in ("sdpa", "eager"):
        model = cells.small_model("llama")
        model.set_attn_implementation(theirs)
        sharded = parallelize(model, Ranks(), recipe, CPU, torch.float32)
        batch = collate(cells.random_rows(4, 1), 0, flat=True)
        assert next_token(sharded, batch, Divisor(1, 1), recipe.objective).isnan()


@pytest.mark.parametrize("recompute", [False, True])
def test_every_layer_is_told(cells, recompute, monkeypatch):
    """With adapters on all layers: no wrapper swallows the bounds."""
    seen = []
    told = Documents.of
    monkeypatch.setattr(Documents, "of", lambda *given: Documents(given[0], told(*given).bounds, seen=seen))
    recipe = cells.recipe_of({})
    model = attach_adapter(built(cells, "llama", num_hidden_layers=3), Adapter(), "language-modeling", 0)
    if recompute:
        recompute_blocks(model)
    sharded = parallelize(model, Ranks(), recipe, CPU, torch.float32)
    next_token(sharded, collate(cells.random_rows(4, 1), 0, flat=True), Divisor(1, 1), recipe.objective).backward()
    assert len(seen) == 3 * (2 if recompute else 1)


@pytest.mark.parametrize("kind", ["falcon_h1", "gptj", "stablelm"])
def test_a_model_that_would_leak_is_found_before_training(kind):
    """A state beside attention, an attention that takes any argument, arguments that end on the way."""
    from transformers import AutoConfig

    small = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {
        "falcon_h1": {
            "intermediate_size": 48,
            "num_key_value_heads": 2,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
        },
        "gptj": {"rotary_dim": 4, "bos_token_id": 1, "eos_token_id": 2},
        "stablelm": {"intermediate_size": 48, "num_key_value_heads": 2},
    }
    reason, _ = trial(AutoConfig.for_model(kind, **small, **more[kind]), pooled=False)
    assert reason is not None
