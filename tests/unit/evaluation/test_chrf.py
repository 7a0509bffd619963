"""chrF against sacrebleu's own."""

import numpy as np
import pytest
from sacrebleu.metrics.chrf import CHRF

from ingot.evaluation.metrics import METRICS

PREDICTIONS = ["Two men are outside.", "a dog runs on the grass", "", "x", "Ein Mädchen klettert   in ein Haus"]
REFERENCES = [
    ["Two young men are outside near many bushes.", "Two men stand outside."],
    ["a brown dog is running over the grass"],
    ["nothing was written"],
    ["xyz abc", "x"],
    ["Ein kleines Mädchen klettert in ein Spielhaus"],
]


def theirs(predictions, references):
    longest = max(map(len, references))
    streams = [[refs[n] if n < len(refs) else None for refs in references] for n in range(longest)]
    return CHRF().corpus_score(predictions, streams).score


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [0], [2], [3], [1, 4]])
def test_equals_sacrebleu(rows):
    predictions, references = [PREDICTIONS[i] for i in rows], [REFERENCES[i] for i in rows]
    ours = METRICS["chrf"].compute(predictions, references).value()
    assert ours == pytest.approx(theirs(predictions, references), abs=1e-9)


def test_resamples_follow_from_the_rows_numbers():
    statistic = METRICS["chrf"].compute(PREDICTIONS, REFERENCES)
    drawn = np.array([[0, 0, 1, 4, 4], [2, 2, 2, 2, 2]])
    values = statistic.value_of(statistic.rows[drawn].sum(1))
    expected = [theirs([PREDICTIONS[i] for i in rows], [REFERENCES[i] for i in rows]) for rows in drawn.tolist()]
    assert values == pytest.approx(expected, abs=1e-9)


def test_an_empty_reference_is_refused():
    assert "empty" in METRICS["chrf"].undefined([["a"], [" "]])
    assert METRICS["chrf"].undefined(REFERENCES) is None
