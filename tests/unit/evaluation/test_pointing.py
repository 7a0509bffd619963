"""What models point out in rows, scored: models whose answers are known stand in for trained ones."""

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch import Tensor, nn

from ingot.data.conversation import Document
from ingot.data.example import Example
from ingot.data.labeled import Asked, MultiLabeled, Tagged
from ingot.errors import RecipeError
from ingot.evaluation.measure import measure
from ingot.evaluation.result import Evaluation
from ingot.recipe_io import parse_recipe


class Oracle(nn.Module):
    """`answer(ids) -> logits` of one row, [C] or [T, C]; batches are padded with zeros."""

    def __init__(self, answer: Any, **config: Any) -> None:
        super().__init__()
        self.answer, self.config = answer, SimpleNamespace(pad_token_id=0, **config)
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        rows = [self.answer(ids[mask.bool()].tolist()) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        if rows[0].ndim == 1:
            return torch.stack(rows)
        logits = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=30.0)  # padding shouts
        if logits.shape[-1] == 2:
            return SimpleNamespace(start_logits=logits[..., 0], end_logits=logits[..., 1])
        return SimpleNamespace(logits=logits)


def scored(
    task: str, model: nn.Module, tokenizer: Any, rows: list[Any], labels: tuple[str, ...] = (), **sections: Any
) -> Evaluation:
    evaluate = {"bootstrap_samples": 100, "tokens_per_batch": 64, **sections.pop("evaluate", {})}
    recipe = parse_recipe(
        {
            "name": "x",
            "model": {"source": "unused"},
            "data": {"train": "unused", "max_tokens": 48, "overlap_tokens": 8, **sections.pop("data", {})},
            "objective": {"task": task, **sections.pop("objective", {})},
            "evaluate": evaluate,
        }
    )
    seen: list[int] = []
    examples: list[Example] = rows
    found = measure("tuned", model, tokenizer, examples, labels, recipe, seen.append)
    assert sum(seen) == len(rows)
    assert [row.id for row in found.samples] == [row.where for row in rows]
    return found


def values(evaluation: Evaluation) -> dict[str, float]:
    return {name: score.value for name, score in evaluation.scores.items()}


# --- label sets ---

NAMES = ("a", "b", "c")
SETS = [("a",), ("a", "b"), (), ("c",), ("b",)]
PREDICTED = [("a",), ("a", "c"), (), ("b",), ("b", "c")]


def test_label_sets_are_scored_as_by_scikit_learn(tiny_tokenizer: Any) -> None:
    rows = [MultiLabeled(f"text {number}", labels, f"f:{number}") for number, labels in enumerate(SETS)]
    answers = {
        tuple(tiny_tokenizer(row.text)["input_ids"]): torch.tensor([3.0 if name in found else -3.0 for name in NAMES])
        for row, found in zip(rows, PREDICTED, strict=True)
    }
    model = Oracle(lambda ids: answers[tuple(ids)], problem_type="multi_label_classification")
    found = scored("multi-label-classification", model, tiny_tokenizer, rows, NAMES)
    right, ours = (np.array([[name in row for name in NAMES] for row in side]) for side in (SETS, PREDICTED))
    assert values(found) == pytest.approx(
        {
            "f1_micro": f1_score(right, ours, average="micro"),
            "f1_macro": f1_score(right, ours, average="macro"),
            "subset_accuracy": 2 / 5,
        }
    )
    assert found.samples[1].prediction == '["a", "c"]'
    assert found.samples[1].references == ['["a", "b"]']


def test_rows_without_any_label_are_no_ground_for_f1(tiny_tokenizer: Any) -> None:
    model = Oracle(lambda ids: torch.zeros(3), problem_type="multi_label_classification")
    with pytest.raises(RecipeError, match=r"f1_micro.*no row has a label"):
        scored("multi-label-classification", model, tiny_tokenizer, [MultiLabeled("x", (), "f:1")], NAMES)


# --- tags ---


def of_tokens(tokenizer: Any, kinds: int, known: dict[str, int], other: int) -> Any:
    """Logits that give a token the class of its text."""

    def answer(ids: list[int]) -> Tensor:
        classes = [known.get(tokenizer.decode([token]).strip(), other) for token in ids]
        return torch.nn.functional.one_hot(torch.tensor(classes), kinds).float()

    return answer


def test_tags_are_read_at_first_tokens(tiny_tokenizer: Any) -> None:
    names = ("B-city", "I-city", "O")
    rows = [
        Tagged(("the", "city", "of", "France"), ("O", "B-city", "O", "B-city"), "f:1"),
        Tagged(("Paris", "city"), ("B-city", "I-city"), "f:2"),
        Tagged(("the",) * 60 + ("city",), ("O",) * 60 + ("B-city",), "f:3"),  # cut before its entity
    ]
    model = Oracle(of_tokens(tiny_tokenizer, 3, {"city": 0}, 2))
    found = scored("token-classification", model, tiny_tokenizer, rows, names)
    assert [row.prediction.split() for row in found.samples][:2] == [["O", "B-city", "O", "O"], ["O", "B-city"]]
    assert found.samples[2].prediction.split() == ["O"] * 61
    # One of two predicted is right; there are four: B, B, one of two words, and the one that was cut off.
    assert values(found) == pytest.approx({"entity_f1": 1 / 3, "entity_precision": 1 / 2, "entity_recall": 1 / 4})
    assert found.scores["entity_f1"].n == 3


