"""Can this model learn from rows that lie end to end, and which backend keeps them apart? Found out before training.

Whether `documents` reach every layer, and whether anything but attention carries information from token to token,
cannot be read off a configuration. So the model's own class is built small (two layers, few words, short windows) and
asked: rows in a line must give what they give alone by transformers' own definition, and no gradient may pass from one
row to another.
"""

# T tokens of the line, V outputs of a row (logits of its tokens, or of its classes), D hidden

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ingot.errors import FieldError, MissingPackage, RecipeError
from ingot.model.attention import FEATURES, flash_kernel, implementation, varlen_kernel
from ingot.model.documents import Documents
from ingot.model.kinds import KINDS, POOLED
from ingot.model.load import resolve_pooling
from ingot.model.pooling import MeanPoolClassifier
from ingot.model.source import model_folder
from ingot.recipe import Model, Recipe, Task
from ingot.recipe_data import SEQUENCE_TO_SEQUENCE

LENGTHS = (7, 1, 9)  # rows of the trial: longer than its windows, and one of a single token
WINDOW = 4
WORDS = 64
WIDTH = 32
WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "hidden_dim")
CLOSE = 1e-4  # largest difference to a row alone, as a share of the largest output; rounding leaves about 1e-6

CUDA_ONLY = ("varlen", "flash", "flex")
BY_CHOICE = {"cuda": ("varlen", "flash", "flex", "sdpa", "eager"), "cpu": ("sdpa", "eager")}


@dataclass(frozen=True)
class Needs:
    """What a model's layers ask of attention: features (attention.FEATURES), sizes of query and of value heads."""

    features: frozenset[str] = frozenset()
    head_sizes: frozenset[tuple[int, int]] = frozenset()


class Settled(NamedTuple):
    """`data.batches` and `model.attention` without auto; `notes` say why they are not the first choice."""

    batches: str
    attention: str
    notes: list[str]


def settle(recipe: Recipe, folder: Path, device: torch.device, dtype: torch.dtype) -> Settled:
    """Decide how rows lie and who computes attention. `dtype`: what matrix products run in.

    Raises RecipeError for lines that the model would mix up, and for a backend that lacks what it needs.
    """
    batches, backend = recipe.data.batches, recipe.model.attention
    if batches == "padded":
        return Settled("padded", _padded(backend), [])
    reason, needs = examine(recipe.model, folder, recipe.objective.task)
    if reason is None:
        picked, note = pick(backend, needs, device.type, dtype)
        # On a CPU 1.26 times as fast as padded on e2e, the same within the noise where rows are grouped by length
        # already (benchmarks/results/packing.md).
        return Settled("padding-free" if batches == "auto" else batches, picked, [note] if note else [])
    if recipe.parallel.context > 1:
        fix = f"ranks can only share lines of rows end to end, and {reason}; use parallel.context=1"
        raise RecipeError("parallel.context", recipe.parallel.context, fix)
    if batches != "auto":
        raise RecipeError("data.batches", batches, f"{reason}; use padded")
    return Settled("padded", _padded(backend), [f"data.batches=padded: {reason}"])


def _padded(backend: str) -> str:
    """Who computes attention where rows have a mask."""
    if backend in CUDA_ONLY:
        fix = "only where rows lie end to end, and here they are padded; use data.batches=padding-free, or sdpa"
        raise RecipeError("model.attention", backend, fix)
    return "sdpa" if backend == "auto" else backend


def pick(
    name: str, needs: Needs, device: str, dtype: torch.dtype, installed: frozenset[str] | None = None
) -> tuple[str, str | None]:
    """`model.attention` -> (the backend for lines, a note where it is not the first choice).

    Raises RecipeError when a named one lacks something, MissingPackage when it is not installed.
    """
    installed = available() if installed is None else installed
    if name == "auto":
        choices = BY_CHOICE.get(device, BY_CHOICE["cpu"])
        lacks = {choice: lacking(choice, needs, device, dtype, installed) for choice in choices}
        found = next(choice for choice in choices if lacks[choice] is None)
        passed = [f"{choice} {lacks[choice]}" for choice in choices[: choices.index(found)]]
        return found, f"model.attention={found}: {', '.join(passed)}" if passed else None
    lack = lacking(name, needs, device, dtype, installed)
    if lack is None:
        return name, None
    if (
        name == "flash"
        and "flash" not in installed
        and lacking(name, needs, device, dtype, installed | {"flash"}) is None
    ):
        raise MissingPackage("'flash-attn>=2.6'", "model.attention=flash")
    able = [other for other in FEATURES if lacking(other, needs, device, dtype, installed) is None]
    raise RecipeError("model.attention", name, f"{name} {lack}; use {' or '.join(able)}, or auto")


