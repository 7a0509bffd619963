"""A finished run -> its packages: where the model comes from, under which terms, and its forms, each written and
proved in a clean process.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast, get_args

from ingot.errors import MissingPackage, PackageError, RecipeError
from ingot.model import adapted
from ingot.model.adapters import carry
from ingot.model.few_bits import write_few_bits
from ingot.model.load import few_bits
from ingot.model.probing import probe
from ingot.model.runtime import Runtime, missing_over_base
from ingot.packaging import gguf, licences
from ingot.packaging.bundle import RUNTIME_FILE, Origin, add_file, building, package_model, write_origin
from ingot.packaging.card import write_card
from ingot.packaging.environment import verified_with
from ingot.packaging.lineage import lineage_id, public_name
from ingot.packaging.verify import Near, Verification, verify_package
from ingot.progress import Progress
from ingot.provenance import base_folder, evaluation_of, lineage_of, plain_name, terms_of
from ingot.recipe import Form, Recipe, unfit_form
from ingot.recipe_io import recipe_hash
from ingot.registry import nearest
from ingot.runfolder import Run, versions, write_json
from ingot.stages import requests_of

# How far logits of a form may be apart from the merged model's, as a share of the largest. On the embedded model NF4
# measured 0.15 and int8 0.03; adapters: what merging itself may change (model/adapters.py).
TOLERANCES = {"nf4": 0.5, "int8": 0.1, "fp8": 0.2, "float32": 1e-3, "bfloat16": 5e-2}
REFUSED = "gguf_refused"  # in run.json: why llama.cpp's converter made no file of this model; it will not another time
REQUIRES = {"adapter": ("peft",), "quantized": ("bitsandbytes", "accelerate")}


@dataclass(frozen=True)
class Parts:
    """What all forms of a run have in common."""

    name: str
    example: dict[str, Any]
    metadata: dict[str, Any]
    origin: Origin
    notes: str


def write_package(
    run: Run, promotion: dict[str, Any], notes: str, progress: Progress, forms: Sequence[str] | None = None
) -> Path:
    """The run's packages in the forms that its recipe (or `forms`) names, with what their metadata say of its promotion
    and their cards' `notes`, each verified if the recipe says so; return the first one's folder.

    Raises RecipeError where licences do not allow it, before anything is written; PackageError, MissingPackage.
    """
    recipe, started = run.recipe, time.perf_counter()
    if unknown := set(forms or ()) - set(get_args(Form)):
        raise RecipeError("--form", min(unknown), nearest(min(unknown), get_args(Form)))
    wanted: Sequence[Form] = cast(Sequence[Form], forms) if forms else recipe.package.forms
    section = recipe.package.model_copy(update={"forms": list(wanted)})
    check_forms(recipe.model_copy(update={"package": section}), run.home)
    if "adapter" in wanted:
        _check_adapter(run)
    parts = _parts(run, promotion, notes)
    verify = recipe.package.verify
    common = {"lineage": parts.metadata["lineage"], "promotion": promotion["status"]}
    with progress.stage("package", total=len(wanted) * (1 + verify), unit="steps") as bar:
        proof = _Proof(run, progress.note, parts.example) if verify else None
        # What another program may refuse comes last: the other forms are whole by then.
        for form in sorted(wanted, key=lambda form: form == "gguf"):
            out = _write(run, form, parts)
            bar.advance(1)
            found = packaged_forms(run)
            if found.pop(form, None) is not None:  # another package lies there now, which is not proved yet
                _note(run, found, common)
            facts: dict[str, Any] = {"folder": out.name, "verified": verify}
            if proof is not None:
                done = proof.of(form, out)
                facts |= {"difference": done.difference, "tolerance": done.tolerance}
                bar.advance(1)
            ended = time.perf_counter()
            _note(run, found | {form: facts | {"seconds": round(ended - started, 3)}}, common)
            started = ended
    return run.form(wanted[0])


def packaged_forms(run: Run) -> dict[str, dict[str, Any]]:
    """Form -> what the run's record says of it, of those that were written (and proved, if the recipe says so)."""
    found = run.record()["stages"].get("package", {}).get("forms", {})
    return {form: facts for form, facts in found.items() if run.form(form).is_dir()}


def missing_forms(run: Run) -> list[Form]:
    """The forms of the run's recipe that are yet to be packaged, but for one that another program refused to make."""
    done = packaged_forms(run).keys() | ({"gguf"} if run.record().get(REFUSED) else set())
    return [form for form in run.recipe.package.forms if form not in done]