def test_tags_that_are_no_entities_have_an_accuracy(tiny_tokenizer: Any) -> None:
    rows = [Tagged(("the", "city"), ("DET", "NOUN"), "f:1")]
    model = Oracle(of_tokens(tiny_tokenizer, 2, {"city": 0}, 0))
    assert values(scored("token-classification", model, tiny_tokenizer, rows, ("DET", "NOUN"))) == {
        "token_accuracy": 0.5
    }
    metrics = {"metrics": ["entity_f1"]}
    with pytest.raises(RecipeError, match=r"entity_f1.*'DET' neither begins nor continues"):
        scored("token-classification", model, tiny_tokenizer, rows, ("DET", "NOUN"), evaluate=metrics)


# --- answers ---

CONTEXT = " ".join(["The quick brown fox jumps over the lazy dog."] * 6 + ["Paris is the capital of France."])


def pointing_at(tokenizer: Any, words: dict[str, float], nowhere: float = -5.0) -> Any:
    """Logits that are high at tokens of these texts, and at the first token `nowhere`."""

    def answer(ids: list[int]) -> Tensor:
        each = [words.get(tokenizer.decode([token]).strip(), -9.0) for token in ids]
        each[0] = nowhere
        return torch.tensor(each).unsqueeze(1).repeat(1, 2)

    return answer


def asked(answer: str | None, where: str, context: str = CONTEXT) -> Asked:
    answers = () if answer is None else ((answer, context.rindex(answer)),)
    return Asked("What?", context, answers, where)


def test_the_best_answer_of_all_windows(tiny_tokenizer: Any) -> None:
    model = Oracle(pointing_at(tiny_tokenizer, {"France": 9.0, "fox": 1.0}))
    rows = [asked("France", "f:1"), Asked("What?", CONTEXT, (("Paris", CONTEXT.index("Paris")),), "f:2")]
    found = scored("question-answering", model, tiny_tokenizer, rows)
    assert [row.prediction for row in found.samples] == ["France", "France"]
    assert values(found) == {"squad_exact_match": 0.5, "squad_f1": 0.5}
    assert found.samples[0].prompt == f"What?\n{CONTEXT}"


def test_several_right_answers(tiny_tokenizer: Any) -> None:
    model = Oracle(pointing_at(tiny_tokenizer, {"France": 9.0}))
    both = Asked("What?", CONTEXT, tuple((text, CONTEXT.index(text)) for text in ("Paris", "France")), "f:1")
    found = scored("question-answering", model, tiny_tokenizer, [both])
    assert found.samples[0].references == ["Paris", "France"]
    assert values(found)["squad_exact_match"] == 1.0


def test_none_is_said_only_where_rows_without_an_answer_are_asked(tiny_tokenizer: Any) -> None:
    unsure = Oracle(pointing_at(tiny_tokenizer, {"fox": 1.0}, nowhere=8.0))
    assert scored("question-answering", unsure, tiny_tokenizer, [asked("fox", "f:1")]).samples[0].prediction == "fox"
    found = scored("question-answering", unsure, tiny_tokenizer, [asked("fox", "f:1"), asked(None, "f:2")])
    assert [row.prediction for row in found.samples] == ["", ""]
    assert [row.references for row in found.samples] == [["fox"], [""]]
    assert values(found) == {"squad_exact_match": 0.5, "squad_f1": 0.5}
    parted = {"metrics": ["squad_f1_has_answer", "squad_f1_no_answer"]}
    rows = [asked("fox", "f:1"), asked(None, "f:2"), asked(None, "f:3")]
    found = scored("question-answering", unsure, tiny_tokenizer, rows, evaluate=parted)
    assert values(found) == {"squad_f1_has_answer": 0.0, "squad_f1_no_answer": 1.0}
    # In one window the answer is surer than "not here": that others lack it says nothing.
    sure = Oracle(pointing_at(tiny_tokenizer, {"France": 30.0}, nowhere=8.0))
    assert (
        scored("question-answering", sure, tiny_tokenizer, [asked("France", "f:1"), asked(None, "f:2")])
        .samples[0]
        .prediction.startswith("France")
    )


def test_a_question_without_room_has_no_answer(tiny_tokenizer: Any) -> None:
    model = Oracle(pointing_at(tiny_tokenizer, {"France": 9.0}))
    rows = [Asked("What? " * 60, CONTEXT, (("France", CONTEXT.index("France")),), "f:1"), asked("France", "f:2")]
    found = scored("question-answering", model, tiny_tokenizer, rows)
    assert [row.prediction for row in found.samples] == ["", "France"]


# --- hidden tokens ---


def test_hidden_tokens_are_the_same_for_every_model(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(mask_token="<|im_start|>")
    text = "The quick brown fox jumps over the lazy dog. Paris is the capital of France."
    rows = [Document(text, "f:1"), Document("Hello! How can I help you today?", "f:2")]
    most = tokenizer(" fox")["input_ids"][-1]

    def answer(ids: list[int]) -> Tensor:
        logits = torch.zeros(len(ids), len(tokenizer))
        logits[:, most] = 2.0
        return logits

    options = {"objective": {"mask_share": 0.5}}
    first, second = (scored("fill-mask", Oracle(answer), tokenizer, rows, **options) for _ in range(2))
    assert values(first) == values(second)
    hidden = sum(row.numbers["perplexity"][1] for row in first.samples)
    assert hidden == sum(max(1, round(0.5 * len(tokenizer(row.text)["input_ids"]))) for row in rows)
    hits = sum(row.numbers["masked_accuracy"][0] for row in first.samples)
    normal = np.log(np.exp(2.0) + len(tokenizer) - 1)
    assert values(first)["perplexity"] == pytest.approx(np.exp(normal - 2.0 * hits / hidden))
    assert values(first)["masked_accuracy"] == pytest.approx(hits / hidden)
    assert time.perf_counter() > first.seconds >= 0
