"""Likelihoods and pairs project only the rows that count, a chunk at a time, and equal those of all logits."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from ingot.data.example import to_example
from ingot.data.sources import Row
from ingot.data.template import encode_all
from ingot.evaluation.measure import measure
from ingot.model import projection
from ingot.recipe import Recipe
from ingot.recipe_io import parse_recipe

CHUNK = 5  # rows of logits
TEXTS = [
    {"text": "The quick brown fox jumps over the lazy dog."},
    {"text": "Hello!"},
    {"text": "What is the capital of France? Paris is the capital of France. Thank you very much, goodbye."},
]
PAIRS = [
    {"prompt": "What is the capital of France?", "chosen": "Paris is.", "rejected": "Thank you very much, goodbye."},
    {"prompt": "Hello!", "chosen": "How can I help you today?", "rejected": "The lazy dog."},
]


class Widest(TorchDispatchMode):
    """The most numbers of any new tensor that has the vocabulary as its last dimension: weights are shown turned."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.found = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        held = {it.untyped_storage().data_ptr() for it in tree_leaves((args, kwargs)) if isinstance(it, torch.Tensor)}
        new = isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in held
        if new and out.dim() > 1 and out.shape[-1] == self.vocabulary:
            self.found = max(self.found, out.numel())
        return out


def _recipe(objective: dict[str, str]) -> Recipe:
    data = {"train": "t", "max_tokens": 64}
    evaluate = {"tokens_per_batch": 200}
    return parse_recipe(
        {"name": "p", "model": {"source": "m"}, "data": data, "objective": objective, "evaluate": evaluate}
    )


@pytest.fixture
def model(tiny_tokenizer: Any) -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tiny_tokenizer), initializer_range=0.3, pad_token_id=0, **shape)
    return LlamaForCausalLM(config).eval()


def _nll(model: Any, ids: list[int], trainable: list[bool]) -> float:
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    labels_T = torch.tensor([token if flag else -100 for token, flag in zip(ids, trainable, strict=True)][1:])
    return F.cross_entropy(logits_TV, labels_T, ignore_index=-100, reduction="sum").item()


@pytest.mark.parametrize(
    ("objective", "rows"),
    [({"task": "language-modeling"}, TEXTS), ({"task": "chat-completion", "method": "dpo"}, PAIRS)],
    ids=["likelihoods", "pairs"],
)
def test_rows_that_count_are_projected_a_chunk_at_a_time(
    model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, objective: dict[str, str], rows: list[Any]
) -> None:
    vocabulary = len(tiny_tokenizer)
    monkeypatch.setattr(projection, "LOGITS", CHUNK * vocabulary)
    recipe = _recipe(objective)
    examples = [to_example(Row(row, f"row:{n}"), recipe.data, recipe.objective) for n, row in enumerate(rows)]
    encoded, _ = encode_all(examples, tiny_tokenizer, recipe.data, recipe.objective, ())
    with Widest(vocabulary) as widest:
        found = measure("base", model, tiny_tokenizer, examples, (), recipe)
    assert 0 < widest.found <= CHUNK * vocabulary
    if recipe.objective.rows == "language-modeling":
        values = [row.output["nll"] for row in found.samples]
        wanted = [_nll(model, row.ids, row.trainable) for row in encoded]
    else:
        values = [row.numbers["preference_margin"][0] for row in found.samples]
        wanted = []
        for row in encoded:
            cut = row.parts[0]
            chosen, rejected = (
                _nll(model, row.ids[part], row.trainable[part]) for part in (slice(cut), slice(cut, None))
            )
            wanted.append(rejected - chosen)
    assert values == pytest.approx(wanted, abs=1e-4)
