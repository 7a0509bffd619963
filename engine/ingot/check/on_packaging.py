"""Proofs on what comes after training: whether the model may be passed on as the recipe says, and who will load it."""

from typing import Any

from ingot.errors import IngotError, RecipeError
from ingot.packages import check_forms
from ingot.packaging.portability import DEFAULT_RANK, refusals
from ingot.provenance import terms_of

from .subject import Subject
from .trial import Trial
from .verdict import Status, Verdict


def licence_terms(subject: Subject) -> Verdict:
    """The licences of base and data allow what the recipe makes of them, and what they ask for is known."""
    name, recipe = "licence-terms", subject.recipe
    if not recipe.package.enabled:
        return Verdict(name, Status.not_applicable, "package.enabled is false")
    try:
        terms = terms_of(recipe, subject.home)
    except RecipeError as error:
        return Verdict(name, Status.failed, str(error), "see above, or package.license_waiver: 'NAME: REASON'")
    asked = f"it asks for {len(terms.obligations)} things: {', '.join(terms.obligations) or 'none'}"
    because = f"the tuned model is under {terms.licence or 'no licence that anybody stated'}; {asked}"
    facts: dict[str, Any] = terms.record()
    if terms.unknown:
        fix = "state package.license and the license of each source in data, once you know them"
        return Verdict(name, Status.warned, f"{because}; unknown: {'; '.join(terms.unknown)}", fix, facts)
    return Verdict(name, Status.passed, because, facts=facts)


def package_forms(subject: Subject) -> Verdict:
    """What makes the recipe's forms is installed."""
    name, recipe = "package-forms", subject.recipe
    if not recipe.package.enabled:
        return Verdict(name, Status.not_applicable, "package.enabled is false")
    try:
        check_forms(recipe, subject.home)
    except IngotError as error:
        return Verdict(name, Status.failed, str(error), "install it, or leave the form out of package.forms")
    return Verdict(name, Status.passed, f"can be made here: {', '.join(recipe.package.forms)}")


def portable_adapter(trial: Trial) -> Verdict:
    """Engines that serve adapters beside a base take this one."""
    name, recipe = "portable-adapter", trial.subject.recipe
    if recipe.adapter.kind == "none":
        return Verdict(name, Status.not_applicable, "every weight is trained")
    model: Any = trial.sharded.plain
    config = next(iter(model.peft_config.values())).to_dict()
    inner: Any = getattr(model, "get_base_model", lambda: model)()
    embedding = getattr(inner, "backbone", inner).get_input_embeddings()
    rows = None if embedding is None else int(embedding.weight.shape[0])
    found = refusals(config, tokens=len(trial.subject.tokenizer), rows=rows)
    facts = {"refusals": [f"{one.engines}: {one.why}" for one in found]}
    if found:
        because = "; ".join(f"{one.engines}: {one.why}" for one in found)
        return Verdict(name, Status.warned, f"{because}; merged it loads everywhere", found[0].fix, facts)
    rank = recipe.adapter.rank
    more = f"; vLLM wants --max-lora-rank {rank}" if rank > DEFAULT_RANK else ""
    return Verdict(name, Status.passed, f"vLLM, TGI and llama.cpp take rank {rank} on these layers{more}", facts=facts)
