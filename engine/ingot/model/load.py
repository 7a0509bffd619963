"""A recipe's model section -> tokenizer and model, from safetensors on this disk."""

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from ingot.errors import ModelError
from ingot.model.attention import implementation
from ingot.model.kinds import KINDS, POOLED, pad_id
from ingot.model.pooling import MeanPoolClassifier
from ingot.model.quantize import QuantizedLinear
from ingot.model.source import model_folder
from ingot.recipe import Model, Task

Tokenizer: TypeAlias = PreTrainedTokenizerBase
Read: TypeAlias = Callable[..., nn.Module]  # (an Auto class, folder, **options of its from_pretrained) -> model
CPU_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16, AMX, Arm BF16); unknown counts as no."""
    if platform.system() != "Linux":
        return False
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return any(
        CPU_BF16_FLAGS & set(line.split()) for line in text.splitlines() if line.startswith(("flags", "Features"))
    )


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`model.dtype` -> float32 or bfloat16 for `device`; an explicit bfloat16 that would crawl is refused.

    auto on a CPU is float32 even where it has bfloat16 units: at the sizes that train on a CPU float32 is as fast and
    exact.
    """
    if name == "float32":
        return torch.float32
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return torch.bfloat16
        slow = f"{torch.cuda.get_device_name(device)} has no bfloat16"
    else:
        if name == "bfloat16" and cpu_has_bf16():
            return torch.bfloat16
        slow = "this CPU has no bfloat16 units: training would be 7 to 300 times slower and look hung"
    if name == "auto":
        return torch.float32
    raise ModelError("model.dtype", name, f"{slow}; use model.dtype=float32")


def load_tokenizer(model: Model, folder: Path) -> Tokenizer:
    """Return the fast tokenizer of `model.source`, with `model.chat_template` in place of its own if one is named."""
    path = model_folder(model, folder, weights=False)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=model.trust_remote_code)
    if not tokenizer.is_fast:
        raise ModelError(
            "model.source",
            model.source,
            "only a slow tokenizer: Ingot needs tokenizer.json (character offsets give the mask)",
        )
    if model.chat_template is not None:
        template = folder / model.chat_template
        if not template.is_file():
            raise ModelError("model.chat_template", model.chat_template, f"no such file ({template})")
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that was saved with a model or an adapter."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def resolve_pooling(model: Model, folder: Path) -> str:
    """`model.pooling` auto -> `head` for a folder that holds a trained classifier or a decoder, else `mean`."""
    if model.pooling != "auto":
        return model.pooling
    config = json.loads((model_folder(model, folder, weights=False) / "config.json").read_text(encoding="utf-8"))
    names = " ".join(config.get("architectures") or [])
    return "head" if "ForSequenceClassification" in names or "ForCausalLM" in names else "mean"


def context_length(model: Model, folder: Path) -> int | None:
    """Longest sequence that the model's positions reach, as its configuration says; None where it names no limit."""
    config = json.loads((model_folder(model, folder, weights=False) / "config.json").read_text(encoding="utf-8"))
    return config.get("max_position_embeddings") or config.get("text_config", {}).get("max_position_embeddings")


class Described(NamedTuple):
    """What a model's folder says of it, without its weights."""

    config: Any
    generation_config: Any


def described(folder: Path) -> Described:
    """Configurations of a model's folder, as a loaded model carries them."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    there = (folder / "generation_config.json").is_file()
    return Described(config, GenerationConfig.from_pretrained(folder, local_files_only=True) if there else None)


def few_bits(model: Model, folder: Path) -> str | None:
    """How the weights of `model.source` lie there in few bits, so that there are none in full size: nf4, which is read,
    or what its configuration calls it. None: they are in full size.
    """
    config = json.loads((model_folder(model, folder, weights=False) / "config.json").read_text(encoding="utf-8"))
    section = config.get("quantization_config")
    if section is None:
        return None
    if section.get("quant_method") != "bitsandbytes":
        return str(section.get("quant_method"))
    if not section.get("load_in_4bit"):
        return "8 bits of bitsandbytes"
    return str(section.get("bnb_4bit_quant_type", "fp4"))


def read_whole(kind: Any, path: Path, **options: Any) -> nn.Module:
    """The model in a folder, all of it on this rank."""
    model: nn.Module = kind.from_pretrained(path, **options)
    return model


def load_model(
    model: Model,
    folder: Path,
    task: Task,
    labels: tuple[str, ...] = (),
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    read: Read = read_whole,
) -> nn.Module:
    """Return the model for `task` on the CPU with weights in `dtype`.

    New weights (a classifier's head, or everything with `model.initialization: random`) are drawn with `seed`. `read`
    is how weights come from the disk (materialize.py).
    """
    random = model.initialization == "random"
    path = model_folder(model, folder, weights=not random)
    torch.manual_seed(seed)
    options: dict[str, Any] = {
        "trust_remote_code": model.trust_remote_code,
        "attn_implementation": implementation(model.attention),
    }
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=model.trust_remote_code)
    if task in POOLED:
        _name_outputs(config, labels if task != "reward" else ("score",))
        config.problem_type = "multi_label_classification" if task == "multi-label-classification" else None
        return _load_classifier(model, path, folder, config, dtype, random, read)
    kind = KINDS.get(task, AutoModelForCausalLM)
    if task == "token-classification":
        _name_outputs(config, labels)
    if task == "question-answering":
        config.num_labels = 2  # where the answer begins, and where it ends
    try:
        if random:
            return kind.from_config(config, dtype=dtype, **options)  # type: ignore[no-any-return]
        # A head of another size than the task's is drawn anew; what writes text has the one head that it came with.
        options["ignore_mismatched_sizes"] = task in ("token-classification", "question-answering")
        options |= {"local_files_only": True, "use_safetensors": True}
        return read(kind, path, config=config, dtype=dtype, **options)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        fix = f"no model of transformers does {task} with a {type(config).__name__}; choose another model or task"
        raise ModelError("model.source", model.source, fix) from error


def _name_outputs(config: Any, labels: tuple[str, ...]) -> None:
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}


def _load_classifier(
    model: Model,
    path: Path,
    folder: Path,
    config: Any,
    dtype: torch.dtype,
    random: bool,
    read: Read,
) -> nn.Module:
    if config.pad_token_id is None:  # decoders find a row's last token by this id
        config.pad_token_id = pad_id(load_tokenizer(model, folder))
    options: dict[str, Any] = {
        "trust_remote_code": model.trust_remote_code,
        "dtype": dtype,
        "attn_implementation": implementation(model.attention),
    }
    kind = AutoModelForSequenceClassification if resolve_pooling(model, folder) == "head" else AutoModel
    loaded: Any
    if random:
        loaded = kind.from_config(config, **options)
    else:
        loaded = read(
            kind,
            path,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=kind is not AutoModel,
            **options,
        )
    if kind is not AutoModel:
        return loaded
    # The pooler of BERT-like encoders is not on the path of mean pooling: left in, it would be a trainable part that
    # never moves.
    if getattr(loaded, "pooler", None) is not None:
        loaded.pooler = None
    return MeanPoolClassifier(loaded, len(config.id2label))


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Return (trainable, all) numbers of weights; tied ones count once, quantized ones as what they stand for."""
    quantized = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    held = {id(part) for module in quantized for name, part in module.named_parameters() if name != "bias"}
    sizes = [(p.requires_grad, p.numel()) for p in model.parameters() if id(p) not in held]
    total = sum(n for _, n in sizes) + sum(module.in_features * module.out_features for module in quantized)
    return sum(n for trainable, n in sizes if trainable), total
