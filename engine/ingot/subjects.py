"""What `ingot evaluate` is given -> what answers: a run, a package, an adapter, a model folder, a registry's model, an
endpoint. Nothing is loaded before something is asked.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ingot.address import is_address
from ingot.errors import DataError, IngotError, ModelError, RecipeError
from ingot.evaluation.subject import Local
from ingot.evaluation.task import Subject
from ingot.evaluation.vllm_engine import Vllm
from ingot.model import adapted, runtime
from ingot.model import folder as folders
from ingot.model.adapters import with_saved_adapter
from ingot.model.load import (
    Tokenizer,
    context_length,
    load_model,
    load_tokenizer,
    read_tokenizer,
    resolve_dtype,
)
from ingot.model.source import model_folder
from ingot.packaging.bundle import MANIFEST_FILE, check_manifest
from ingot.packaging.registry import fetched
from ingot.recipe import Model, Task
from ingot.recipe_data import CLASSES
from ingot.remotes import Reach, Remote
from ingot.runfolder import open_run
from ingot.train.manifest import digests

DECIDING = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")  # files of a folder that decide its answers
ADAPTER_FILE = "adapter_config.json"
HEADS = {
    "text-classification": "ForSequenceClassification",
    "multi-label-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
    "fill-mask": "ForMaskedLM",
    "summarization": "ForConditionalGeneration",
    "translation": "ForConditionalGeneration",
}


@dataclass(frozen=True)
class Target:
    """A model to measure. `home`: where the relative paths of `model` start; `adapter`: a peft folder to put on it."""

    name: str
    kind: str
    source: str
    model: Model
    home: Path
    adapter: Path | None = None

    @property
    def folder(self) -> Path:
        """The model's folder on this disk; of a hub's model, once it is there."""
        return model_folder(self.model, self.home, weights=self.model.initialization == "pretrained")

    def facts(self, dtype: torch.dtype) -> dict[str, Any]:
        """Plain values that say which model it is; `fingerprint` is the same for the same weights and tokenizer."""
        tokenizer = self.tokenizer()
        return {
            "kind": self.kind,
            "source": self.source,
            "fingerprint": self.fingerprint(),
            "dtype": str(dtype).removeprefix("torch."),
            "template": _hash(str(tokenizer.chat_template)) if tokenizer.chat_template else None,
        }

    def tokenizer(self) -> Tokenizer:
        """Its tokenizer; of a packaged adapter the one that it was trained with."""
        packaged = self._packaged_adapter
        return load_tokenizer(self.model, self.home) if packaged is None else read_tokenizer(packaged)

    @property
    def _packaged_adapter(self) -> Path | None:
        """The adapter, if it says its task and has its own head and tokenizer."""
        return self.adapter if self.adapter is not None and adapted.is_packaged_adapter(self.adapter) else None

    def context(self) -> int | None:
        """Most tokens that its positions reach."""
        return context_length(self.model, self.home)

    def labels(self) -> tuple[str, ...]:
        """The names of its classes, in its own order; empty where it names none."""
        about = folders.describe(self._packaged_adapter or self.folder)
        if about.get("labels") or self._packaged_adapter is not None:
            return tuple(about.get("labels") or ())
        named = json.loads((self.folder / "config.json").read_text(encoding="utf-8")).get("id2label") or {}
        found = [str(named[key]) for key in sorted(named, key=int)]
        return () if all(label == f"LABEL_{place}" for place, label in enumerate(found)) else tuple(found)

    def vllm(self, dtype: torch.dtype) -> Subject:
        """What writes and scores text with vLLM. Raises RecipeError for an adapter, MissingPackage without vLLM."""
        if self.adapter is not None:
            fix = "vLLM is given whole models here, and this is an adapter; use another engine"
            raise RecipeError("evaluate.engine", "vllm", fix)
        return Vllm(self.folder, self.tokenizer(), str(dtype).removeprefix("torch."))

    def load(
        self,
        task: Task,
        labels: tuple[str, ...],
        device: torch.device,
        tokens_per_batch: int,
        engine: str = "auto",
        note: Callable[[str], None] = lambda text: None,
    ) -> Local:
        """Read it for `task`. Raises ModelError where it was made for another task, or has no trained head for this."""
        dtype, packaged = resolve_dtype(self.model.dtype, device), self._packaged_adapter
        if packaged is not None or (self.folder / folders.RUNTIME_FILE).is_file():
            loaded = runtime.Runtime.load(packaged or self.folder, str(device), self.folder)
            if loaded.task != task and not {loaded.task, task} <= set(runtime.WRITING):
                raise ModelError("target", self.source, f"this model was trained for {loaded.task}, not for {task}")
            found = loaded.model
        else:
            self._require_head(task)
            found = load_model(self.model, self.home, task, labels, dtype=dtype)
        if self.adapter is not None and packaged is None:
            found = with_saved_adapter(found, self.adapter)
        return Local(found.to(device), self.tokenizer(), tokens_per_batch, engine, note)

    def _require_head(self, task: Task) -> None:
        wanted = HEADS.get(task)
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        if self.adapter is None and wanted and not any(wanted in name for name in config.get("architectures") or []):
            fix = (
                f"it has no trained head for {task} (architectures: {config.get('architectures')}); fine-tune it first"
            )
            raise ModelError("target", self.source, fix)

    def fingerprint(self) -> str:
        """Hash of weights, tokenizer and settings, 16 hex digits."""
        parts = [self.folder] if self.adapter is None else [self.folder, self.adapter]
        return _hash(json.dumps([list(_digests(part)) for part in parts]))


def open_any(source: str, *, base: str | None = None, reach: Reach | None = None) -> Target | Remote:
    """`open_target`, or the model behind `http(s)://HOST/v1#MODEL`, reached as `reach` says. Nothing is sent yet."""
    if not is_address(source):
        if reach is not None:
            raise RecipeError("target", source, "is no endpoint: remove --key-env, --allow-http and --at-once")
        return open_target(source, base=base)
    if base is not None:
        raise RecipeError("--base", base, "an endpoint has its own model; remove it")
    return Remote(source, reach or Reach())


def open_target(source: str, *, base: str | None = None) -> Target:
    """What `source` names: a run's folder (its tuned model), a package, an adapter (on `base`, or on the model that it
    names), a model folder, `ingot://`, `hf://`, `package://`, or `models:/NAME/VERSION` of an MLflow registry.

    Raises IngotError or ModelError for anything else.
    """
    if is_address(source):
        raise ModelError("target", source.partition("?")[0], "an endpoint is measured on task files only: --task FILE")
    if source.startswith("models:/"):
        return _of_folder(fetched(source), "registry", source, base)
    if "://" in source:
        return Target(_named(source), "model", source, Model(source=source), Path.cwd())
    folder = Path(source).expanduser().resolve()
    if (folder / "run.json").is_file():
        run = open_run(folder)
        if not run.finished("finetune"):
            raise IngotError(f"{run.folder} holds no finished model; continue it with --resume {run.folder}")
        return _of_folder(run.model, "run", source, None, run.folder.name)
    return _of_folder(folder, "model", source, base)


def _of_folder(folder: Path, kind: str, source: str, base: str | None, name: str | None = None) -> Target:
    name = name or _named(source)
    if (folder / "MLmodel").is_file():
        if (folder / MANIFEST_FILE).is_file():
            check_manifest(folder)
        inner = folder / "model"
        if adapted.is_packaged_adapter(inner):
            return _over_base(name, "package" if kind == "model" else kind, source, base, inner)
        if not (inner / "config.json").is_file():
            fix = "this MLflow model holds no Hugging Face folder (model/config.json); package it with ingot package"
            raise ModelError("target", source, fix)
        kind = "package" if kind == "model" else kind
        return Target(name, kind, source, Model(source=str(inner)), Path.cwd())
    if adapted.is_packaged_adapter(folder):
        return _over_base(name, "adapter", source, base, folder)
    if (folder / ADAPTER_FILE).is_file():
        named = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8")).get("base_model_name_or_path")
        return Target(name, "adapter", source, Model(source=_base(base, named, source)), Path.cwd(), folder)
    return Target(name, kind, source, Model(source=str(folder)), Path.cwd())


def _over_base(name: str, kind: str, source: str, base: str | None, folder: Path) -> Target:
    """A packaged adapter over the base that it names by hash, or over the one that the user says."""
    if base is None:
        try:
            base = str(adapted.find_base(folder))
        except (OSError, ValueError) as error:
            raise ModelError("target", source, str(error)) from error
    return Target(name, kind, source, Model(source=base), Path.cwd(), folder)


def _base(given: str | None, named: str | None, source: str) -> str:
    """The model that an adapter sits on: what the user says, else what its configuration names."""
    if given is not None:
        return given
    if not named:
        raise ModelError("target", source, "this adapter names no base model; add --base MODEL")
    return named if "://" in named or Path(named).is_dir() else f"hf://{named}"


def known_labels(target: Target, task: str, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Classes of `target` in its own order. Raises DataError when rows have a label that it does not know."""
    if task not in CLASSES:
        return ()
    known = target.labels()
    if not known:
        raise ModelError("target", target.source, "this model does not name its classes (id2label in config.json)")
    if strange := [label for label in wanted if label not in known]:
        fix = f"this label is unknown to the model, which knows: {', '.join(known[:20])}"
        raise DataError("data.test: label", strange[0], fix)
    return known


def _named(source: str) -> str:
    name = source.rstrip("/").replace("models:/", "").rpartition("://")[2]
    return "-".join(part for part in Path(name).parts[-2:] if part not in ("/", "..", "."))[-60:] or "model"


def _digests(folder: Path) -> Iterator[tuple[str, str]]:
    names = sorted({path.name for pattern in DECIDING for path in folder.glob(pattern)})
    for name, entry in digests(folder, names).items():
        yield name, entry["sha256"]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