def refused_form(run: Run) -> PackageError | None:
    """What to say of a form of the run's recipe that another program refused to make, and that is not tried again."""
    refused = run.record().get(REFUSED) if run.recipe.package.enabled and "gguf" in run.recipe.package.forms else None
    again = f"not tried again, but by: ingot package {run.folder} --form gguf"
    return PackageError(f"{refused} ({again})") if refused else None


def _note(run: Run, found: dict[str, dict[str, Any]], common: dict[str, Any]) -> None:
    seconds = sum(facts.get("seconds", 0.0) for facts in found.values())
    verified = bool(found) and all(facts.get("verified", False) for facts in found.values())
    run.note_stage("package", seconds, **common, verified=verified, forms=found)


def check_forms(recipe: Recipe, home: Path) -> None:
    """Raise what making the recipe's forms would raise for want of a program or package, or for a base in few bits. Of
    the model only its configuration is read.
    """
    if wrong := unfit_form(recipe):
        raise RecipeError("package.forms", recipe.package.forms, wrong.partition(": ")[2] or wrong)
    for form in recipe.package.forms:
        for package in REQUIRES.get(form, ()):
            if find_spec(package) is None:
                raise MissingPackage(package, f"package.forms: {form}")
    if "adapter" in recipe.package.forms and recipe.quantization.kind == "nf4" and few_bits(recipe.model, home):
        # What loads the package merges it, and there that rounds the sum into four bits again.
        why = f"{recipe.model.source} holds weights in few bits, and what was learned is lost in them; use merged"
        raise RecipeError("package.forms", "adapter", why)
    if "gguf" in recipe.package.forms:
        gguf.find_converter()


def _parts(run: Run, promotion: dict[str, Any], notes: str) -> Parts:
    recipe, record = run.recipe, run.record()
    terms, lineage = terms_of(recipe, run.home), lineage_of(run)
    example = json.loads((run.model / RUNTIME_FILE).read_text(encoding="utf-8"))["example"]
    card = licences.front_matter(base) if (base := base_folder(recipe, run.home)) is not None else {}
    metadata: dict[str, Any] = {
        "recipe": recipe.name,
        "recipe_hash": recipe_hash(recipe),
        "base_model": public_name(recipe.model.source),
        "ingot": versions()["ingot"],
        "promotion": promotion,
        "lineage": lineage_id(lineage),
        # What Azure ML's tools look for.
        "base_model_name": plain_name(recipe.model.source),
        "is_finetuned_model": True,
        "finetuning_task": recipe.objective.task,
        "is_acft_model": False,
    }
    if card.get("pipeline_tag"):
        metadata["base_model_task"] = str(card["pipeline_tag"])
    locked = {name: text for name, text in record["versions"].items() if text[:1].isdigit() and name != "ingot"}
    locked["python"] = record["python"]
    origin = Origin(lineage=lineage, evaluation=evaluation_of(run), terms=terms, locked=locked)
    return Parts(recipe.package.name or recipe.name, example, metadata, origin, notes)


def _write(run: Run, form: Form, parts: Parts) -> Path:
    recipe = run.recipe
    origin = replace(parts.origin, form=form, requires=REQUIRES.get(form, ()))
    if form == "gguf":
        return _write_gguf(run, parts, origin)
    with tempfile.TemporaryDirectory(prefix=".form-", dir=run.folder) as place:
        folder = run.model
        if form == "adapter":
            folder = _adapter_folder(run, Path(place) / "model")
        elif form == "quantized":
            folder = write_few_bits(run.model, Path(place) / "model", recipe.package.quantization)
        return package_model(
            folder,
            run.form(form),
            name=parts.name,
            task=recipe.objective.task,
            example_input=parts.example,
            metadata=parts.metadata | ({"quantization": recipe.package.quantization} if form == "quantized" else {}),
            license=recipe.package.license,
            notes=parts.notes,
            origin=origin,
        )


def _check_adapter(run: Run) -> None:
    """Raise what making the adapter's folder would raise, before any form is written."""
    if base_folder(run.recipe, run.home) is None:
        return  # the other forms need no base
    with tempfile.TemporaryDirectory(prefix=".form-", dir=run.folder) as place:
        _adapter_folder(run, Path(place) / "model")


