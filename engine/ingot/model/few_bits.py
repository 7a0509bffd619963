"""A finished model folder -> the same in few bits, as bitsandbytes and transformers write it: matrix by matrix, so that
no more than one shard of the result is in memory. transformers, vLLM and TGI load such a folder by its configuration.
"""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from ingot.errors import MissingPackage, PackageError
from ingot.model.quantize import bitsandbytes_functional, linears

SHARD_BYTES = 256 << 20
BLOCK = 64
INDEX_FILE = "model.safetensors.index.json"


def write_few_bits(folder: Path, out: Path, kind: Literal["nf4", "int8"]) -> Path:
    """Write the model in `folder` to `out` with its linear layers in `kind`, all but the output head and a classifier;
    return `out`. Every other file is copied.

    Raises PackageError for a model whose layers are not found in its files by name, MissingPackage without
    bitsandbytes.
    """
    functional = bitsandbytes_functional()
    if functional is None:
        raise MissingPackage("bitsandbytes", "package.forms: quantized")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    chosen, skipped = _layers(folder, config, kind)
    out.mkdir(parents=True)
    files = _weight_files(folder)
    for path in folder.iterdir():
        if path.is_file() and path.name != INDEX_FILE and path not in files:
            shutil.copyfile(path, out / path.name)
    missing = set(chosen)
    parts = _Parts(out)
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                tensor = file.get_tensor(name)
                if name in chosen:
                    missing.discard(name)
                    parts.add(_pieces(name, tensor, kind, functional))
                else:
                    parts.add({name: tensor})
    if missing or not chosen:
        shutil.rmtree(out)
        what = f"its files hold no {min(missing)}" if missing else "it has no linear layer"
        raise PackageError(f"package.forms: quantized cannot be made of this model: {what}; use merged")
    parts.finish()
    config["quantization_config"] = _section(kind, str(config.get("dtype") or "float32"), skipped)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return out


class _Parts:
    """Tensors that are written as soon as they fill a shard."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.held, self.size = folder, dict[str, Tensor](), 0
        self.written: list[list[str]] = []
        self.total = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self.held and self.size + size > SHARD_BYTES:
            self._write()
        self.held |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        self.size += size
        self.total += size

    def _write(self) -> None:
        self.written.append(list(self.held))
        save_file(self.held, self.folder / f".part-{len(self.written)}", metadata={"format": "pt"})
        self.held, self.size = {}, 0

    def finish(self) -> None:
        """Give the parts their names, and write which holds what."""
        self._write()
        count = len(self.written)
        if count == 1:
            (self.folder / ".part-1").rename(self.folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self.written, start=1):
            file = f"model-{number:05}-of-{count:05}.safetensors"
            (self.folder / f".part-{number}").rename(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if not index.is_file():
        return [folder / "model.safetensors"]
    return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


def _layers(folder: Path, config: dict[str, Any], bits: str) -> tuple[set[str], list[str]]:
    """(names of the weights that are quantized, names of the layers that transformers must leave alone)."""
    kind = getattr(transformers, (config.get("architectures") or [""])[0], None)
    if kind is None or "quantization_config" in config:
        raise PackageError(f"package.forms: quantized cannot be made of {config.get('architectures')}; use merged")
    with torch.device("meta"):
        model: Any = kind(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    # On a CPU bitsandbytes 0.50 reads NF4 as if a block began at every row (see quantize.py): other rows stay whole.
    layers = {id(linear) for _, _, linear in linears(model) if bits == "int8" or linear.in_features % BLOCK == 0}
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    chosen = {f"{name}.weight" for name, module in named if id(module) in layers}
    return chosen, [name for name, module in named if id(module) not in layers]


def _pieces(name: str, weight: Tensor, kind: str, functional: Any) -> dict[str, Tensor]:
    """What bitsandbytes keeps of one weight, by the names that transformers reads."""
    if kind == "int8":
        packed, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        owner = name.removesuffix("weight")
        return {name: packed, f"{owner}SCB": scales, f"{owner}weight_format": torch.zeros((), dtype=torch.uint8)}
    packed, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=True
    )
    return {name: packed, **{f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}}


def _section(kind: str, dtype: str, skipped: list[str]) -> dict[str, Any]:
    """`quantization_config` as transformers reads it."""
    shared = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": skipped or None}
    if kind == "int8":
        return {**shared, "load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": 6.0}
    return {
        **shared,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
    }
