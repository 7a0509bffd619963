"""Out of memory: what grew, and the cheapest lever; or half the microbatch at the same tokens per step."""

from collections.abc import Callable

from ingot.data.loader import Batch
from ingot.data.plan import Portion
from ingot.errors import IngotError
from ingot.parallel.sharded import Sharded
from ingot.recipe import Recipe


def relieve(
    error: BaseException,
    sharded: Sharded,
    batches: list[Batch],
    portion: Portion,
    recipe: Recipe,
    tokens_per_microbatch: int,
    notify: Callable[[str], None],
) -> int:
    """A smaller `tokens_per_microbatch`, or an error."""
    raise IngotError(f"out of memory: {error}") from error
