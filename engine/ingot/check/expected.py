"""The loss by its definition, by another way than training's: a row at a time, from what the model puts out."""

# T tokens of a row, V vocabulary, C classes

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ingot.data.encoded import IGNORE, Encoded
from ingot.data.example import Example
from ingot.data.labeled import Labeled, MultiLabeled
from ingot.model.kinds import knows_segments, logits_of
from ingot.recipe import CAUSAL

from .trial import Trial

Forward: TypeAlias = Callable[..., Any]
OWN_LOSS = ("summarization", "translation", "token-classification", "question-answering", "fill-mask")


@dataclass(frozen=True)
class Expected:
    """A loss, and by whose definition."""

    value: float
    by: str


def expected_loss(trial: Trial) -> Expected | str:
    """The mean loss over the probe's targets, or why there is no second way to compute it."""
    section = trial.subject.recipe.objective
    if section.loss in CAUSAL:
        by = "log-probabilities of the learned tokens, each given what stands before it"
        return Expected(_mean(trial, lambda row: _next_tokens(trial, row)), by)
    if section.loss in ("text-classification", "multi-label-classification"):
        examples = trial.subject.examples
        by = "the probabilities of the rows' own labels, by the names that the model gives its outputs"
        return Expected(_mean(trial, lambda row: _classes(trial, row, examples[row.where])), by)
    if section.label_smoothing:
        return f"transformers' own {section.loss} has no label smoothing to compare with"
    if section.loss in OWN_LOSS:
        return Expected(_mean(trial, lambda row: _by_transformers(trial, row)), "transformers' own loss")
    if section.loss == "distillation":
        by = "both models' log-probabilities at the learned tokens"
        return Expected(_mean(trial, lambda row: _taught(trial, row)), by)
    return Expected(_preferences(trial), "one answer after the other, by the equations of the method")


def _mean(trial: Trial, of_row: Callable[[Encoded], float]) -> float:
    return sum(map(of_row, trial.rows)) / sum(row.n_targets for row in trial.rows)


def _inputs(trial: Trial, row: Encoded) -> dict[str, Tensor]:
    ids_1T = torch.tensor([row.ids], device=trial.sharded.device)
    return {"input_ids": ids_1T, "attention_mask": torch.ones_like(ids_1T)}


def _next_tokens(trial: Trial, row: Encoded) -> float:
    """Sum over the row's learned tokens."""
    smoothing, total = trial.subject.recipe.objective.label_smoothing, 0.0
    for token, logp_V in _learned(trial, row, trial.sharded.forward):
        total -= float((1 - smoothing) * logp_V[token] + smoothing * logp_V.mean())
    return total


def _learned(trial: Trial, row: Encoded, forward: Forward, heat: float = 1.0) -> Iterator[tuple[int, Tensor]]:
    """Every learned token of a row with the log-probabilities [V] of what may stand in its place."""
    logits_TV = logits_of(forward(**_inputs(trial, row), use_cache=False))[0].double()
    logp_TV = (logits_TV / heat).log_softmax(-1)
    for place in range(1, len(row.ids)):
        if row.trainable[place]:
            yield row.ids[place], logp_TV[place - 1]


def _taught(trial: Trial, row: Encoded) -> float:
    section, teacher = trial.subject.recipe.objective, trial.sharded.teacher
    assert teacher is not None
    total = (1 - section.teacher_share) * _next_tokens(trial, row)
    heat = section.temperature
    pairs = zip(_learned(trial, row, trial.sharded.forward, heat), _learned(trial, row, teacher, heat), strict=True)
    for (_, own_V), (_, taught_V) in pairs:
        width = min(len(own_V), len(taught_V))
        own_V, taught_V = own_V[:width].log_softmax(-1), taught_V[:width].log_softmax(-1)
        divergence = (taught_V.exp() * (taught_V - own_V)).sum()
        total += float(section.teacher_share * heat**2 * divergence)
    return total