def available() -> frozenset[str]:
    """Optional backends whose code is on this machine."""
    kernels = {"varlen": varlen_kernel(), "flash": flash_kernel()}
    return frozenset(name for name, kernel in kernels.items() if kernel is not None)


def lacking(backend: str, needs: Needs, device: str, dtype: torch.dtype, installed: frozenset[str]) -> str | None:
    """Why `backend` cannot do it, or None."""
    if backend in CUDA_ONLY and device != "cuda":
        return "runs on CUDA only" if backend != "flex" else "has a backward pass on CUDA only"
    missing = sorted(needs.features - FEATURES[backend])
    if missing:
        words = {"softcap": "capped scores", "sinks": "attention sinks", "window": "sliding windows"}
        return f"has no {' and no '.join(words.get(name, name) for name in missing)}, which this model uses"
    if backend in ("varlen", "flash"):
        if dtype not in (torch.bfloat16, torch.float16):
            return "computes in half precision only"
        odd = [sizes for sizes in needs.head_sizes if sizes[0] != sizes[1] or sizes[0] % 8 or sizes[0] > 256]
        if odd:
            return (
                f"takes heads of one size that is a multiple of 8 up to 256, not {odd[0][0]} with values of {odd[0][1]}"
            )
    if backend == "flex" and any(min(sizes) < 16 for sizes in needs.head_sizes):
        return "takes heads of at least 16"
    if backend in ("varlen", "flash") and backend not in installed:
        return "needs torch 2.11 or later" if backend == "varlen" else "is not installed"
    return None


def examine(model: Model, folder: Path, task: Task) -> tuple[str | None, Needs]:
    """(why rows must not lie end to end, or None; what the layers ask for).

    A trial of the model's class on the CPU: below a second, and a few hundred MB for the widest models.
    """
    if task in SEQUENCE_TO_SEQUENCE:
        return "a decoder would read every row's source", Needs()
    if task == "question-answering":
        return "an answer is looked for among the tokens of its own row", Needs()
    if task in POOLED and resolve_pooling(model, folder) == "head":
        return "a classifier's own head finds a row's last or first token by padding", Needs()
    path = model_folder(model, folder, weights=False)
    options = {"trust_remote_code": model.trust_remote_code}
    config = AutoConfig.from_pretrained(path, local_files_only=True, **options)
    return trial(config, pooled=task in POOLED, kind=KINDS.get(task), **options)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers from telling the log about a model that nobody asked for."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


@_quiet()
def trial(config: PreTrainedConfig, *, pooled: bool, kind: Any = None, **options: Any) -> tuple[str | None, Needs]:
    """`examine` for a configuration. `pooled`: through MeanPoolClassifier. `kind`: the Auto class, None: that of models
    that write text. `options` are from_config's.
    """
    kind = AutoModel if pooled else kind or AutoModelForCausalLM
    failure: Exception | None = None
    for narrow in (True, False):
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                small = shrunk(config, narrow=narrow)
                inner = kind.from_config(small, dtype=torch.float32, attn_implementation="eager", **options)
                model = (MeanPoolClassifier(inner, 3) if pooled else inner).eval()
                rows = [torch.randint(3, WORDS, (1, length)) for length in LENGTHS]
                alone = [_output(model, row).detach() for row in rows]
        except Exception as error:  # whatever a class of others' raises when made small or asked for plain logits
            failure = error
            continue
        return _compare(model, inner, rows, alone)
    return f"{_name(config)} could not be tried out ({_line(failure)})", Needs()


