"""The gate as the first stage of a run: what failed stops it, and the report stays in its folder."""

import gc
from pathlib import Path

import torch

from ingot.errors import CheckFailed
from ingot.preparation import Prepared
from ingot.progress import Progress
from ingot.recipe import Recipe
from ingot.runfolder import Run, create_run
from ingot.track import Tracker

from .gate import prove
from .report import save
from .verdict import Report, Status


def proved(recipe: Recipe, home: Path, prepared: Prepared, device: torch.device, progress: Progress) -> Report:
    """The report, when nothing in it stops a run. Raises CheckFailed, after saving it in a run's folder of its own."""
    report = prove(recipe, home, prepared, device, progress)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if not report.passed:
        run = create_run(recipe, home)
        save(report, run.folder)
        listed = "".join(f"\n  {it.name}: {it.because}\n    fix: {it.fix}" for it in report.failures)
        proofs = "1 proof" if len(report.failures) == 1 else f"{len(report.failures)} proofs"
        text = f"{proofs} failed, and nothing was trained:{listed}"
        run.note(status="refused", error=text)
        raise CheckFailed(f"{text}\nreport: {run.folder / 'check.html'}; to train in spite of it: check.waive")
    for verdict in report.verdicts:
        if verdict.status is Status.waived:
            progress.note(f"check: {verdict.name} failed and is waived: {verdict.because}")
        if verdict.status is Status.warned:
            progress.note(f"check: {verdict.name}: {verdict.because}; {verdict.fix}")
    for sentence in report.sampled:
        progress.note(f"check: {sentence}")
    done = sum(verdict.status is Status.passed for verdict in report.verdicts)
    progress.note(f"check: {done} of {len(report.verdicts)} proofs passed, the others do not apply, warn or are waived")
    return report


def keep_proofs(report: Report, run: Run, tracker: Tracker) -> None:
    """Save the report in the run's folder and log it."""
    save(report, run.folder)
    run.note_stage("check", report.seconds, **{verdict.name: str(verdict.status) for verdict in report.verdicts})
    for name in ("check.json", "check.html"):
        tracker.artifact(run.folder / name)