def _preferences(trial: Trial) -> float:
    """Mean over pairs, from the two answers of each."""
    section, total, likelihood = trial.subject.recipe.objective, 0.0, 0.0
    for row in trial.rows:
        sides = list(_sides(row))
        if section.loss == "reward":
            margin = _score(trial, sides[0]) - _score(trial, sides[1])
        else:
            found = [[float(logp_V[token]) for token, logp_V in _learned(trial, side, trial.sharded.forward)]
                     for side in sides]  # fmt: skip
            if section.loss == "dpo":
                gains = [sum(logps) - before for logps, before in zip(found, row.reference, strict=True)]
                margin = section.beta * (gains[0] - gains[1])
            else:
                chances = [math.exp(sum(logps) / len(logps)) for logps in found]
                margin = math.log(chances[0] / (1 - chances[0])) - math.log(chances[1] / (1 - chances[1]))
                likelihood -= sum(found[0])
        smoothing = 0.0 if section.loss == "orpo" else section.label_smoothing
        total += (1 - smoothing) * math.log1p(math.exp(-margin)) + smoothing * math.log1p(math.exp(margin))
    mean = total / len(trial.rows)
    if section.loss != "orpo":
        return mean
    return likelihood / sum(row.n_targets for row in trial.rows) + section.beta * mean


def _sides(row: Encoded) -> Iterator[Encoded]:
    start = 0
    for n_tokens in row.parts:
        part = slice(start, start + n_tokens)
        yield Encoded(row.ids[part], row.trainable[part], None, row.where)
        start += n_tokens


def _score(trial: Trial, side: Encoded) -> float:
    return float(logits_of(trial.sharded.forward(**_inputs(trial, side))).reshape(()))


def _classes(trial: Trial, row: Encoded, example: Example) -> float:
    names: dict[int, str] = trial.sharded.plain.config.id2label  # type: ignore[assignment, union-attr]
    logits_C = logits_of(trial.sharded.forward(**_inputs(trial, row)))[0].double()
    if isinstance(example, MultiLabeled):
        wanted_C = torch.tensor([float(names[index] in example.labels) for index in range(len(logits_C))])
        smoothing = trial.subject.recipe.objective.label_smoothing
        wanted_C = (1 - smoothing) * wanted_C.to(logits_C) + smoothing / 2
        return float(-(wanted_C * F.logsigmoid(logits_C) + (1 - wanted_C) * F.logsigmoid(-logits_C)).sum())
    assert isinstance(example, Labeled)
    [index] = [number for number, name in names.items() if name == example.label]
    logp_C, smoothing = logits_C.log_softmax(-1), trial.subject.recipe.objective.label_smoothing
    return float(-(1 - smoothing) * logp_C[index] - smoothing * logp_C.mean())


def _by_transformers(trial: Trial, row: Encoded) -> float:
    """Sum over the row's targets of the loss that the model itself computes from labels."""
    batch = trial.subject.batch([row], flat=False)
    inputs: dict[str, Any] = {"input_ids": batch.ids_BT, "attention_mask": batch.attention_BT}
    kind = trial.subject.recipe.objective.loss
    if kind == "question-answering":
        assert batch.row_labels is not None
        inputs |= {"start_positions": batch.row_labels[:, 0], "end_positions": batch.row_labels[:, 1]}
        if batch.types_BT is not None and knows_segments(trial.sharded.plain):
            inputs["token_type_ids"] = batch.types_BT
    elif batch.targets_BU is not None:
        inputs["labels"] = batch.targets_BU
    else:
        inputs["labels"] = batch.labels_BT
    output = trial.sharded.forward(**{name: value.to(trial.sharded.device) for name, value in inputs.items()})
    labels = inputs.get("labels")
    n_targets = 2 if labels is None else int((labels != IGNORE).sum())
    return float(output.loss) * n_targets
