"""Whether a model may be packaged and served: the verdict, whether it still speaks of this model, and overrides.

`require_promotion` is what every way to a servable model asks first.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ingot.errors import IngotError, NotPromoted, RecipeError
from ingot.evaluation import page_input
from ingot.evaluation.page_words import escaped
from ingot.evaluation.promotion import decide
from ingot.evaluation.result import Evaluation
from ingot.evaluation.verdict import Verdict, evidence_of, load_verdict
from ingot.packaging.bundle import check_manifest, metadata_of
from ingot.runfolder import Run, open_run
from ingot.subjects import open_target

NO_POLICY, GRANTED, OVERRIDDEN = "no policy", "granted", "overridden"
OVERRIDES_FILE = "overrides.jsonl"
MOST_CHARACTERS = 500
POLICY = "The policy that the run began with"


@dataclass(frozen=True)
class Override:
    """Who let a model pass, why, when (ISO 8601), and what was missing. `model`: its fingerprint. `verdict`: the digest
    of the one that stood then.
    """

    name: str
    reason: str
    at: str
    missing: str
    model: str
    verdict: str | None = None

    @property
    def sentence(self) -> str:
        """For people."""
        return f"Overridden by {self.name} on {self.at[:10]}: {self.reason.rstrip('.')}."


@dataclass(frozen=True)
class Clearance:
    """Why a model may be packaged or served. `status`: NO_POLICY, GRANTED or OVERRIDDEN. `run`: where it is one's."""

    status: str
    sentence: str
    verdict: Verdict | None = None
    override: Override | None = None
    run: Run | None = None

    def stamp(self) -> dict[str, Any]:
        """What a package says of it, as plain values."""
        found: dict[str, Any] = {"status": self.status, "sentence": self.sentence}
        if self.verdict is not None:
            it = self.verdict
            found |= {"granted": it.granted, "alpha": it.alpha, "verdict": it.digest, "evidence": it.evidence}
            found |= {
                "model": it.model,
                "conditions": [f"{one.wanted}; {one.found}; {one.state}" for one in it.conditions],
            }
        return found if self.override is None else found | {"override": asdict(self.override)}

    def card(self) -> str:
        """A part of the model's card, in Markdown; empty without a policy."""
        if self.status == NO_POLICY:
            return ""
        lines = ["## Promotion", "", escaped(self.sentence), ""]
        lines += [f"- {escaped(text)}" for text in self.stamp().get("conditions", ())]
        return "\n".join(lines) + "\n\n"


def judge_run(run: Run, base: Mapping[str, Evaluation] | None, tuned: Mapping[str, Evaluation]) -> Verdict | None:
    """The verdict on a run's evaluations as they stand in its folder, kept there and in its record; None without a
    policy.
    """
    section = run.recipe.evaluate
    if section.promotion is None:
        return None
    evidence = evidence_of(run.evaluation, section.promotion)
    verdict = decide(section.promotion, base, tuned, samples=section.bootstrap_samples, evidence=evidence)
    verdict.save(run.evaluation)
    found = {"granted": verdict.granted, "sentence": verdict.sentence, "verdict": verdict.digest}
    # The policy stays the one that the run began with: it is not chosen after the result.
    run.note(promotion={"policy": verdict.policy} | run.record().get("promotion", {}) | found)
    return verdict


def promotion_of(run: Run) -> page_input.Promotion | None:
    """A run's verdict and its last override as a report shows them; None without a verdict."""
    verdict = load_verdict(run.evaluation) if run.recipe.evaluate.promotion else None
    if verdict is None:
        return None
    said = (verdict.model, verdict.sentence)
    made = [it.sentence for it in overrides_of(run) if (it.model, it.missing) == said]
    return verdict.for_page(made[-1] if made else "")


def require_promotion(target: Run | Path, override: str | None = None) -> Clearance:
    """Why `target` may be packaged or served: a run (its model), a package, or a folder in one of them.

    `override`: "NAME: REASON" lets it pass in spite of what is missing; it is added to the run's record, or to the
    package's `overrides.jsonl`. One that was recorded for the same model and the same finding holds on.

    Raises NotPromoted where a policy asks for more than there is, and names it; RecipeError for an override of another
    form, or one that changes nothing; PackageError for a package that is not what was written.
    """
    given = None if override is None else parse_override(override)
    place = _place(target)
    if isinstance(place, Run):
        cleared = _of_run(place, given)
    else:
        cleared = Clearance(NO_POLICY, "") if place is None else _of_package(place, given)
    by = cleared.override
    if given is not None and (by is None or (by.name, by.reason) != given):
        why = {NO_POLICY: "there is no policy", GRANTED: "the policy is met"}.get(cleared.status, cleared.sentence)
        raise RecipeError("--override", override, f"there is nothing to override ({why}); remove it")
    return cleared


def parse_override(text: str) -> tuple[str, str]:
    """(name, reason) of "NAME: REASON". Raises RecipeError for anything else."""
    name, _, reason = (part.strip() for part in text.partition(":"))
    if not any(map(str.isalpha, name)) or not any(map(str.isalpha, reason)):
        raise RecipeError("--override", text, 'write who lets it pass and why: "Jane Doe: customer demo, ticket 123"')
    if len(text) > MOST_CHARACTERS or not text.isprintable():
        raise RecipeError("--override", text[:60], f"write one line of at most {MOST_CHARACTERS} characters")
    return name, reason


