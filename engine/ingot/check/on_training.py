"""Proofs on the model while it learns: what moves, that the loss is the one meant, and what it depends on."""

# R rows of the probe, D hidden

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ingot.data.encoded import Encoded
from ingot.data.loader import muted
from ingot.model.adapters import trainable_tensors
from ingot.parallel.sharded import Sharded
from ingot.recipe import Recipe
from ingot.recipe_data import SEQUENCE_TO_SEQUENCE

from .expected import expected_loss
from .trial import Trial, apart_by, distance, divisor_of, fingerprints, gradients, loss_of, quiet, shares
from .verdict import Status, Verdict

STEPS = 2  # the first moves one of A and B only, since the other one starts at zero
LISTED = 3


def everything_moves(trial: Trial) -> Verdict:
    """Every trainable tensor changes in STEPS optimizer steps, and no frozen one changes in a bit."""
    name, sharded, recipe = "everything-moves", trial.sharded, trial.subject.recipe
    before = {key: p.detach().clone() for key, p in trainable_tensors(sharded.plain)}
    frozen = fingerprints(sharded.plain)
    parts, divisor = shares(trial.rows, trial.subject, 1, recipe.train.tokens_per_microbatch), divisor_of(trial.rows)
    sharded.wrapped.train()
    norms, losses, reached = [], [], set[str]()
    for _ in range(STEPS):
        losses.append(loss_of(sharded, trial.subject, parts, divisor).item())
        reached |= {key for key, p in trainable_tensors(sharded.plain) if p.grad is not None and bool(p.grad.any())}
        norms.append(sharded.step(recipe.optim.lr, recipe.optim.clip_grad_norm))
    after = dict(trainable_tensors(sharded.plain))
    # Weight decay moves what no gradient reaches.
    still = [key for key, value in before.items() if key not in reached or torch.equal(value, after[key].detach())]
    moved = [key for key, value in fingerprints(sharded.plain).items() if value != frozen.get(key)]
    facts = {"trainable": len(before), "frozen": len(frozen), "still": still, "moved": moved, "losses": losses}
    if not all(torch.isfinite(torch.tensor([*norms, *losses]))):
        fix = "lower optim.lr, or use model.dtype: float32"
        return Verdict(name, Status.failed, f"loss or gradient are not finite: {losses}, {norms}", fix, facts)
    if still:
        because = f"{len(still)} of {len(before)} trainable tensors did not learn in {STEPS} steps: {_listed(still)}"
        return Verdict(name, Status.failed, because, _fix_still(trial, reached.issuperset(still)), facts)
    if moved:
        because = f"{len(moved)} frozen tensors changed: {_listed(moved)}"
        return Verdict(name, Status.failed, because, "report this model: something writes to its weights", facts)
    because = f"{len(before)} trainable tensors changed in {STEPS} steps, {len(frozen)} frozen ones kept every bit"
    return Verdict(name, Status.passed, because, facts=facts)


def right_loss(trial: Trial) -> Verdict:
    """The loss is that of the definition: computed row by row from the model's plain outputs, or by transformers."""
    name, sharded = "right-loss", trial.sharded
    with quiet(sharded.wrapped), torch.no_grad():
        found = expected_loss(trial)
        if isinstance(found, str):
            return Verdict(name, Status.not_applicable, found)
        ours = loss_of(sharded, trial.subject, shares(trial.rows, trial.subject), divisor_of(trial.rows))
    apart = apart_by(found.value, ours.item())
    facts = {"loss": ours.item(), "expected": found.value, "relative_difference": apart, "definition": found.by}
    limit = trial.tolerance(1e-4, 2e-2)
    because = f"{ours.item():.5f}, and {found.value:.5f} by {found.by} ({len(trial.rows)} rows)"
    if not apart <= limit:
        fix = "the labels do not stand where the model's outputs are; look at the rows (ingot inspect) and report this"
        return Verdict(name, Status.failed, f"the loss is {because}", fix, facts)
    return Verdict(name, Status.passed, f"the loss is {because}", facts=facts)


