"""Losses of what is pointed out: equal to transformers' own heads, exact however a step is cut, and learnable."""

import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForQuestionAnswering,
    LlamaForTokenClassification,
)

from ingot.data.encoded import IGNORE, Encoded
from ingot.data.loader import Drawn, muted
from ingot.data.plan import Divisor
from ingot.model.pooling import MeanPoolClassifier
from ingot.parallel.sharded import Sharded
from ingot.parallel.strategies import parallelize
from ingot.ranks import Ranks
from ingot.recipe import Objective
from ingot.train.objectives import OBJECTIVES, collator_of

WORDS, CLASSES, MASK = 97, 3, 4
DRAWN = Drawn(MASK, WORDS, "0 0")
LENGTHS = (9, 5, 14, 7)
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
BERT = {**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Case(NamedTuple):
    """A task, its model, and what transformers' forward takes beside ids and mask."""

    task: str
    make: Any
    config: Any
    flat: bool = False  # whether rows may lie end to end

    def model(self) -> Any:
        torch.manual_seed(0)
        several = self.task == "multi-label-classification"
        found = self.make(self.config(several))
        found.set_attn_implementation("ingot")
        with torch.no_grad():
            for parameter in found.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return found.eval()


def bert(several: bool) -> BertConfig:
    kind = "multi_label_classification" if several else None
    return BertConfig(**BERT, num_labels=CLASSES, problem_type=kind)


def bert_of_two(several: bool) -> BertConfig:
    return BertConfig(**BERT, num_labels=2)


def llama(several: bool) -> LlamaConfig:
    return LlamaConfig(**SIZES, num_labels=CLASSES)


CASES = [
    Case("text-classification", BertForSequenceClassification, bert),
    Case("multi-label-classification", BertForSequenceClassification, bert),
    Case("token-classification", BertForTokenClassification, bert, flat=True),
    Case("token-classification", LlamaForTokenClassification, llama, flat=True),
    Case("question-answering", BertForQuestionAnswering, bert_of_two),
    Case("question-answering", LlamaForQuestionAnswering, llama),
    Case("fill-mask", BertForMaskedLM, bert, flat=True),
]


def case_id(case: Case) -> str:
    return f"{case.task} {case.make.__name__}"


@pytest.fixture(params=CASES, ids=case_id)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def row_of(task: str, draw: random.Random, length: int, number: int) -> Encoded:
    ids = [draw.randrange(5, WORDS) for _ in range(length)]
    where, off = f"row:{number}", [False] * length
    if task == "text-classification":
        return Encoded(ids, off, [draw.randrange(CLASSES)], where)
    if task == "multi-label-classification":
        return Encoded(ids, off, [draw.randrange(2) for _ in range(CLASSES)], where)
    if task == "token-classification":
        tags = [
            IGNORE if place in (0, length - 1) or place % 4 == 3 else draw.randrange(CLASSES) for place in range(length)
        ]
        return Encoded(ids, [tag != IGNORE for tag in tags], tags, where)
    if task == "question-answering":
        first = draw.randrange(length)
        return Encoded(ids, off, [first, draw.randrange(first, length)], where, parts=(3, length - 3))
    learned = [0 < place < length - 1 for place in range(length)]
    return Encoded(ids, learned, None, where, terms=max(1, round(0.3 * (length - 2))))


def rows_of(task: str, lengths: tuple[int, ...] = LENGTHS) -> list[Encoded]:
    draw = random.Random(1)
    return [row_of(task, draw, length, number) for number, length in enumerate(lengths)]


def sharded_of(model: Any, make_recipe: Any) -> Sharded:
    return parallelize(model, Ranks(), make_recipe(), torch.device("cpu"), torch.float32)


def ours(
    sharded: Sharded, task: str, rows: list[Encoded], divisor: Divisor, flat: bool = False, **section: Any
) -> Tensor:
    objective = Objective(task=task, **section)
    batch = collator_of(objective)(rows, 0, flat=flat, drawn=DRAWN)
    return OBJECTIVES[objective.loss](sharded, batch, divisor, objective)


def divisor_of(rows: list[Encoded]) -> Divisor:
    return Divisor(sum(row.n_targets for row in rows), len(rows))


def theirs(model: Any, task: str, rows: list[Encoded]) -> Tensor:
    """transformers' own loss on the same padded batch."""
    batch = collator_of(Objective(task=task))(rows, 0, drawn=DRAWN)
    inputs = {"input_ids": batch.ids_BT, "attention_mask": batch.attention_BT}
    if task == "question-answering":
        assert batch.row_labels is not None
        types = {"token_type_ids": batch.types_BT} if isinstance(model, BertForQuestionAnswering) else {}
        return model(
            **inputs, **types, start_positions=batch.row_labels[:, 0], end_positions=batch.row_labels[:, 1]
        ).loss
    if task == "multi-label-classification":
        assert batch.row_labels is not None
        return model(**inputs, labels=batch.row_labels.float()).loss
    return model(**inputs, labels=batch.labels_BT if batch.row_labels is None else batch.row_labels).loss


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: Any, found: Tensor, expected: Tensor) -> None:
    assert abs(found.item() - expected.item()) < 1e-5
    one, other = gradients(model, found), gradients(model, expected)
    assert one.keys() == other.keys() != set()
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, other[name], rtol=0, atol=1e-5, msg=name)


