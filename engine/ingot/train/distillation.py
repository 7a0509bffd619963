"""Knowledge distillation: a student learns a teacher's distribution at every learned token.

B rows, T tokens, N = B*T positions, M of them with a target, H hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ingot.data.loader import Batch
from ingot.data.plan import Divisor
from ingot.errors import ModelError, RecipeError
from ingot.model.head import attach, fused_head
from ingot.model.lines import Settled, settle
from ingot.model.load import Tokenizer, load_model, load_tokenizer
from ingot.parallel.sharded import Sharded
from ingot.recipe import Model, Objective, Recipe
from ingot.train.forward import Inputs, answered, hidden_of, logits_at, moved, next_tokens, rows_of
from ingot_kernels.linear_cross_entropy import Head, linear_cross_entropy
from ingot_kernels.linear_kl import linear_kl


def distillation(sharded: Sharded, batch: Batch, divisor: Divisor, section: Objective) -> Tensor:
    """KL(teacher || student) of both distributions softened by the temperature, times its square so that gradients keep
    their size (Hinton et al. 2015, section 2); mixed with the likelihood of the right tokens by `teacher_share`.
    Summed over targets and divided by their number.
    """
    assert sharded.teacher is not None, "callers load it with `load_teacher`"
    inputs, targets_BT = next_tokens(sharded, batch)
    fused, taught = fused_head(sharded.plain), fused_head(sharded.teacher)
    if fused is None or taught is None or fused.group is not None:  # no divergence of a part of the vocabulary
        return _from_logits(sharded, inputs, targets_BT, section) / divisor.targets
    taught_NH, teacher = hidden_of(sharded, taught, sharded.teacher, inputs)
    targets_N = moved(targets_BT.flatten(), sharded.device)
    rows_M, impl = moved(rows_of(targets_BT), sharded.device), fused.impl

    def compute(hidden_NH: Tensor, head: Head) -> Tensor:
        divergence = linear_kl(hidden_NH, head, taught_NH, teacher, rows_M, temperature=section.temperature, impl=impl)
        if section.teacher_share == 1:
            return divergence
        smoothing = section.label_smoothing
        likelihood = linear_cross_entropy(
            hidden_NH, head, targets_N, rows_M=rows_M, label_smoothing=smoothing, impl=impl
        )
        return section.teacher_share * divergence + (1 - section.teacher_share) * likelihood

    return answered(sharded, fused, inputs, compute) / divisor.targets


def _from_logits(sharded: Sharded, inputs: Inputs, targets_BT: Tensor, section: Objective) -> Tensor:
    """The same of whole logits of both, summed."""
    taught_MV = logits_at(sharded, inputs, targets_BT, sharded.teacher)
    logits_MV = logits_at(sharded, inputs, targets_BT)
    # Models of one family fill up their embeddings to different widths, with rows that no token has.
    width, heat = min(logits_MV.shape[-1], taught_MV.shape[-1]), section.temperature
    divergence = F.kl_div(
        F.log_softmax(logits_MV[:, :width] / heat, dim=-1),
        F.log_softmax(taught_MV[:, :width] / heat, dim=-1),
        reduction="sum",
        log_target=True,
    )
    loss = section.teacher_share * heat**2 * divergence
    if section.teacher_share < 1:
        right_M = moved(targets_BT.flatten()[rows_of(targets_BT)], sharded.device)
        smoothing = section.label_smoothing
        likelihood = F.cross_entropy(logits_MV, right_M, reduction="sum", label_smoothing=smoothing)
        loss = loss + (1 - section.teacher_share) * likelihood
    return loss


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
    ops = recipe.kernels.ops
    if ops == "auto" or "linear_cross_entropy" in ops:
        attach(model, recipe.kernels.impl)
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
