"""Writes the MLflow model folder from a finished model folder, file by file: no model is loaded, nothing is pickled.

MLmodel  conda.yaml  python_env.yaml  requirements.txt  input_example.json  serving_input_example.json  README.md
manifest.json           SHA-256 of every other file
model/                  a complete Hugging Face folder: other servers can be pointed inside the package
code/ingot_runtime_H/   the runtime; H is a hash of it, so that two packages in one process keep their own
"""

import hashlib
import json
import os
import platform
import shutil
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from ingot.errors import MissingPackage, PackageError

MANIFEST_FILE = "manifest.json"
RUNTIME_FILE = "ingot.json"
FORBIDDEN = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".py")
TEXT_TASKS = ("chat-completion", "text-generation", "language-modeling")
PIPELINE_TAGS = {"text-classification": "text-classification"}
HERE = Path(__file__).parent
RUNTIME_SOURCES = (
    *(HERE.parent / "model" / f"{name}.py" for name in ("generate", "pooling", "runtime")),
    HERE / "pyfunc_model.py",
)
REQUIREMENTS = ("mlflow", "torch", "transformers", "safetensors", "pandas", "numpy")


def package_model(
    model_folder: Path,
    out: Path,
    *,
    name: str,
    task: str,
    example_input: dict[str, Any],
    metadata: dict[str, Any],
    license: str | None,
) -> Path:
    """Write the package of `model_folder` to `out` and return `out`; an earlier package there is replaced in one step.

    `example_input` holds `input_string`, `messages` or `text`. Files are hard links where the file system allows it.
    Raises `PackageError`.
    """
    about = _check_model_folder(model_folder, task)
    example = _scalar_example(task, example_input)
    if out.exists() and not (out / "MLmodel").is_file():
        raise PackageError(f"{out} exists and is not a package; it is left alone: move it away or choose another name")
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}-building-", dir=out.parent))
    try:
        building.chmod(0o755)
        _link_tree(model_folder, building / "model")
        (building / "model" / RUNTIME_FILE).write_text(
            _json(about | {"task": task, "example": example}), encoding="utf-8"
        )
        loader = _write_code(building / "code")
        _write_environment(building)
        _write_mlmodel(building, loader, task, example, metadata | {"name": name, "task": task, "license": license})
        (building / "README.md").write_text(_card(name, task, example, metadata, license), encoding="utf-8")
        _write_manifest(building)
        _swap(building, out)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return out


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _check_model_folder(folder: Path, task: str) -> dict[str, Any]:
    """Refuse a folder that would not load elsewhere; return its `ingot.json` (empty without one)."""
    if task not in (*TEXT_TASKS, "text-classification"):
        raise PackageError(f"task {task!r} cannot be packaged")
    for needed in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if not (folder / needed).is_file():
            raise PackageError(
                f"{folder} holds no {needed}: the package would not load; save model and tokenizer there first"
            )
    for path in sorted(folder.rglob("*")):
        if path.suffix in FORBIDDEN:
            raise PackageError(
                f"{path} could run code when loaded; a package holds safetensors and data only: remove it"
            )
    index = folder / "model.safetensors.index.json"
    shards = {"model.safetensors"}
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    missing = sorted(shard for shard in shards if not (folder / shard).is_file())
    if missing:
        raise PackageError(f"{folder} holds no {missing[0]}: the weights are incomplete")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if task == "chat-completion" and not ((folder / "chat_template.jinja").is_file() or "chat_template" in settings):
        raise PackageError(f"{folder} has no chat template: chat-completion cannot be served; set model.chat_template")
    about = folder / RUNTIME_FILE
    found = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
    if found.get("task", task) != task:
        raise PackageError(f"{about} says task {found['task']!r}, and the package was asked for as {task!r}")
    return found


def _scalar_example(task: str, example: dict[str, Any]) -> dict[str, str]:
    """The example as string columns: hosts that read it (Azure ML without a scoring script) take nothing nested."""
    allowed = {"chat-completion": ("input_string", "messages"), "text-classification": ("text",)}.get(
        task, ("input_string",)
    )
    if len(example) != 1 or next(iter(example)) not in allowed:
        raise PackageError(f"the example of a {task} model needs one of {' or '.join(allowed)}, not {sorted(example)}")
    [(column, value)] = example.items()
    if column == "messages" and isinstance(value, list):
        single = len(value) == 1 and value[0].get("role") == "user" and isinstance(value[0].get("content"), str)
        if single:
            return {"input_string": value[0]["content"]}
        return {"messages": json.dumps(value, ensure_ascii=False)}
    if not isinstance(value, str):
        raise PackageError(f"the example's {column} must be a string")
    return {column: value}