def _adapter_folder(run: Run, folder: Path) -> Path:
    """The adapter with everything but its base's weights that its packaged model needs, and that base by name and hash.

    Raises RecipeError where the trained model has weights that neither the base nor the adapter can hold.
    """
    base = lineage_of(run)["base"]
    if "weights" not in base:
        raise PackageError(f"the base {base['source']} is not on this machine, so its hash is not known; bring it here")
    folder.mkdir()
    for path in run.model.iterdir():
        weights = path.name.startswith("model") and path.name.endswith((".safetensors", ".safetensors.index.json"))
        if path.is_file() and path.name != "config.json" and not weights:
            shutil.copyfile(path, folder / path.name)
    for path in run.adapter.iterdir():
        shutil.copyfile(path, folder / path.name)
    named = {key: base[key] for key in ("source", "revision", "files", "weights")}
    named["head"] = adapted.head_settings(json.loads((run.model / "config.json").read_text(encoding="utf-8")))
    write_json(folder / adapted.BASE_FILE, named)
    config = json.loads((folder / adapted.ADAPTER_FILE).read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": plain_name(run.recipe.model.source), "revision": base["revision"]}
    write_json(folder / adapted.ADAPTER_FILE, config)
    _carry(run, folder)
    return folder


def _carry(run: Run, folder: Path) -> None:
    place = base_folder(run.recipe, run.home)
    if place is None or few_bits(run.recipe.model, run.home) is not None:
        return  # a base in few bits trains no head
    missing = missing_over_base(folder, place)
    if lost := carry(folder, missing, lambda: Runtime.load(run.model, "cpu").model):
        names = ", ".join(lost[:3])
        why = f"the base lacks {names}, and the adapter holds no more than an update of it; use merged"
        raise RecipeError("package.forms", "adapter", why)


def _write_gguf(run: Run, parts: Parts, origin: Origin) -> Path:
    task, out = run.recipe.objective.task, run.form("gguf")
    with building(out) as folder:
        base = base_folder(run.recipe, run.home)
        run.note(**{REFUSED: None})
        try:
            gguf.convert(run.model, folder / "model", run.recipe.package.gguf_type, base)
        except PackageError as error:
            run.note(**{REFUSED: str(error)})
            raise
        known = parts.metadata | {"quantization": run.recipe.package.gguf_type}
        known |= write_origin(folder, origin, parts.name)
        card = write_card(
            parts.name, task, origin.form, parts.example, known, origin.terms, origin.evaluation, parts.notes
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_json(folder / "metadata.json", known | {"name": parts.name, "task": task, "form": "gguf"})
    return out


class _Proof:
    """What the forms of a run are held against: the merged model's answers and logits in this process, each made when
    the first form asks for it.
    """

    def __init__(self, run: Run, note: Callable[[str], None], example: dict[str, Any]) -> None:
        self.run, self.note, self.example = run, note, example

    @cached_property
    def asked(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Rows, and what the run's model answers."""
        rows = requests_of(self.run)
        return rows, Runtime.load(self.run.model).answer(rows)

    @cached_property
    def logits(self) -> list[list[float]]:
        """Of those rows."""
        return probe(Runtime.load(self.run.model), self.asked[0])

    def of(self, form: Form, out: Path) -> Verification:
        """Load `out` in a clean process and compare; what came of it is added to the package."""
        if form == "gguf":
            tensors = gguf.check_gguf(out / "model" / gguf.MODEL_FILE)
            add_file(out, "verification.json", {"tensors": tensors, "compared": "the file's header only"})
            return Verification(0, [], 0, 0.0)
        env = {adapted.BASE_VARIABLE: str(base_folder(self.run.recipe, self.run.home))} if form == "adapter" else {}
        done = verify_package(out, *self.asked, example=self.example, near=self._near(form), env=env)
        record = {key: it for key, it in done.as_dict().items() if key in ("examples", "difference", "tolerance")}
        compared = "answers, equal" if done.difference is None else "logits, as a share of the largest"
        # What `ingot conform` holds every later load against: the run's own model, or the form that rounds otherwise.
        answer = Runtime.load(self.run.model).answer([self.example])[0] if form == "merged" else done.answer
        found = verified_with(out)
        add_file(out, "verification.json", {"compared": compared, **record, "answer": answer, **found})
        for name, pinned in found["pinned_otherwise"].items():
            here = found["versions"][name] or "none"
            self.note(f"package: {out.name} pins {name} {pinned}, which trained it, and was verified with {here}")
        return done

    def _near(self, form: Form) -> Near | None:
        recipe = self.run.recipe
        if form == "merged":
            return None
        kind = recipe.quantization.kind if recipe.quantization.kind != "none" else recipe.model.dtype
        return Near(self.logits, TOLERANCES[recipe.package.quantization if form == "quantized" else kind])
