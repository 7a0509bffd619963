"""The next step's batches are made while this one trains."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")

DEPTH = 2  # steps made ahead: one hides the making, the second a row that takes long


def ahead(items: Iterator[Item], make: Callable[[Item], Made]) -> Iterator[tuple[Item, Made]]:
    """(item, make(item)) of each of `items`, both fetched in a thread of their own, at most `DEPTH` ahead, in order."""
    with ThreadPoolExecutor(1, thread_name_prefix="ingot-data") as pool:

        def fetch() -> tuple[Item, Made] | None:
            for item in islice(items, 1):
                return item, make(item)
            return None

        waiting = deque(pool.submit(fetch) for _ in range(DEPTH))
        while True:
            found = waiting.popleft().result()
            if found is None:
                return
            waiting.append(pool.submit(fetch))
            yield found
