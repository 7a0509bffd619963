"""Rows with something to point out -> ids and labels. Each encoder gives a row, and whether it was cut."""

from collections.abc import Sequence

from ingot.data.encoded import Encoded
from ingot.data.labeled import Labeled
from ingot.data.turns import Tokenizer
from ingot.errors import DataError
from ingot.recipe import Data, Objective
from ingot.registry import nearest


def labeled(
    rows: Sequence[Labeled], tokenizer: Tokenizer, data: Data, objective: Objective, labels: Sequence[str]
) -> list[tuple[Encoded, bool]]:
    """The text with its special tokens, and the number of its class."""
    max_tokens = data.max_tokens
    index = {label: number for number, label in enumerate(labels)}
    results = []
    for row, ids in zip(rows, tokenizer([row.text for row in rows])["input_ids"], strict=True):
        if row.label not in index:
            fix = f"training never saw this label; {nearest(row.label, index)}"
            raise DataError("label", row.label, fix, where=row.where)
        is_long = len(ids) > max_tokens
        if is_long:  # cut by the tokenizer, which keeps the closing special token ([SEP]) that a plain cut would lose
            ids = tokenizer(row.text, truncation=True, max_length=max_tokens)["input_ids"]
        results.append((Encoded(list(ids), [False] * len(ids), [index[row.label]], row.where), is_long))
    return results
