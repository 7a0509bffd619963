"""What the package tells MLflow of a task: its signature and its example, from the one table of tasks; and which model
folders can be packaged for it. No model library is imported.
"""

import json
from pathlib import Path
from typing import Any

from ingot.errors import PackageError
from ingot.model.folder import CLASSIFIER_FILE, RUNTIME_FILE, embedding_facts
from ingot.model.task_checks import SchemaError, flat
from ingot.model.task_schemas import TASKS, Column
from ingot.packaging.shards import shards_of

FORBIDDEN = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".py")
# What the Hub calls a task, where that is another name.
PIPELINE_TAGS = {task: task for task in TASKS} | {
    "chat-completion": "text-generation",
    "language-modeling": "text-generation",
    "multi-label-classification": "text-classification",
    "reward": "text-classification",
    "embeddings": "feature-extraction",
}


def check_model_folder(folder: Path, task: str) -> dict[str, Any]:
    """Refuse a folder that would not load elsewhere; return its `ingot.json` (without one: what else it says of
    itself). Raises PackageError.
    """
    if task not in TASKS:
        raise PackageError(f"task {task!r} cannot be packaged; tasks are {', '.join(TASKS)}")
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
    shards_of(folder)  # all of them are there
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if task == "chat-completion" and not ((folder / "chat_template.jinja").is_file() or "chat_template" in settings):
        raise PackageError(f"{folder} has no chat template: chat-completion cannot be served; set model.chat_template")
    return _about(folder, task)


def _about(folder: Path, task: str) -> dict[str, Any]:
    about = folder / RUNTIME_FILE
    if about.is_file():
        found = dict(json.loads(about.read_text(encoding="utf-8")))
        if found.get("task", task) != task:
            raise PackageError(f"{about} says task {found['task']!r}, and the package was asked for as {task!r}")
        return found
    if (folder / CLASSIFIER_FILE).is_file():
        return {"pooling": "mean"}
    try:
        return embedding_facts(folder) if task == "embeddings" else {}
    except ValueError as error:
        raise PackageError(str(error)) from error


def example_row(task: str, example: dict[str, Any]) -> dict[str, Any]:
    """The example as columns of single values. Raises PackageError where it is no row of the task."""
    try:
        return flat(task, example)
    except SchemaError as error:
        raise PackageError(f"the example of a {task} model: {error}") from error


def signature_of(task: str) -> Any:
    """The `ModelSignature` of a task: every column and every parameter. Lists that a row may hold are strings of JSON
    in it, as hosts without nested types send them.
    """
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

    schema = TASKS[task]
    needed = set.intersection(*map(set, schema.forms))
    inputs = [ColSpec("string", column.name, required=column.name in needed) for column in schema.inputs]
    # Not those that a parameter asks for: spark_udf fails on a declared column that an answer lacks, optional or not.
    outputs = [ColSpec(_type(column), column.name) for column in schema.outputs if not column.asked]
    params = [
        ParamSpec(it.name, "string", it.default, shape=(-1,))
        if it.type == "strings"
        else ParamSpec(it.name, it.type, it.default)
        for it in schema.params
    ]
    return ModelSignature(Schema(inputs), Schema(outputs), ParamSchema(params) if params else None)


def _type(column: Column) -> Any:
    from mlflow.types.schema import Array, DataType, Object, Property

    if column.type == "objects":
        return Array(Object([Property(field.name, _type(field)) for field in column.fields]))
    if column.type in ("strings", "doubles"):
        return Array(DataType[column.type.removesuffix("s")])
    return DataType[column.type]
