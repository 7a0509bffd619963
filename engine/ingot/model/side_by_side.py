"""Several adapters over one base model: its weights are in memory once, and every view of it answers as one of them.

An adapter is switched on for single passes through the model, under a lock: requests of several adapters that are
worked on at the same time, in threads of their own, take turns from token to token.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from transformers import AutoTokenizer

from ingot.errors import ModelError
from ingot.model.folder import RUNTIME_FILE
from ingot.model.runtime import Runtime

# Other ways to begin an adapter take a part of it out of the base's own weights, which others use too.
PLAIN_BEGINNINGS = (True, False, "gaussian", "orthogonal", "eva", "lora_ga")
UNSUITED = "embeddings"  # such a model answers from within, past the pass that is switched


class SideBySide:
    """`model`, and the adapters over it by name. Where `adapter` is None below, the base itself is meant."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()
        self._lock = threading.RLock()
        self._peft: Any = None
        self._names: dict[str, str] = {}  # as peft calls them, which takes no dots
        self._active: str | None = None

    def add(self, name: str, folder: Path) -> None:
        """Read an adapter (peft's layout, safetensors only). Raises ModelError for one that cannot stand beside others
        or does not fit.
        """
        inner = f"a{len(self._names)}"
        _check(name, folder)
        options: Any = {"adapter_name": inner, "is_trainable": False}
        with self._lock, torch.no_grad():
            try:
                if self._peft is None:
                    self._peft = PeftModel.from_pretrained(self.model, folder, **options)  # type: ignore[arg-type]
                else:
                    self._peft.load_adapter(folder, **options)
            except (ValueError, KeyError, RuntimeError) as error:
                reason = str(error).strip().splitlines()[0][:300]
                raise ModelError("--adapter", name, f"does not fit the base model: {reason}") from error
            self._check_read(name, inner, folder)
            self._names[name], self._active = inner, None
            self._peft.eval()
            self._peft.base_model.disable_adapter_layers()

    def _check_read(self, name: str, inner: str, folder: Path) -> None:
        """peft only warns of tensors that found no place."""
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            saved = set(file.keys())
        places = get_peft_model_state_dict(self._peft, adapter_name=inner, save_embedding_layers=False)
        if wrong := sorted(saved ^ places.keys()):
            fix = f"{len(wrong)} of its tensors have no place in the base model, or are missing: {wrong[0]}"
            raise ModelError("--adapter", name, fix)

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[nn.Module]:
        """The model with this adapter on and all others off, for the caller alone."""
        inner = None if adapter is None else self._names[adapter]
        with self._lock:
            if inner != self._active:
                if inner is None:
                    self._peft.base_model.disable_adapter_layers()
                else:
                    self._peft.base_model.enable_adapter_layers()
                    self._peft.base_model.set_adapter(inner, inference_mode=True)
                self._active = inner
            yield self.model


class View(nn.Module):
    """The model as it is with one adapter: what answering needs of a model, and nothing that gets past the lock."""

    def __init__(self, shared: SideBySide, adapter: str | None) -> None:
        super().__init__()
        self._shared, self._adapter = shared, adapter
        self.model = shared.model
        inner: Any = shared.model
        self.config, self.generation_config = inner.config, getattr(inner, "generation_config", None)

    def forward(self, *args: Any, **options: Any) -> Any:
        """One pass."""
        with self._shared.using(self._adapter) as model:
            return model(*args, **options)

    def generate(self, *args: Any, **options: Any) -> Any:
        """A whole answer by the model's own `generate`; others wait for its end."""
        with self._shared.using(self._adapter) as model:
            writer: Any = model
            return writer.generate(*args, **options)

    def get_base_model(self) -> nn.Module:
        """The model whose `forward` says which arguments there are."""
        return self.model


def side_by_side(
    base: Runtime, adapters: dict[str, Path], *, weights: bool = True
) -> tuple[Runtime, dict[str, Runtime]]:
    """`base` and each of `adapters` (name -> folder) over its weights, which may be used from a thread each.

    An adapter's folder may hold a tokenizer of its own. Without `weights` another engine reads them, and what is
    returned only reads requests. Raises ModelError.
    """
    if base.task == UNSUITED:
        fix = "a model of embeddings takes no adapters beside it; serve each merged model by its own name"
        raise ModelError("--adapter", next(iter(adapters)), fix)
    shared = SideBySide(base.model)
    for name, folder in adapters.items():
        if weights:
            shared.add(name, folder)
        else:
            _check(name, folder)
    views = {name: _runtime(base, View(shared, name), folder) for name, folder in adapters.items()}
    return Runtime(View(shared, None), base.tokenizer, base.about), views


def _runtime(base: Runtime, view: View, folder: Path) -> Runtime:
    tokenizer, about = base.tokenizer, base.about
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if len(tokenizer) > view.model.get_input_embeddings().weight.shape[0]:  # type: ignore[operator, union-attr]
            fix = f"its tokenizer has {len(tokenizer)} tokens, more than the base model knows; serve the merged model"
            raise ModelError("--adapter", folder.name, fix)
        if about["task"] == "text-generation" and getattr(tokenizer, "chat_template", None):
            about = about | {"task": "chat-completion"}
    if (folder / RUNTIME_FILE).is_file():
        about = json.loads((folder / RUNTIME_FILE).read_text(encoding="utf-8"))
    return Runtime(view, tokenizer, about)


def _check(name: str, folder: Path) -> None:
    """Refuse what is no adapter, and what would change the answers of others."""

    def refuse(fix: str) -> ModelError:
        return ModelError("--adapter", name, fix)

    if not (folder / "adapter_config.json").is_file():
        raise refuse(f"{folder} holds no adapter_config.json: give a folder that peft saved")
    if not (folder / "adapter_model.safetensors").is_file():
        raise refuse("it holds no adapter_model.safetensors; pickle files are never opened")
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise refuse("its adapter_config.json is not JSON") from error
    merge = "; merge it into the base and serve that by its own name"
    if config.get("peft_type") != "LORA":
        raise refuse(f"peft_type is {config.get('peft_type')!r}, and only LORA adapters stand side by side{merge}")
    if config.get("bias", "none") != "none":
        raise refuse(f"bias is {config['bias']!r}: it changes the base's own biases, which others use{merge}")
    if config.get("init_lora_weights", True) not in PLAIN_BEGINNINGS:
        raise refuse(f"init_lora_weights is {config['init_lora_weights']!r}: it changes the base's own weights{merge}")
    for field in ("layer_replication", "alora_invocation_tokens", "trainable_token_indices", "arrow_config"):
        if config.get(field):
            raise refuse(f"{field} is set, which changes how the base itself is run{merge}")