def isolated_rows(trial: Trial) -> Verdict:
    """A row's loss is the same alone and among others, and no gradient passes from it to another row or to padding.

    The shortest, the longest and a middle row of the probe.
    """
    name, sharded, subject = "isolated-rows", trial.sharded, trial.subject
    rows = list({id(row): row for row in (trial.rows[0], trial.rows[len(trial.rows) // 2], trial.rows[-1])}.values())
    if len(rows) < 2:
        return Verdict(name, Status.not_applicable, "there is only one row")
    leaks, worst = [], 0.0
    with quiet(sharded.wrapped):
        for number, row in enumerate(rows):
            others = [row if other is row else muted(other) for other in rows]
            divisor = divisor_of([row])
            with _embedded(sharded) as seen:
                together = loss_of(sharded, subject, [others], divisor).item()
            own, foreign = _shares_of_gradient(seen[0], number, rows, subject.recipe)
            sharded.drop()
            with torch.no_grad():
                alone = loss_of(sharded, subject, [[row]], divisor).item()
            worst = max(worst, apart_by(alone, together))
            if foreign > 0 or not own > 0:
                leaks.append(number)
    how = "end to end" if subject.recipe.data.batches != "padded" else "one below the other"
    facts = {"rows": len(rows), "leaks": leaks, "relative_difference": worst, "batches": subject.recipe.data.batches}
    if leaks:
        because = f"the loss of row {leaks[0]} of {len(rows)} depends on tokens that are not its own (rows {how})"
        fix = "use data.batches: padded, or another model.attention"
        return Verdict(name, Status.failed, because, fix, facts)
    if not worst <= trial.tolerance(1e-4, 5e-2):
        because = f"a row's loss changes by {worst:.2g} of itself when others are in the batch (rows {how})"
        return Verdict(name, Status.failed, because, "use data.batches: padded, or another model.attention", facts)
    because = (
        f"rows {how}: no gradient reaches another row, and losses alone and together differ by at most {worst:.1g}"
    )
    return Verdict(name, Status.passed, because, facts=facts)


def invariant_loss(trial: Trial) -> Verdict:
    """Loss and gradient do not depend on how a step is cut into microbatches and given to ranks."""
    name, sharded, subject, rows = "invariant-loss", trial.sharded, trial.subject, trial.rows
    ways = {
        "a row a microbatch": (1, 1),
        "two ranks": (2, None),
        f"{len(rows) + 1} ranks, one without a row": (len(rows) + 1, None),
    }
    divisor, apart = divisor_of(rows), {}
    with quiet(sharded.wrapped):
        whole = loss_of(sharded, subject, shares(rows, subject), divisor).item()
        reference = gradients(sharded)
        for way, (world, budget) in ways.items():
            loss = loss_of(sharded, subject, shares(rows, subject, world, budget), divisor).item()
            apart[way] = apart_by(whole, loss), distance(reference, gradients(sharded))
    worst = max(apart, key=lambda way: max(apart[way]))
    facts = {way: {"loss": loss, "gradient": gradient} for way, (loss, gradient) in apart.items()}
    loss, gradient = apart[worst]
    if not (loss <= trial.tolerance(1e-4, 5e-2) and gradient <= trial.tolerance(1e-3, 1e-1)):
        because = f"{worst}: the loss differs by {loss:.2g} of itself and the gradient by {gradient:.2g}"
        fix = (
            "the loss is not one sum divided once: batch size and number of ranks would change the result; report this"
        )
        return Verdict(name, Status.failed, because, fix, facts)
    losses, gradient_sizes = zip(*apart.values(), strict=True)
    because = f"{len(rows)} rows cut in {len(ways) + 1} ways: losses differ by at most {max(losses):.1g} and gradients "
    because += f"by {max(gradient_sizes):.1g}"
    return Verdict(name, Status.passed, because, facts=facts)


# --- parts -----------------------------------------------------------------------------------------------------


def _fix_still(trial: Trial, reached: bool) -> str:
    recipe = trial.subject.recipe
    if reached:
        return f"raise optim.lr = {recipe.optim.lr:g}: so small a step is lost to rounding"
    if recipe.adapter.kind == "none":
        return "set adapter.kind: lora, or waive it (check.waive): the loss does not depend on these weights"
    return "leave them out of adapter.targets: the loss does not depend on them"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


@contextmanager
def _embedded(sharded: Sharded) -> Iterator[list[Tensor]]:
    """What the token embeddings return, with its gradient kept. The first embedding is the one of the input."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        # A frozen embedding gives no gradient of its own: a copy that wants one stands in for it.
        kept = output if output.requires_grad else output.detach().requires_grad_(True)
        kept.retain_grad()
        seen.append(kept)
        return kept

    inner: Any = getattr(sharded.plain, "get_base_model", lambda: sharded.plain)()  # type: ignore[operator]
    owner = getattr(inner, "backbone", inner)
    if owner.config.is_encoder_decoder:  # T5's own input embedding is never called, but the encoder's, which is tied
        owner = owner.get_encoder()
    handle = owner.get_input_embeddings().register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def _shares_of_gradient(embedded: Tensor, number: int, rows: list[Encoded], recipe: Recipe) -> tuple[float, float]:
    """Size of the gradient at the tokens of row `number`, and at all others: those of other rows, and padding."""
    assert embedded.grad is not None
    size_T = embedded.grad.detach().float().abs().sum(-1)
    own = torch.zeros_like(size_T, dtype=torch.bool)
    if recipe.data.batches != "padded":
        lengths = [len(row.ids) for row in rows]
        start = sum(lengths[:number])
        own[0, start : start + lengths[number]] = True
    else:
        row, sides = rows[number], len(size_T) // len(rows)
        is_read_first = recipe.objective.task in SEQUENCE_TO_SEQUENCE
        lengths = list(row.parts) if sides > 1 else [row.parts[0] if is_read_first else len(row.ids)]
        for side, length in enumerate(lengths):
            own[number * sides + side, :length] = True
    return float(size_T[own].sum()), float(size_T[~own].sum())
