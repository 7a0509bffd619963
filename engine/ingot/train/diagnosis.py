"""A loss or gradient that is not finite: which tensor was the first, and the batch that caused it, kept for a look."""

from ingot.data.loader import Batch
from ingot.data.plan import Portion
from ingot.errors import IngotError
from ingot.parallel.sharded import Sharded
from ingot.recipe import Recipe
from ingot.train.objectives import Loss


def not_finite(
    reason: str, sharded: Sharded, batches: list[Batch], portion: Portion, recipe: Recipe, objective: Loss
) -> IngotError:
    """The error to raise."""
    rows = ", ".join(portion.rows[index].where for index in portion.indices[:3])
    return IngotError(f"{reason}; nothing was updated by it. Rows: {rows} ... Lower optim.lr, or use model.dtype=float32")