def test_equals_transformers_own_head(case: Case, make_recipe: Any) -> None:
    model = case.model()
    rows = rows_of(case.task)
    found = ours(sharded_of(model, make_recipe), case.task, rows, divisor_of(rows))
    if case.task == "question-answering":  # theirs lets padding compete: see the next test
        expected = torch.stack([theirs(model, case.task, [row]) for row in rows]).mean()
    else:
        expected = theirs(model, case.task, rows)
    assert_same(model, found, expected)


def test_an_answer_s_loss_is_theirs_without_padding_and_not_moved_by_it(make_recipe: Any) -> None:
    [case] = [case for case in CASES if case.make is BertForQuestionAnswering]
    model = case.model()
    even = rows_of(case.task, (9, 9, 9))
    sharded = sharded_of(model, make_recipe)
    assert_same(model, ours(sharded, case.task, even, divisor_of(even)), theirs(model, case.task, even))
    uneven = rows_of(case.task)
    alone = torch.stack([theirs(model, case.task, [row]) for row in uneven]).mean()
    # Their mean over a padded batch is another one: it depends on which rows lie beside each other.
    assert abs(theirs(model, case.task, uneven).item() - alone.item()) > 0.01
    assert abs(ours(sharded, case.task, uneven, divisor_of(uneven)).item() - alone.item()) < 1e-5


def test_a_model_without_segments_is_not_told_of_them(make_recipe: Any) -> None:
    torch.manual_seed(0)
    model = BertForQuestionAnswering(BertConfig(**BERT, type_vocab_size=1)).eval()  # as RoBERTa has it
    rows = rows_of("question-answering")
    assert ours(sharded_of(model, make_recipe), "question-answering", rows, divisor_of(rows)).isfinite()


@pytest.mark.parametrize(
    ("case", "flat"),
    [(case, flat) for case in CASES for flat in (False, True) if case.flat or not flat],
    ids=lambda value: case_id(value) if isinstance(value, Case) else "end to end" if value else "padded",
)
def test_microbatches_add_up_to_the_whole(case: Case, flat: bool, make_recipe: Any) -> None:
    model = case.model()
    rows = rows_of(case.task)
    sharded, divisor = sharded_of(model, make_recipe), divisor_of(rows)
    whole = ours(sharded, case.task, rows, divisor)
    parts = [rows[:1], rows[1:3], rows[3:], [muted(rows[0])]]
    assert_same(model, sum((ours(sharded, case.task, part, divisor, flat) for part in parts), torch.zeros(())), whole)


def test_a_muted_row_adds_nothing_and_reaches_every_weight(case: Case, make_recipe: Any) -> None:
    model = case.model()
    rows = rows_of(case.task)
    sharded = sharded_of(model, make_recipe)
    loss = ours(sharded, case.task, [muted(rows[0])], divisor_of(rows))
    assert loss.item() == 0
    everything = {name for name, p in model.named_parameters() if p.requires_grad}
    found = gradients(model, loss)
    reached = gradients(model, ours(sharded, case.task, rows, divisor_of(rows)))
    assert found.keys() == reached.keys() <= everything
    assert all(gradient.abs().max() == 0 for gradient in found.values())