def overrides_of(run: Run) -> list[Override]:
    """All that were recorded for a run, oldest first."""
    return [Override(**it) for it in run.record().get("overrides", [])]


def _place(target: Run | Path) -> Run | Path | None:
    """The run or the package that `target` is, or lies in; None for another folder."""
    if isinstance(target, Run):
        return target
    target = target.expanduser().resolve()
    for folder in (target, target.parent):
        if (folder / "run.json").is_file():
            return open_run(folder)
        if (folder / "MLmodel").is_file():
            return folder
    return None


def _of_run(run: Run, given: tuple[str, str] | None) -> Clearance:
    if run.recipe.evaluate.promotion is None and "promotion" not in run.record():
        return Clearance(NO_POLICY, "")
    model = open_target(str(run.folder)).fingerprint()
    verdict, missing = _verdict_on(run, model)
    if verdict is not None and not missing:
        return Clearance(GRANTED, verdict.sentence, verdict, run=run)
    digest = None if verdict is None else verdict.digest
    made = None if given is None else Override(*given, _now(), missing, model, digest)
    if made is not None:
        run.note(overrides=[*run.record().get("overrides", []), asdict(made)])
    same = [it for it in overrides_of(run) if (it.model, it.missing) == (model, missing)]
    if not same:
        first = f"evaluate it: ingot evaluate {run.folder}"
        if missing.startswith(POLICY):
            first = f"restore {run.folder / 'resolved.yaml'}"
        elif verdict is not None:
            first = "train a better model"
        by_name = f'ingot package {run.folder} --override "NAME: REASON"'
        fix = f"To go on, {first}; or let it pass by name, which is recorded: {by_name}"
        raise NotPromoted(f"{run.folder}: evaluate.promotion: {missing} Nothing is packaged or served. {fix}")
    return Clearance(OVERRIDDEN, f"{missing} {same[-1].sentence}", verdict, same[-1], run)


def _verdict_on(run: Run, model: str) -> tuple[Verdict | None, str]:
    """The verdict on the model of this fingerprint, and what is missing in a sentence: nothing where it is granted."""
    policy, known = run.recipe.evaluate.promotion, run.record().get("promotion", {})
    if policy is None:
        return None, f"{POLICY} was taken out of resolved.yaml."
    try:
        verdict = load_verdict(run.evaluation)
    except IngotError as error:
        return None, f"{error}."
    if verdict is None:
        return None, "There is no verdict: the run was not evaluated."
    if policy.model_dump(mode="json") != known.get("policy"):
        return None, f"{POLICY} was changed in resolved.yaml."
    if verdict.policy != known.get("policy") or verdict.digest != known.get("verdict"):
        return None, "evaluation/verdict.json is not what this run's evaluation wrote."
    evidence = evidence_of(run.evaluation, policy)
    for name in {**verdict.evidence, **evidence}:
        if verdict.evidence.get(name) != evidence.get(name):
            return None, f"evaluation/{name} is not what the verdict was drawn from."
    if verdict.model != model:
        return None, f"The model was changed after the verdict, which is on {verdict.model}: it is now {model}."
    return verdict, "" if verdict.granted else verdict.sentence


def _of_package(package: Path, given: tuple[str, str] | None) -> Clearance:
    stamp = metadata_of(package).get("promotion") or {"status": NO_POLICY}
    status, sentence = str(stamp.get("status")), str(stamp.get("sentence", ""))
    if status == NO_POLICY:
        return Clearance(NO_POLICY, "")
    check_manifest(package)
    _recorded(package)  # refuses a damaged one
    if status == OVERRIDDEN and isinstance(stamp.get("override"), dict):
        return Clearance(OVERRIDDEN, sentence, override=Override(**stamp["override"]))
    if status == GRANTED and stamp.get("granted") is True:
        return Clearance(GRANTED, sentence)
    missing = sentence or "The package does not say that the policy is met."
    recorded = record_override(package, given, missing)
    if recorded is None:
        fix = 'package a model that was promoted; or let it pass by name: --override "NAME: REASON", which is recorded'
        raise NotPromoted(f"{package}: promotion in MLmodel: {missing} It is not served. To go on, {fix}")
    return Clearance(OVERRIDDEN, f"{missing} {recorded.sentence}", override=recorded)


def record_override(package: Path, given: tuple[str, str] | None, missing: str) -> Override | None:
    """Record who lets a package pass that lacks what `missing` says; without `given`, the last one that is recorded."""
    recorded = _recorded(package)
    if given is None:
        return recorded[-1] if recorded else None
    stamp = metadata_of(package).get("promotion") or {}
    made = Override(*given, _now(), missing, str(stamp.get("model", "")), stamp.get("verdict"))
    _record(package, made)
    return made


def _recorded(package: Path) -> list[Override]:
    path = package / OVERRIDES_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    try:
        return [Override(**json.loads(line)) for line in lines]
    except (ValueError, TypeError) as error:
        raise IngotError(f"{path} is damaged ({error}); remove it and override again") from error


def _record(package: Path, override: Override) -> None:
    """Beside the package's own files: those are as their manifest says."""
    try:
        with (package / OVERRIDES_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(override), ensure_ascii=False) + "\n")
    except OSError as error:
        raise IngotError(
            f"the override cannot be recorded in {package} ({error.strerror}); copy the package"
        ) from error


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
