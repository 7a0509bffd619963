"""Proofs on what is left of the training: the adapter's reach, what is saved, and what a merged model says."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ingot.assembly import build, over_full_base
from ingot.errors import IngotError
from ingot.model import adapters
from ingot.model.export import export_model, probes
from ingot.model.load import few_bits, resolve_dtype
from ingot.model.runtime import Runtime
from ingot.ranks import Ranks
from ingot.recipe_data import SEQUENCE_TO_SEQUENCE

from .trial import Trial, apart_by, divisor_of, loss_of, on_one_rank, quiet, shares, stir
from .verdict import Status, Verdict

LARGEST_EXPORT_BYTES = 4 << 30  # a larger model is compared in memory: writing it would take longer than the proofs
LISTED = 3


def saved_and_merged(trial: Trial) -> list[Verdict]:
    """Two verdicts. same-after-reload: what was trained, saved and read into a fresh model has the same loss.
    same-after-merge: so has the merged model, read by transformers alone from its own folder.
    """
    reload, merge = "same-after-reload", "same-after-merge"
    stir(trial)
    with quiet(trial.sharded.wrapped), torch.no_grad():
        before = _loss(trial, trial.sharded.plain, wrapped=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if trial.subject.recipe.adapter.kind == "none":
            reason = "full fine-tuning leaves no adapter to merge"
            verdict = _after_export(trial, trial.sharded.plain, before, folder, reload)
            return [verdict, Verdict(merge, Status.not_applicable, reason)]
        try:
            fresh, saved = _reread(trial, folder / "adapter")
        except IngotError as error:
            fix = "the adapter cannot be saved; report this model"
            failed = Verdict(reload, Status.failed, str(error), fix)
            return [failed, Verdict(merge, Status.not_applicable, "there is no saved adapter to merge")]
        after = _loss(trial, fresh)
        # The same numbers take the same way, but for a quantized base, which is read as plain weights.
        rounded = 2e-3 if trial.subject.recipe.quantization.kind == "none" else 2e-2
        how = f"{saved} tensors saved and read into a fresh model"
        verdict = _compared(trial, reload, before, after, how, rounded)
        return [verdict, _merged(trial, fresh, before, folder, merge)]


def adapter_coverage(trial: Trial) -> Verdict:
    """The adapter reaches what the recipe names."""
    name, recipe = "adapter-coverage", trial.subject.recipe
    if recipe.adapter.kind == "none":
        return Verdict(name, Status.not_applicable, "every weight is trained")
    found = adapters.coverage(trial.sharded.plain, recipe.adapter)
    because = f"{found.covered} of {found.total} matrices ({found.share:.0%} of their weights) have an adapter"
    facts: dict[str, Any] = {"share": found.share, "left_out": found.left_out, "unmatched": found.unmatched}
    if found.unmatched:
        fix = f"remove {found.unmatched[0]!r} from adapter.targets, or write a name that the model has"
        return Verdict(name, Status.failed, f"nothing is called {', '.join(found.unmatched)}; {because}", fix, facts)
    if recipe.adapter.targets == "all-linear" and found.left_out:
        because = f"{because}; left out: {', '.join(found.left_out[:LISTED])}"
        fix = "name what to adapt in adapter.targets, or use adapter.kind: none"
        return Verdict(name, Status.failed, because, fix, facts)
    return Verdict(name, Status.passed, because, facts=facts)


# --- parts -----------------------------------------------------------------------------------------------------


def _loss(trial: Trial, model: nn.Module, *, wrapped: bool = False) -> float:
    """The probe's loss, rows one below the other: an exported model knows nothing of rows end to end."""
    sharded = trial.sharded if wrapped else on_one_rank(model, trial.subject, trial.sharded.teacher)
    with quiet(sharded.plain), torch.no_grad():
        parts = shares(trial.rows, trial.subject)
        return loss_of(sharded, trial.subject, parts, divisor_of(trial.rows), flat=False).item()


def _reread(trial: Trial, folder: Path) -> tuple[nn.Module, int]:
    """A fresh model with the adapter that was saved to `folder`, and how many tensors that holds. Its base is in plain
    weights, as it is for the export.
    """
    recipe = trial.subject.alone
    model: Any = trial.sharded.plain
    adapters.save_adapter(model, folder, recipe.model.source)
    fresh = build(recipe, trial.subject.home, trial.subject.prepared.facts.labels, Ranks(), cut=False).model
    return fresh, adapters.read_adapter(fresh, folder)


def _merged(trial: Trial, model: Any, before: float, folder: Path, name: str) -> Verdict:
    """Also over a quantized base: how far off those are who merge the saved adapter into the full one."""
    recipe, device = trial.subject.alone, next(model.parameters()).device
    probed = probes(trial.rows[:4], device, decoder=recipe.objective.task in SEQUENCE_TO_SEQUENCE)
    quantized = recipe.quantization.kind != "none"
    tuned = adapters.answers(model, probed) if quantized else []
    try:
        merged, difference = adapters.merge(model, probed)
    except IngotError as error:
        fix = "use model.dtype: float32, or serve the adapter beside its base"
        return Verdict(name, Status.failed, str(error), fix)
    verdict = _after_export(trial, merged, before, folder, name)
    facts, because = {**verdict.facts, "logits": difference}, verdict.because
    if quantized and few_bits(recipe.model, trial.subject.home) is None:
        labels = trial.subject.prepared.facts.labels
        apart = over_full_base(recipe, trial.subject.home, labels, folder / "adapter", probed, tuned)
        facts["logits_full_base"] = apart
        because += f"; merged into the full base instead, logits are off by {apart:.2g} of their size"
    return Verdict(name, verdict.status, because, verdict.fix, facts)


def _after_export(trial: Trial, model: nn.Module, before: float, folder: Path, name: str) -> Verdict:
    """The loss of `model` once it is written as it will be exported and read by transformers."""
    subject = trial.subject
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if size > LARGEST_EXPORT_BYTES:
        how = f"in memory ({size / 2**30:.0f} GiB are not written for a check)"
        return _compared(trial, name, before, _loss(trial, model), how)
    dtype = resolve_dtype(subject.recipe.model.dtype, subject.device)
    facts = {"task": subject.recipe.objective.task, "labels": list(subject.prepared.facts.labels)}
    written = export_model(model, subject.tokenizer, folder / "model", dtype, facts)
    runtime = Runtime.load(written, str(subject.device))
    return _compared(trial, name, before, _loss(trial, runtime.model), "written, and read by transformers alone")


def _compared(trial: Trial, name: str, before: float, after: float, how: str, rounded: float = 2e-2) -> Verdict:
    apart = apart_by(before, after)
    facts = {"loss": before, "after": after, "relative_difference": apart}
    because = f"loss {before:.5f} before, {after:.5f} after: {how}"
    if not apart <= trial.tolerance(1e-4, rounded):
        fix = "what would be packaged is not what was trained; report this model"
        return Verdict(name, Status.failed, because, fix, facts)
    return Verdict(name, Status.passed, because, facts=facts)
