"""Writes the MLflow model folder from a finished model folder, file by file: no model is loaded, nothing is pickled.

MLmodel  conda.yaml  python_env.yaml  requirements.txt  input_example.json  serving_input_example.json  README.md
manifest.json           SHA-256 of every other file
model/                  a complete Hugging Face folder: other servers can be pointed inside the package
code/ingot_runtime_H/   the runtime; H is a hash of it, so that two packages in one process keep their own
azure/                  scoring file and batch driver for Azure ML
components/tokenizer/   where there is a `transformers` flavour: what mlflow loads beside model/
lineage.json  evaluation.json  LICENSE  NOTICE  licences/   where an Origin gives them
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ingot.errors import MissingPackage, PackageError
from ingot.model.adapted import sha256
from ingot.model.folder import RUNTIME_FILE
from ingot.model.modes import make_readable
from ingot.packaging import shards
from ingot.packaging.card import write_card
from ingot.packaging.environment import REQUIREMENTS as REQUIREMENTS
from ingot.packaging.environment import write_environment
from ingot.packaging.licences import Terms
from ingot.packaging.lineage import lineage_id
from ingot.packaging.notices import write_notices
from ingot.packaging.pipelines import add_transformers
from ingot.packaging.signature import check_model_folder, example_row, signature_of

MANIFEST_FILE = "manifest.json"
HERE = Path(__file__).parent
RUNTIME = (
    *("adapted", "answers", "embedding", "folder", "generate", "generate_cache", "inputs", "kinds", "pointing"),
    *("pooling", "probing", "running", "runtime", "sampling", "targets", "task_checks", "task_schemas"),
)
RUNTIME_SOURCES = (*(HERE.parent / "model" / f"{name}.py" for name in RUNTIME), HERE / "pyfunc_model.py")
AZURE_FILES = ("score.py", "batch_driver.py")


@dataclass(frozen=True)
class Origin:
    """Where a model comes from, for a package that accounts for it. `form`: merged, adapter or quantized.

    `lineage`: as lineage.json holds it; its identity goes into the metadata. `evaluation`: as evaluation.json does.
    `locked`: package (and `python`) -> the version that trained it, in place of those installed here. `requires`: more
    packages that the form needs.
    """

    form: str = "merged"
    lineage: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None
    terms: Terms | None = None
    locked: Mapping[str, str] = field(default_factory=dict)
    requires: Sequence[str] = ()


def package_model(
    model_folder: Path,
    out: Path,
    *,
    name: str,
    task: str,
    example_input: dict[str, Any],
    metadata: dict[str, Any],
    license: str | None,
    notes: str = "",
    origin: Origin | None = None,
    shard_bytes: int = shards.SHARD_BYTES,
) -> Path:
    """Write the package of `model_folder` to `out` and return `out`; an earlier package there is replaced in one step.

    `example_input`: a row of the task. `notes`: a further part of the card, in Markdown. Files are hard links where the
    file system allows it; weights of more than `shard_bytes` are cut. No tensor is loaded. Raises `PackageError`.
    """
    origin = origin or Origin()
    adapter = origin.form == "adapter"
    about = _facts(model_folder) if adapter else check_model_folder(model_folder, task)
    example = example_row(task, example_input)
    with building(out) as folder:
        _link_tree(model_folder, folder / "model", shard_bytes)
        (folder / "model" / RUNTIME_FILE).write_text(
            _json(about | {"task": task, "example": example}), encoding="utf-8"
        )
        known = metadata | {"name": name, "task": task, "license": license, "form": origin.form}
        known |= write_origin(folder, origin, name)
        _write_azure(folder / "azure")
        loader = _write_code(folder / "code")
        write_environment(folder, origin.locked, origin.requires)
        _write_mlmodel(folder, loader, task, example, known)
        card = write_card(name, task, origin.form, example, known, origin.terms, origin.evaluation, notes)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return out


@contextlib.contextmanager
def building(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, which takes its place in one step, with a manifest, when the block ends well.

    Raises PackageError where `out` is something else than a package.
    """
    if out.exists() and not (out / MANIFEST_FILE).is_file():
        raise PackageError(f"{out} exists and is not a package; it is left alone: move it away or choose another name")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-building-", dir=out.parent))
    try:
        folder.chmod(0o755)
        yield folder
        make_readable(folder)  # a container reads a package as another user than wrote it
        _write_manifest(folder)
        _swap(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def add_file(package: Path, name: str, content: Any) -> None:
    """Add a JSON file to a finished package, and to its manifest."""
    path, listed = package / name, json.loads((package / MANIFEST_FILE).read_text(encoding="utf-8"))
    path.write_text(_json(content), encoding="utf-8")
    listed["sha256"] = dict(sorted({**listed["sha256"], name: sha256(path)}.items()))
    partial = package / f".{MANIFEST_FILE}.partial"
    partial.write_text(_json(listed), encoding="utf-8")
    os.replace(partial, package / MANIFEST_FILE)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _link_tree(source: Path, target: Path, shard_bytes: int) -> None:
    """Weights by `shards`, every other file as it is."""
    weights: list[str] = []
    if (source / shards.INDEX_FILE).is_file() or (source / shards.SINGLE_FILE).is_file():
        shards.place(source, target, shard_bytes)
        weights = [shards.INDEX_FILE, *(path.name for path in shards.shards_of(source))]
    for path in sorted(source.rglob("*")):
        inside = path.relative_to(source)
        if path.is_file() and inside.as_posix() not in (RUNTIME_FILE, *weights):
            shards.link(path, target / inside)


def _facts(folder: Path) -> dict[str, Any]:
    """What `ingot.json` says, of a folder that holds an adapter alone."""
    for needed in ("adapter_config.json", "adapter_model.safetensors", "base.json", "tokenizer.json"):
        if not (folder / needed).is_file():
            raise PackageError(f"{folder} holds no {needed}: the adapter would not load; train it again")
    found: dict[str, Any] = json.loads((folder / RUNTIME_FILE).read_text(encoding="utf-8"))
    return found


def _write_azure(folder: Path) -> None:
    folder.mkdir()
    for script in AZURE_FILES:
        shutil.copyfile(HERE / "azure" / script, folder / script)


def write_origin(folder: Path, origin: Origin, name: str) -> dict[str, Any]:
    """Write the files that account for the model; return what metadata say of them."""
    said: dict[str, Any] = {}
    if origin.lineage is not None:
        (folder / "lineage.json").write_text(_json(origin.lineage), encoding="utf-8")
        said["lineage"] = lineage_id(origin.lineage)
    if origin.evaluation is not None:
        (folder / "evaluation.json").write_text(_json(origin.evaluation), encoding="utf-8")
    if origin.terms is not None:
        write_notices(folder, origin.terms, name)
        said |= {"license": origin.terms.licence, "terms": origin.terms.record()}
    return said


def _write_code(folder: Path) -> str:
    """Copy the runtime and return the name of the module that MLflow loads."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in RUNTIME_SOURCES}
    texts = {name: text.replace("from ingot.model.", "from .") for name, text in texts.items()}
    digest = hashlib.sha256(_json(texts).encode()).hexdigest()[:12]
    package = folder / f"ingot_runtime_{digest}"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('"""The runtime that this model was evaluated with."""\n', encoding="utf-8")
    for file, text in texts.items():
        (package / file).write_text(text, encoding="utf-8")
    return f"{package.name}.pyfunc_model"


def _mlflow_pyfunc() -> Any:
    # MLflow warns about its own type hints while it is imported: nothing that the person packaging a model can mend.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import mlflow.pyfunc
        except ModuleNotFoundError as error:
            raise MissingPackage("mlflow", "packaging a model") from error
    return mlflow.pyfunc


def _write_mlmodel(folder: Path, loader: str, task: str, example: dict[str, Any], metadata: dict[str, Any]) -> None:
    pyfunc = _mlflow_pyfunc()
    from mlflow.models import Model

    split = {"columns": list(example), "data": [list(example.values())]}
    (folder / "input_example.json").write_text(_json(split), encoding="utf-8")
    (folder / "serving_input_example.json").write_text(_json({"dataframe_split": split}), encoding="utf-8")
    saved_example = {
        "artifact_path": "input_example.json",
        "serving_input_path": "serving_input_example.json",
        "type": "dataframe",
        "pandas_orient": "split",
    }
    model = Model(
        signature=signature_of(task),
        saved_input_example_info=saved_example,
        metadata=metadata,
        model_size_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
    )
    pyfunc.add_to_model(
        model,
        loader_module=loader,
        data="model",
        code="code",
        conda_env="conda.yaml",
        python_env="python_env.yaml",
        streamable=False,
    )
    block = add_transformers(folder, task, metadata["form"])
    if block is not None:
        model.add_flavor("transformers", **block)
    model.save(str(folder / "MLmodel"))


def _write_manifest(folder: Path) -> None:
    files = {str(p.relative_to(folder).as_posix()): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    (folder / MANIFEST_FILE).write_text(_json({"sha256": files}), encoding="utf-8")


def metadata_of(package: Path) -> dict[str, Any]:
    """The metadata of an MLflow model, empty where it has none. Raises PackageError where MLmodel cannot be read, or is
    not what `package_model` wrote.
    """
    try:
        found = yaml.safe_load((package / "MLmodel").read_text(encoding="utf-8")).get("metadata") or {}
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise PackageError(f"{package / 'MLmodel'} cannot be read ({error}); package the model again") from error
    if (package / MANIFEST_FILE).is_file():
        check_manifest(package, ("MLmodel",))
    return dict(found)


def check_manifest(package: Path, files: Collection[str] | None = None) -> None:
    """Compare every file (or `files` alone) with `manifest.json`; a changed or missing one is a `PackageError`."""
    try:
        expected = json.loads((package / MANIFEST_FILE).read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise PackageError(f"{package} holds no readable {MANIFEST_FILE}: not a package of Ingot's") from error
    for file, digest in expected.items():
        if files is not None and file not in files:
            continue
        if not (package / file).is_file():
            raise PackageError(f"{package}: {file} is missing; package the model again")
        if sha256(package / file) != digest:
            raise PackageError(f"{package}: {file} changed after packaging; package the model again")


def _swap(building: Path, out: Path) -> None:
    """Put `building` in place of `out` by renames; what stood there comes back if the last one fails."""
    if not out.exists():
        os.replace(building, out)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{out.name}-retired-", dir=out.parent))
    os.replace(out, retired)
    try:
        os.replace(building, out)
    except BaseException:
        os.replace(retired, out)
        raise
    shutil.rmtree(retired, ignore_errors=True)
