"""Knowledge distillation: a student learns a teacher's distribution at every learned token.

B rows, K positions kept, N targets, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ingot.data.loader import IGNORE, Batch
from ingot.data.plan import Divisor
from ingot.errors import ModelError, RecipeError
from ingot.model.lines import Settled, settle
from ingot.model.load import Tokenizer, load_model, load_tokenizer
from ingot.parallel.sharded import Sharded
from ingot.recipe import Model, Objective, Recipe
from ingot.train.forward import next_token_logits


def distillation(sharded: Sharded, batch: Batch, divisor: Divisor, section: Objective) -> Tensor:
    """KL(teacher || student) of both distributions softened by the temperature, times its square so that gradients keep
    their size (Hinton et al. 2015, section 2); mixed with the likelihood of the right tokens by `teacher_share`.
    Summed over targets and divided by their number.
    """
    assert sharded.teacher is not None, "callers load it with `load_teacher`"
    logits_BKV, targets_BK, _ = next_token_logits(sharded, batch)
    taught_BKV, _, _ = next_token_logits(sharded, batch, sharded.teacher)
    targets = targets_BK.flatten()
    picked_N = (targets != IGNORE).nonzero().squeeze(1)
    # Models of one family fill up their embeddings to different widths, with rows that no token has.
    width = min(logits_BKV.shape[-1], taught_BKV.shape[-1])
    places_N = picked_N.to(sharded.device)
    logits_NV = logits_BKV.flatten(0, 1).index_select(0, places_N)
    taught_NV = taught_BKV.flatten(0, 1).index_select(0, places_N)
    heat = section.temperature
    divergence = F.kl_div(
        F.log_softmax(logits_NV[:, :width] / heat, dim=-1),
        F.log_softmax(taught_NV[:, :width] / heat, dim=-1),
        reduction="sum",
        log_target=True,
    )
    loss = section.teacher_share * heat**2 * divergence
    if section.teacher_share < 1:
        right_N = targets[picked_N].to(sharded.device)
        smoothing = section.label_smoothing
        likelihood = F.cross_entropy(logits_NV, right_N, reduction="sum", label_smoothing=smoothing)
        loss = loss + (1 - section.teacher_share) * likelihood
    return loss / divisor.targets


def settled(recipe: Recipe, home: Path, device: torch.device, dtype: torch.dtype) -> Settled:
    """`lines.settle` for the model that learns, and where there is a teacher, so that both can read the batches."""
    found = settle(recipe, home, device, dtype)
    if recipe.objective.teacher is None or found.batches == "padded":
        return found
    with _named(recipe):
        taught = settle(_taught(recipe), home, device, dtype)
    if taught.batches != "padded":
        return found
    notes = [f"{note}, in the teacher" for note in taught.notes]
    padded = settle(_with_batches(recipe, "padded"), home, device, dtype)
    return Settled(padded.batches, padded.attention, [*padded.notes, *notes])


def check_teacher(recipe: Recipe, home: Path, tokenizer: Tokenizer) -> None:
    """Raise RecipeError for a teacher whose tokens are not the student's, ModelError for one that is not there."""
    teacher = recipe.objective.teacher
    if teacher is None:
        return
    with _named(recipe):
        other = load_tokenizer(_taught(recipe).model, home).get_vocab()
    own = tokenizer.get_vocab()
    if own != other:
        apart = sorted({*own.items()} ^ {*other.items()}, key=lambda item: (item[1], item[0]))
        fix = (
            f"its tokens are not those of {recipe.model.source}: {len(other):,} and {len(own):,}, of which "
            f"{len(apart):,} differ, {apart[0][0]!r} first; use a teacher of the same family"
        )
        raise RecipeError("objective.teacher", teacher, fix)


def load_teacher(recipe: Recipe, home: Path, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
    """The frozen teacher of a resolved recipe, whole on this rank, its weights in `dtype`; None without one.

    Raises ModelError when it is not there, RecipeError when it cannot read `data.batches`.
    """
    if recipe.objective.teacher is None:
        return None
    taught = _taught(recipe)
    attention = settle(taught, home, device, dtype).attention
    model = load_model(
        taught.model.model_copy(update={"attention": attention}), home, recipe.objective.task, dtype=dtype
    )
    return model.eval().requires_grad_(False).to(device)


@contextmanager
def _named(recipe: Recipe) -> Iterator[None]:
    """Says objective.teacher where a reader of models would blame model.source."""
    try:
        yield
    except ModelError as error:
        if error.field != "model.source":
            raise
        raise ModelError("objective.teacher", recipe.objective.teacher, error.fix, where=error.where) from error


def _taught(recipe: Recipe) -> Recipe:
    """The recipe with the teacher as its model."""
    model = Model(
        source=recipe.objective.teacher or "",
        dtype=recipe.model.dtype,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    return recipe.model_copy(update={"model": model})


def _with_batches(recipe: Recipe, batches: str) -> Recipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"batches": batches})})
