"""Which settings go together: one table that turns recipes away, writes the support matrix and lists what tests train."""

from ingot.errors import RecipeError
from ingot.ranks import Ranks
from ingot.recipe import Recipe


def check(recipe: Recipe, ranks: Ranks) -> None:
    """Raise RecipeError for a combination that cannot work, with the reason and the way out."""
    strategy = recipe.parallel.strategy
    if ranks.world == 1 and strategy == "ddp":
        raise RecipeError(
            "parallel.strategy",
            "ddp",
            "there is only one rank; launch with torchrun --nproc-per-node N, or use auto",
        )
    if ranks.world > 1 and strategy == "none":
        raise RecipeError(
            "parallel.strategy",
            "none",
            f"{ranks.world} ranks would train {ranks.world} different models; use auto or ddp",
        )