def _compare(
    model: nn.Module, inner: PreTrainedModel, rows: list[Tensor], alone: list[Tensor]
) -> tuple[str | None, Needs]:
    """`model` on all `rows` in a line beside what it gave for each alone."""
    name = type(inner).__name__
    embedded: list[Tensor] = []
    inner.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: embedded.append(output))
    try:
        inner.set_attn_implementation(implementation("eager"))
        with torch.random.fork_rng(devices=[]):
            model.train()  # as in training: a dropout is asked for only there
            asked = Documents(LENGTHS, Documents.of(LENGTHS, torch.device("cpu")).bounds, seen=[])
            _output(model, torch.cat(rows, dim=1), asked)
            model.eval()
        together = _output(model, torch.cat(rows, dim=1), Documents.of(LENGTHS, torch.device("cpu")))
    except FieldError as error:
        return error.fix.split(";")[0], Needs()
    except Exception as error:
        return f"{name} does not take rows end to end ({_line(error)})", Needs()
    if not asked.seen:
        return f"{name} does not hand the bounds of rows to its attention", Needs()
    parts = list(together.split([len(part) for part in alone]))
    starts = Documents.of(LENGTHS, torch.device("cpu")).bounds.tolist()
    if not embedded:
        return f"{name} does not use its token embeddings as a module, so isolation cannot be shown", Needs()
    for number, part in enumerate(parts):
        [gradient] = torch.autograd.grad(part.square().sum(), embedded[-1], retain_graph=True)
        own = slice(starts[number], starts[number + 1])
        if gradient[0, own].abs().sum() == 0 or gradient.abs().sum() != gradient[:, own].abs().sum():
            return f"{name} carries information from one row of a line to the next", Needs()
    pairs = zip(together.detach().split([len(part) for part in alone]), alone, strict=True)
    worst = max(float((part - one).abs().max() / one.abs().max()) for part, one in pairs)
    if not worst <= CLOSE:
        return f"{name} gives other outputs for rows end to end than for rows alone", Needs()
    names = frozenset[str]().union(*(options.names for options, _, _ in asked.seen))
    return None, Needs(names, frozenset((query, value) for _, query, value in asked.seen))


def _output(model: nn.Module, ids: Tensor, documents: Documents | None = None) -> Tensor:
    """[1, T] token ids -> [rows or T, V]."""
    if documents is None:
        inputs: dict[str, Any] = {"attention_mask": torch.ones_like(ids)}
    else:
        positions = torch.cat([torch.arange(length) for length in documents.lengths]).unsqueeze(0)
        inputs = {"attention_mask": documents.mask, "position_ids": positions, "documents": documents}
    if isinstance(model, MeanPoolClassifier):
        return model(input_ids=ids, **inputs)
    logits: Tensor = model(input_ids=ids, use_cache=False, **inputs).logits[0]
    return logits


def shrunk(config: PreTrainedConfig, *, narrow: bool) -> PreTrainedConfig:
    """`config` with a layer of each kind (at least two), WORDS words, windows of WINDOW tokens; `narrow`: thin MLPs.

    Hidden and head sizes stay: too much of a configuration hangs on them.
    """
    small = copy.deepcopy(config)
    text: Any = small.get_text_config()
    count = text.num_hidden_layers
    lists = {key: value for key, value in vars(text).items() if isinstance(value, list) and len(value) == count}
    kinds = {str([value[layer] for value in lists.values()]): layer for layer in reversed(range(count))}
    kept = sorted({*kinds.values(), *range(min(count, 2))})
    for key, value in lists.items():
        setattr(text, key, [value[layer] for layer in kept])
    text.num_hidden_layers = len(kept)
    text.vocab_size = min(text.vocab_size, WORDS)
    for key, value in list(vars(text).items()):
        if key.endswith("_token_id") and isinstance(value, int) and value >= WORDS:
            setattr(text, key, 0 if key == "pad_token_id" else 1)
    windows = [key for key in ("sliding_window", "local_attention", "attention_chunk_size") if getattr(text, key, None)]
    for key in windows:
        setattr(text, key, WINDOW)
    for key in WIDTHS if narrow else ():
        if isinstance(getattr(text, key, None), int) and getattr(text, key) > WIDTH:
            setattr(text, key, WIDTH)
    return small


def _name(config: PreTrainedConfig) -> str:
    return " ".join(config.architectures or [type(config).__name__])


def _line(error: Exception | None) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
