"""Every loss of tokens by a head that answers, beside the same loss by its logits: value and all gradients."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ingot.data.encoded import Encoded
from ingot.data.loader import IGNORE, Batch, Drawn, muted
from ingot.data.plan import Divisor
from ingot.model.adapters import attach_adapter
from ingot.model.head import attach, detach
from ingot.model.kinds import KINDS
from ingot.parallel.sharded import Sharded
from ingot.parallel.strategies import parallelize
from ingot.ranks import Ranks
from ingot.recipe import Adapter
from ingot.train import forward
from ingot.train.memory import Failure, Load
from ingot.train.objectives import OBJECTIVES, collator_of

WORDS = 97
DRAWN = Drawn(4, WORDS, "0 0")
SHAPE = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
UNCAPPED = {"attn_logit_softcapping": None}
LORA = {"rank": 4, "targets": ["lm_head", "q_proj"]}
TAUGHT = {"task": "language-modeling", "method": "distillation", "teacher": "unused"}
NEXT = {"task": "language-modeling"}
CLOSE = 1e-5
# name -> (objective, kind of model, its configuration, how rows lie, adapter)
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any], str, dict[str, Any] | None]] = {
    "lines": (NEXT, "llama", {}, "padding-free", None),
    "padded": (NEXT, "llama", {}, "padded", None),
    "tied, capped, smoothed": (
        {**NEXT, "label_smoothing": 0.1},
        "gemma2",
        {"final_logit_softcapping": 3.0, "tie_word_embeddings": True},
        "padded",
        None,
    ),
    "adapter on the head": (NEXT, "llama", {}, "padding-free", LORA),
    "scaled by a factor": (NEXT, "granite", {"logits_scaling": 4.0}, "padding-free", None),
    "positions in the scores": (NEXT, "bloom", {"n_layer": 2, "n_head": 4}, "padded", None),
    "dpo lines": ({"task": "chat-completion", "method": "dpo"}, "llama", {}, "padding-free", None),
    "dpo padded": ({"task": "chat-completion", "method": "dpo"}, "gemma2", {}, "padded", None),
    "orpo": ({"task": "chat-completion", "method": "orpo"}, "llama", {}, "padding-free", None),
    "distillation": ({**TAUGHT, "temperature": 2.0, "teacher_share": 0.6}, "llama", {}, "padded", None),
    "distillation alone": (
        {**TAUGHT, "teacher_share": 1.0},
        "gemma2",
        UNCAPPED,
        "padding-free",
        None,
    ),
    "translation": ({"task": "translation", "label_smoothing": 0.1}, "t5", T5, "padded", None),
    "fill-mask": ({"task": "fill-mask"}, "bert", BERT, "padding-free", None),
}


def rows_for(task: str, method: str, n: int = 5) -> list[Encoded]:
    """Rows of uneven lengths, each with another number of targets at other places."""
    draw, rows = random.Random(3), []
    for number in range(n):
        prompt = [draw.randrange(5, WORDS) for _ in range(draw.randint(2, 6))]
        answers = [[draw.randrange(5, WORDS) for _ in range(draw.randint(1, 7))] for _ in range(2)]
        where, learned = f"row:{number}", [False] * len(prompt) + [True] * len(answers[0])
        if method in ("dpo", "orpo"):
            trainable = learned + [False] * len(prompt) + [True] * len(answers[1])
            parts = (len(prompt) + len(answers[0]), len(prompt) + len(answers[1]))
            ids = prompt + answers[0] + prompt + answers[1]
            rows.append(Encoded(ids, trainable, None, where, parts, len(answers[0]), (-3.0, -4.0)))
        elif task == "translation":
            rows.append(Encoded(prompt + answers[0], learned, None, where, (len(prompt), len(answers[0]))))
        elif task == "fill-mask":
            ids = prompt + answers[0]
            rows.append(Encoded(ids, [True] * len(ids), None, where, terms=2))
        else:
            rows.append(Encoded(prompt + answers[0], learned, None, where))
    return rows


def built(kind: str, task: str, settings: dict[str, Any], adapter: dict[str, Any] | None, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**SHAPE, **settings})
    model = KINDS.get(task, AutoModelForCausalLM).from_config(config, attn_implementation="ingot")
    if adapter is not None:
        model = attach_adapter(model, Adapter(**adapter), task, 0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.3)
    return model


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, make_recipe: Any) -> tuple[Sharded, Any, Any]:
    """(model, recipe, rows -> batch)"""
    objective, kind, settings, lie, adapter = CASES[request.param]
    more = {"max_target_tokens": 20} if objective["task"] == "translation" else {}
    recipe = make_recipe(objective=objective, data={"max_tokens": 32, "batches": lie, **more})
    model = built(kind, objective["task"], settings, adapter)
    sharded = parallelize(model, Ranks(), recipe, torch.device("cpu"), torch.float32)
    if "teacher" in objective:  # with more words than the student knows
        sharded.teacher = built(kind, "", {**settings, "vocab_size": WORDS + 7}, None, 5).eval().requires_grad_(False)
    collate = collator_of(recipe.objective)
    return sharded, recipe, lambda rows: collate(rows, 0, flat=lie != "padded", drawn=DRAWN)


def loss_of(sharded: Sharded, recipe: Any, batch: Batch) -> Tensor:
    return OBJECTIVES[recipe.objective.loss](sharded, batch, Divisor(23, 5), recipe.objective)


def gradients(sharded: Sharded, loss: Tensor) -> dict[str, Tensor]:
    sharded.plain.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in sharded.plain.named_parameters() if p.grad is not None}


def fuse(sharded: Sharded) -> None:
    assert attach(sharded.plain, "auto") == (1, None)
    if sharded.teacher is not None:
        assert attach(sharded.teacher, "auto") == (1, None)


def rows_of_case(recipe: Any) -> list[Encoded]:
    return rows_for(recipe.objective.task, recipe.objective.method)


def test_equals_the_loss_of_logits(case: tuple[Sharded, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sharded, recipe, batch_of = case
    batch = batch_of(rows_of_case(recipe))
    expected = loss_of(sharded, recipe, batch)
    wanted = gradients(sharded, expected)
    fuse(sharded)
    monkeypatch.setattr(forward, "logits_at", None)  # whoever asks for logits now fails
    found = loss_of(sharded, recipe, batch)
    assert found.item() == pytest.approx(expected.item(), rel=CLOSE)
    scale = max(gradient.abs().max().item() for gradient in wanted.values())
    assert scale > 1e-2
    got = gradients(sharded, found)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=CLOSE * max(scale, 1), msg=name)
    sharded.wrapped.eval()
    with torch.no_grad():
        assert loss_of(sharded, recipe, batch).item() == pytest.approx(expected.item(), rel=CLOSE)


def test_a_muted_batch_gives_zeros_for_everything(case: tuple[Sharded, Any, Any]) -> None:
    sharded, recipe, batch_of = case
    fuse(sharded)
    rows = rows_of_case(recipe)
    everything = gradients(sharded, loss_of(sharded, recipe, batch_of(rows))).keys()
    batch = batch_of([muted(rows[0])])
    loss = loss_of(sharded, recipe, batch)
    assert loss.item() == 0
    found = gradients(sharded, loss)
    assert found.keys() == everything
    assert all(gradient.abs().max() == 0 for gradient in found.values())


def test_autocast_rounds_and_no_more(make_recipe: Any, row_lists: Any) -> None:
    recipe = make_recipe(data={"batches": "padding-free"})
    sharded = parallelize(built("llama", "", {}, None), Ranks(), recipe, torch.device("cpu"), torch.bfloat16)
    batch = collator_of(recipe.objective)(row_lists[0][:4], 0, flat=True)
    expected = loss_of(sharded, recipe, batch)
    wanted = torch.cat([gradient.flatten() for gradient in gradients(sharded, expected).values()])
    fuse(sharded)
    found = loss_of(sharded, recipe, batch)
    got = torch.cat([gradient.flatten() for gradient in gradients(sharded, found).values()])
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=0.01)
    assert (got - wanted).norm() / wanted.norm() < 0.05


def test_only_targets_go_through_the_head(make_recipe: Any, row_lists: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe()
    sharded = parallelize(built("llama", "", {}, None), Ranks(), recipe, torch.device("cpu"), torch.float32)
    batch = collator_of(recipe.objective)(row_lists[0][:4], 0, flat=False)
    fuse(sharded)
    asked: list[Tensor] = []
    own = forward.linear_cross_entropy

    def watched(hidden: Tensor, head: Any, targets: Tensor, *, rows_M: Tensor, **named: Any) -> Tensor:
        asked.append(rows_M)
        return own(hidden, head, targets, rows_M=rows_M, **named)

    monkeypatch.setattr(forward, "linear_cross_entropy", watched)
    loss_of(sharded, recipe, batch)
    [rows_M] = asked
    assert len(rows_M) == int((batch.labels_BT[:, 1:] != IGNORE).sum()) < batch.labels_BT.numel()
    detach(sharded.plain)
    loss_of(sharded, recipe, batch)
    assert len(asked) == 1


def test_no_logits_are_blamed_for_memory_that_ran_out(make_recipe: Any) -> None:
    sharded = parallelize(built("llama", "", {}, None), Ranks(), make_recipe(), torch.device("cpu"), torch.float32)

    def logits() -> int:
        return Failure.of(torch.OutOfMemoryError("no"), "forward", Load(64, 3, 30, 20), sharded, "none").logits

    assert logits() == 20 * WORDS * 12
    fuse(sharded)
    assert logits() == 0
