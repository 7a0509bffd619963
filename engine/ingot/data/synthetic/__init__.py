"""Data sets that this package writes itself, from a seed: the same rows on every machine, in every process.

`tool-calls`: a request in words -> a JSON tool call, split by sentence pattern. `tool-preferences`: the same, with a
wrong call beside the right one. `letters`: customers' letters and the topics in them. `people`: a question about
somebody, and a text to find the answer in. `errands`: a letter, and in a line what it asks for. `nano-copying` and
`nano-corpus`: short dialogues that `ingot://nano` is pretrained on, in this order.
"""

from collections.abc import Iterator
from typing import Any

from ingot.data.synthetic import corpus, errands, letters, people, preferences, tool_calls
from ingot.errors import DataError
from ingot.registry import nearest

_SETS = {
    "tool-calls": (tool_calls.SIZES, tool_calls.rows),
    "tool-preferences": (preferences.SIZES, preferences.rows),
    "errands": (errands.SIZES, errands.rows),
    "letters": (letters.SIZES, letters.rows),
    "people": (people.SIZES, people.rows),
    "nano-copying": (corpus.COPYING_SIZES, corpus.copying_rows),
    "nano-corpus": (corpus.SIZES, corpus.rows),
}
DEFAULT_SPLIT = "train"


def generate(name: str, split: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of data set `name`; `split` None means train.

    Raises `DataError` for a name or a split that does not exist.
    """
    if name not in _SETS:
        raise DataError("data.train.uri", f"ingot://{name}", nearest(name, _SETS))
    sizes, rows = _SETS[name]
    split = split or DEFAULT_SPLIT
    if split not in sizes:
        raise DataError("data.train.split", split, nearest(split, sizes))
    return rows(split)
