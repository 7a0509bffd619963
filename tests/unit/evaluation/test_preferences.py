"""Measured pairs: who comes out ahead, by how much, whatever the batches."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from ingot.data.example import to_example
from ingot.data.pairs import answers_of
from ingot.data.sources import Row
from ingot.data.template import encode_all
from ingot.errors import RecipeError
from ingot.evaluation.compare import compare
from ingot.evaluation.measure import measure
from ingot.recipe_io import parse_recipe

ROWS = [
    {"prompt": "What is the capital of France?", "chosen": "Paris is.", "rejected": "Thank you very much, goodbye."},
    {"prompt": "Hello!", "chosen": "How can I help you today?", "rejected": "The lazy dog."},
    {"prompt": "the fox", "chosen": "jumps over the lazy dog", "rejected": "I would like to book a table"},
    {"prompt": "1 2 3", "chosen": "4", "rejected": "the city centre"},
]


def recipe_of(task="chat-completion", **evaluate):
    objective = {"task": task} | ({} if task == "reward" else {"method": "dpo"})
    data = {"train": "t", "max_tokens": evaluate.pop("max_tokens", 64)}
    return parse_recipe(
        {"name": "p", "model": {"source": "m"}, "data": data, "objective": objective, "evaluate": evaluate}
    )


def examples_of(recipe):
    return [to_example(Row(row, f"row:{n}"), recipe.data, recipe.objective) for n, row in enumerate(ROWS)]


def model_of(tokenizer, kind=LlamaForCausalLM, **settings):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, pad_token_id=0, **shape, **settings)
    return kind(config).eval()


def margins_of(found):
    return [row.numbers["preference_margin"][0] for row in found.samples]


def test_the_margin_is_the_lead_in_log_probability(tiny_tokenizer):
    recipe = recipe_of(tokens_per_batch=70)
    model, examples, ticks = model_of(tiny_tokenizer), examples_of(recipe), []
    found = measure("tuned", model, tiny_tokenizer, examples, (), recipe, ticks.append)
    rows, _ = encode_all(examples, tiny_tokenizer, recipe.data, recipe.objective, ())
    expected = []
    for row in rows:
        sums = []
        for side in answers_of(row):
            with torch.no_grad():
                logps = torch.log_softmax(model(input_ids=torch.tensor([side.ids])).logits[0], -1)
            sums.append(sum(logps[n - 1, side.ids[n]].item() for n, flag in enumerate(side.trainable) if flag))
        expected.append(sums[0] - sums[1])
    assert margins_of(found) == pytest.approx(expected, abs=1e-4)
    share = sum(margin > 0 for margin in expected) / 4
    assert 0 < share < 1
    assert found.scores["preference_accuracy"].value == share
    assert found.scores["preference_margin"].value == pytest.approx(sum(expected) / 4, abs=1e-4)
    assert sum(ticks) == 4
    for row, example, margin in zip(found.samples, ROWS, expected, strict=True):
        assert row.prompt == example["prompt"]
        assert row.references == [example["chosen"]]
        assert row.prediction == example["chosen" if margin > 0 else "rejected"]


@pytest.mark.parametrize("pad_id", [0, 2], ids=["own pad", "pad is eos"])
def test_a_reward_models_margin_is_its_lead_in_score(tiny_tokenizer, pad_id):
    recipe = recipe_of("reward", tokens_per_batch=200)
    model = model_of(tiny_tokenizer, LlamaForSequenceClassification, num_labels=1)
    model.config.pad_token_id = pad_id
    found = measure("tuned", model, tiny_tokenizer, examples_of(recipe), (), recipe)
    rows, _ = encode_all(examples_of(recipe), tiny_tokenizer, recipe.data, recipe.objective, ())
    expected = []
    for row in rows:
        chosen, rejected = (model(input_ids=torch.tensor([side.ids])).logits.item() for side in answers_of(row))
        expected.append(chosen - rejected)
    assert margins_of(found) == pytest.approx(expected, abs=1e-5)


def test_a_draw_is_no_win(tiny_tokenizer):
    recipe = recipe_of("reward")
    model = model_of(tiny_tokenizer, LlamaForSequenceClassification, num_labels=1)
    torch.nn.init.zeros_(model.score.weight)
    found = measure("base", model, tiny_tokenizer, examples_of(recipe), (), recipe)
    assert found.scores["preference_accuracy"].value == 0


def test_two_models_are_compared_pair_by_pair(tiny_tokenizer):
    recipe = recipe_of(metrics=["preference_margin"])
    base, tuned = (
        measure(name, model_of(tiny_tokenizer), tiny_tokenizer, examples_of(recipe), (), recipe)
        for name in ("base", "tuned")
    )
    found = compare({"test": base}, {"test": tuned}, samples=100, confidence=0.95)
    assert found.of("test")["preference_margin"].paired.difference == 0


def test_what_cannot_be_measured_is_refused(tiny_tokenizer):
    recipe = recipe_of(metrics=["exact_match"])
    with pytest.raises(RecipeError, match="preference has preference_accuracy"):
        measure("base", model_of(tiny_tokenizer), tiny_tokenizer, examples_of(recipe), (), recipe)
    recipe = recipe_of(max_tokens=14)
    with pytest.raises(RecipeError, match=r"data\.max_tokens"):
        measure("base", model_of(tiny_tokenizer), tiny_tokenizer, examples_of(recipe), (), recipe)