def test_mean_pooling_gives_label_sets_end_to_end(make_recipe: Any) -> None:
    torch.manual_seed(0)
    backbone = BertModel(bert(True), add_pooling_layer=False)
    backbone.set_attn_implementation("ingot")
    model = MeanPoolClassifier(backbone, CLASSES).eval()
    rows = rows_of("multi-label-classification")
    sharded, divisor = sharded_of(model, make_recipe), divisor_of(rows)
    task = "multi-label-classification"
    assert divisor.targets == len(rows) * CLASSES
    assert_same(model, ours(sharded, task, rows, divisor, flat=True), ours(sharded, task, rows, divisor))


def test_smoothed_label_sets(make_recipe: Any) -> None:
    [case] = [case for case in CASES if case.task == "multi-label-classification"]
    model, rows = case.model(), rows_of(case.task)
    found = ours(sharded_of(model, make_recipe), case.task, rows, divisor_of(rows), label_smoothing=0.2)
    batch = collator_of(Objective(task=case.task))(rows, 0)
    logits = model(input_ids=batch.ids_BT, attention_mask=batch.attention_BT).logits
    assert batch.row_labels is not None
    wanted = torch.where(batch.row_labels == 1, 0.9, 0.1)
    torch.testing.assert_close(found, torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted))


def test_smoothed_answers_spread_over_the_row_and_not_over_padding(make_recipe: Any) -> None:
    [case] = [case for case in CASES if case.make is BertForQuestionAnswering]
    model, rows = case.model(), rows_of(case.task)
    sharded = sharded_of(model, make_recipe)
    found = ours(sharded, case.task, rows, divisor_of(rows), label_smoothing=0.2)
    expected = []
    for row in rows:
        batch = collator_of(Objective(task=case.task))([row], 0)
        output = model(input_ids=batch.ids_BT, token_type_ids=batch.types_BT)
        logits = torch.stack([output.start_logits[0], output.end_logits[0]])
        wanted = torch.tensor(list(row.labels or ()))
        expected.append(torch.nn.functional.cross_entropy(logits, wanted, label_smoothing=0.2))
    torch.testing.assert_close(found, torch.stack(expected).mean())


def learnable(task: str, draw: random.Random, number: int) -> Encoded:
    """A row whose targets follow from its ids alone."""
    length = draw.randrange(6, 14)
    ids = [draw.randrange(10, 40) for _ in range(length)]
    where, off = f"row:{number}", [False] * length
    if task == "text-classification":
        ids[2] = 50 + (kind := draw.randrange(CLASSES))
        return Encoded(ids, off, [kind], where)
    if task == "multi-label-classification":
        kinds = [draw.randrange(2) for _ in range(CLASSES)]
        ids[1:4] = [50 + place if kind else 40 for place, kind in enumerate(kinds)]
        return Encoded(ids, off, kinds, where)
    if task == "token-classification":
        return Encoded(ids, [True] * length, [int(token > 25) for token in ids], where)
    if task == "question-answering":
        first = draw.randrange(1, length - 1)
        ids[first : first + 2] = [50, 51]
        return Encoded(ids, off, [first, first + 1], where)
    ids = [draw.randrange(10, 14)] * length
    return Encoded(ids, [True] * length, None, where, terms=2)


@pytest.mark.parametrize("task", [*dict.fromkeys(case.task for case in CASES)])
def test_learns(task: str, make_recipe: Any) -> None:
    """A fresh model of two layers finds a rule that a person would see at once."""
    case = next(case for case in CASES if case.task == task)
    torch.manual_seed(0)
    config = case.config(False)
    config.initializer_range = 0.05
    pooled = task == "multi-label-classification"  # what an encoder gets there
    model = (
        MeanPoolClassifier(BertModel(config, add_pooling_layer=False), CLASSES) if pooled else case.make(config)
    ).eval()
    sharded, draw = sharded_of(model, make_recipe), random.Random(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    losses = []
    for step in range(50):
        rows = [learnable(task, draw, 100 * step + number) for number in range(16)]
        loss = ours(sharded, task, rows, divisor_of(rows))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.4 * losses[0], losses[::10]
