import pytest

from ingot.data.rows import ListRows
from ingot.data.template import Encoded

ROWS = [
    Encoded([5, 6, 7], [False, True, True], None, "a"),
    Encoded([8, 9], [True, True], None, "b"),
    Encoded([9, 9, 9, 4], [False] * 4, [2], "c"),
]


def test_rows_in_memory():
    rows = ListRows(ROWS)
    assert len(rows) == 3
    assert [rows[index] for index in range(3)] == list(rows) == ROWS
    assert rows.lengths.tolist() == [3, 2, 4]
    assert rows.targets.tolist() == [2, 1, 1]
    assert rows.lengths.dtype == rows.targets.dtype == "int64"


@pytest.mark.parametrize(("row", "wanted"), list(zip(ROWS, (2, 1, 1), strict=True)))
def test_targets_are_terms_of_the_loss(row, wanted):
    assert row.n_targets == wanted  # nothing stands before a first token; a class is one term, whatever the mask