def _link_tree(source: Path, target: Path) -> None:
    for path in sorted(source.rglob("*")):
        if path.is_file() and path.name != RUNTIME_FILE:
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path.resolve(), place)
            except OSError:  # another file system, or one without links
                shutil.copy2(path, place)


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


def _write_environment(folder: Path) -> None:
    """Pin what is installed here. A local suffix such as +cpu or +cu128 is cut: package indexes do not carry it."""
    pins = [f"{package}=={version(package).partition('+')[0]}" for package in REQUIREMENTS]
    (folder / "requirements.txt").write_text("\n".join(pins) + "\n", encoding="utf-8")
    conda = {
        "name": "mlflow-env",
        "channels": ["conda-forge"],
        "dependencies": [f"python={platform.python_version()}", "pip", {"pip": pins}],
    }
    python = {
        "python": platform.python_version(),
        "build_dependencies": ["pip"],
        "dependencies": ["-r requirements.txt"],
    }
    (folder / "conda.yaml").write_text(yaml.safe_dump(conda, sort_keys=False), encoding="utf-8")
    (folder / "python_env.yaml").write_text(yaml.safe_dump(python, sort_keys=False), encoding="utf-8")


def _mlflow_pyfunc() -> Any:
    # MLflow warns about its own type hints while it is imported: nothing that the person packaging a model can mend.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import mlflow.pyfunc
        except ModuleNotFoundError as error:
            raise MissingPackage("mlflow", "packaging a model") from error
    return mlflow.pyfunc


def _signature(task: str) -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

    if task == "text-classification":
        outputs = Schema([ColSpec("string", "label"), ColSpec("double", "probability")])
        return ModelSignature(Schema([ColSpec("string", "text")]), outputs)
    chat = task == "chat-completion"
    columns = [ColSpec("string", "input_string", required=not chat)]
    if chat:
        columns.append(ColSpec("string", "messages", required=False))
    params = [
        # The schema has no "not given" for numbers: 0 and -1 stand for the model's own default and for no seed.
        ParamSpec("max_tokens", "long", 0),
        ParamSpec("temperature", "double", 0.0),
        ParamSpec("top_p", "double", 1.0),
        ParamSpec("stop", "string", [], shape=(-1,)),
        ParamSpec("seed", "long", -1),
    ]
    return ModelSignature(Schema(columns), Schema([ColSpec("string", "output_string")]), ParamSchema(params))


def _write_mlmodel(folder: Path, loader: str, task: str, example: dict[str, str], metadata: dict[str, Any]) -> None:
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
        signature=_signature(task),
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
    model.save(str(folder / "MLmodel"))


def _card(name: str, task: str, example: dict[str, str], metadata: dict[str, Any], license: str | None) -> str:
    front = {"license": license, "base_model": metadata.get("base_model"), "library_name": "transformers"}
    front |= {"pipeline_tag": PIPELINE_TAGS.get(task, "text-generation"), "tags": ["ingot", "mlflow"]}
    head = yaml.safe_dump({key: value for key, value in front.items() if value}, sort_keys=False, allow_unicode=True)
    facts = "".join(
        f"- {key}: {value}\n" for key, value in metadata.items() if isinstance(value, str | int | float | bool)
    )
    body = json.dumps({"dataframe_records": [example]}, ensure_ascii=False)
    return f"""---
{head}---
# {name}

Task: {task}. License: {license or "not stated; the base model's licence applies"}.

{facts}
## Use

```python
import mlflow
model = mlflow.pyfunc.load_model("PATH/OF/THIS/FOLDER")
print(model.predict({json.dumps([example], ensure_ascii=False)}))
```

`ingot serve FOLDER` answers the OpenAI routes and `/invocations`; so does
`mlflow models serve -m FOLDER --env-manager local` for the latter:

```json
{body}
```

`model/` is a complete Hugging Face folder for any other server. `manifest.json` holds the SHA-256 of every file.
"""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_manifest(folder: Path) -> None:
    files = {str(p.relative_to(folder).as_posix()): _digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    (folder / MANIFEST_FILE).write_text(_json({"sha256": files}), encoding="utf-8")


def check_manifest(package: Path) -> None:
    """Compare every file with `manifest.json`; a changed or missing one is a `PackageError`."""
    try:
        expected = json.loads((package / MANIFEST_FILE).read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise PackageError(f"{package} holds no readable {MANIFEST_FILE}: not a package of Ingot's") from error
    for file, digest in expected.items():
        if not (package / file).is_file():
            raise PackageError(f"{package}: {file} is missing; package the model again")
        if _digest(package / file) != digest:
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
