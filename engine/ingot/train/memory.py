"""Out of memory: what grew, and the cheapest lever; or half the microbatch at the same tokens per step."""

import gc
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ingot.data.loader import IGNORE, Batch
from ingot.data.plan import Portion
from ingot.errors import OutOfMemory
from ingot.model.head import fused_head
from ingot.parallel.sharded import Sharded
from ingot.ranks import on_main
from ingot.recipe import Recipe

NOTE = "out-of-memory.json"  # in a run's folder: the budget that was halved, for whoever goes on with the run
# How libraries say it where they do not raise OutOfMemoryError.
SIGNS = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "std::bad_alloc")
_ASKED = re.compile(r"tried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB|TiB)?", re.IGNORECASE)
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


@dataclass(frozen=True)
class Load:
    """What one microbatch asks of memory: `tokens` counting padding, `targets` that go through the head."""

    tokens: int = 0
    rows: int = 0
    longest: int = 0
    targets: int = 0

    @classmethod
    def of(cls, batch: Batch) -> "Load":
        """Read a batch."""
        n_rows = len(batch.row_lengths or batch.ids_BT)
        longest = max(batch.row_lengths or (batch.ids_BT.shape[1],))
        targets = batch.n_targets if batch.row_labels is not None else _kept(batch)
        if batch.targets_BU is not None:  # a decoder's tokens, all of which go through the head
            targets = batch.targets_BU.numel()
            return cls(batch.ids_BT.numel() + targets, n_rows, longest + batch.targets_BU.shape[1], targets)
        return cls(batch.ids_BT.numel(), n_rows, longest, targets)


def _kept(batch: Batch) -> int:
    """Positions that go through the head: those that are a target in some row, for every row."""
    return int((batch.labels_BT != IGNORE).any(0).sum()) * len(batch.labels_BT)


@dataclass(frozen=True)
class Failure:
    """What was in memory when it ran out, in bytes on this rank. `activations` is None where it cannot be told."""

    message: str
    phase: str
    load: Load
    held: dict[str, int] = field(default_factory=dict)
    activations: int | None = None
    logits: int = 0
    free: int = 0  # held by torch's allocator, but not by tensors

    @classmethod
    def of(cls, error: BaseException, phase: str, load: Load, sharded: Sharded, strategy: str) -> "Failure":
        """Measure now, while the traceback still holds the failed step's tensors."""
        found = _ASKED.search(str(error))
        asked = float(found[1]) * _UNITS[(found[2] or "bytes").lower()] if found else 0.0
        held, activations, free = _held(sharded, strategy), None, 0
        if sharded.device.type == "cuda":
            allocated = torch.cuda.memory_allocated(sharded.device)
            present = held["weights"] + _bytes(_gradients(sharded.plain)) + _bytes(_moments(sharded))
            activations = max(0, allocated + int(asked) - present)
            free = torch.cuda.memory_reserved(sharded.device) - allocated
        # In the compute type, as float32, and their gradient as float32. A head that answers holds a chunk at a time.
        fused = fused_head(sharded.plain) is not None
        width = 0 if fused else _vocabulary(sharded.plain) * (torch.finfo(sharded.compute_dtype).bits // 8 + 8)
        text = str(error).splitlines()
        return cls(text[0] if text else "no memory", phase, load, held, activations, load.targets * width, free)


def _held(sharded: Sharded, strategy: str) -> dict[str, int]:
    """Bytes of this rank's weights, and of its gradients and optimizer state once they are there."""
    trained = _bytes(p for p in sharded.plain.parameters() if p.requires_grad)
    weights = _bytes([*sharded.plain.parameters(), *sharded.plain.buffers()])
    # ZeRO-2 keeps a part of each gradient only, of weights that it keeps whole.
    gradients = trained // sharded.layout.data if strategy == "zero2" else trained
    return {"weights": weights, "gradients": gradients, "optimizer state": _bytes(_moments(sharded)) or 2 * trained}


def _gradients(model: nn.Module) -> Iterator[Tensor]:
    return (p.grad for p in model.parameters() if p.grad is not None)


def _moments(sharded: Sharded) -> Iterator[Tensor]:
    states: Any = getattr(getattr(sharded, "optimizer", None), "state", {})
    return (value for state in states.values() for value in state.values() if isinstance(value, Tensor))


def _bytes(tensors: Any) -> int:
    """Of this rank's parts, on its device or not."""
    parts = (getattr(tensor, "ds_tensor", tensor) for tensor in tensors)
    local = (part.to_local() if isinstance(part, DTensor) else part for part in parts)
    return sum(part.numel() * part.element_size() for part in local)


def _vocabulary(model: Any) -> int:
    unwrap: Any = getattr(model, "get_base_model", lambda: model)
    head = getattr(unwrap(), "get_output_embeddings", lambda: None)()
    return getattr(head, "out_features", 0) or 0


def explain(
    failure: Failure, recipe: Recipe, budget: int, largest: Load, world: int, rank: int, step: int
) -> OutOfMemory:
    """The error to raise: which term grew, and the levers from the cheapest on. `largest`: what fitted before."""
    where = f"out of memory in step {step}" + (f" on rank {rank}" if world > 1 else "")
    terms = [f"{name} {_size(value)}" for name, value in failure.held.items()]
    if failure.activations is not None:
        terms.append(f"activations {_size(failure.activations)}")
    if failure.logits:
        terms.append(f"of these about {_size(failure.logits)} logits" if failure.activations else _logits(failure))
    levers = "; ".join(f"({number}) {text}" for number, text in enumerate(_levers(failure, recipe, budget, world), 1))
    return OutOfMemory(
        f"{where} ({failure.phase}): {_grown(failure, largest)}. On this rank: {', '.join(terms)}. "
        f"Cheapest first: {levers}. torch says: {failure.message}"
    )


def _logits(failure: Failure) -> str:
    return f"logits about {_size(failure.logits)}"


def _grown(failure: Failure, largest: Load) -> str:
    """Which term is to blame."""
    load = failure.load
    if failure.phase == "step":
        return "the optimizer state grew: its moments are made in the first step and stay"
    if failure.phase == "validation":
        return "activations of a validation batch grew"
    if failure.phase == "evaluation":
        return "keys and values of rows that are measured beside training grew"
    rows = f"{load.rows} rows, the longest {load.longest:,}" if load.rows > 1 else "one row"
    here = f"this microbatch has {load.tokens:,} tokens ({rows}; {load.targets:,} targets)"
    if not largest.tokens:
        held = sum(failure.held.values())
        if failure.activations is not None and failure.activations < held:
            name = max(failure.held, key=lambda key: failure.held[key])
            return f"nothing fitted yet, and {name} are the largest term: {here}"
        return f"activations grew: no microbatch fitted before; {here}"
    if load.tokens > largest.tokens:
        return f"activations grew: {here}, the largest that fitted before had {largest.tokens:,}"
    if load.targets > largest.targets:
        return f"logits grew: {here}, and none before had more than {largest.targets:,} targets"
    if load.longest > largest.longest:
        return f"attention grew: {here}, and no row before was longer than {largest.longest:,}"
    scattered = f" ({_size(failure.free)} of torch's memory are free, but scattered)" if failure.free else ""
    return (
        f"not the batch: {here}, and one of {largest.tokens:,} fitted before; another process took memory, or it is in "
        f"pieces{scattered}: try PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
    )


def _levers(failure: Failure, recipe: Recipe, budget: int, world: int) -> Iterator[str]:
    """What to change, the cheapest first, with what it is now."""
    train, parallel = recipe.train, recipe.parallel
    if failure.phase == "evaluation":
        tokens = recipe.evaluate.tokens_per_batch
        yield f"evaluate.tokens_per_batch={max(1, tokens // 2)} (now {tokens}): the same answers, a little slower"
    elif failure.phase != "step":
        smaller = max(budget // 2, recipe.data.pack_tokens or recipe.data.max_tokens)
        if smaller < budget:
            yield f"train.tokens_per_microbatch={smaller} (now {budget}): the same result, a little slower"
        if recipe.data.batches == "padded":
            yield "data.batches=padding-free (now padded): the same result, no memory for padding"
        if train.activation_checkpointing == "none" and parallel.tensor == 1 and not train.compile:
            yield "train.activation_checkpointing=selective: the same result, half of the activations, a little slower"
        if train.activation_checkpointing != "full" and not train.compile:
            yield "train.activation_checkpointing=full: the same result, about a third more time"
        movable = not train.compile and parallel.strategy != "zero3" and torch.cuda.is_available()
        if movable and not train.offload_activations:
            yield "train.offload_activations=true: the same result, activations wait in CPU memory"
        if smaller >= budget and failure.load.longest:
            shorter = max(1, failure.load.longest // 2)
            yield f"data.max_tokens={shorter} (now {recipe.data.max_tokens}): longer rows lose their end"
    if recipe.adapter.kind == "none" and recipe.optim.weights == "float32":
        yield "adapter.kind=lora (now none): gradients and optimizer state of a small part of the weights only"
    elif recipe.adapter.kind != "none" and recipe.quantization.kind == "none" and parallel.tensor == 1:
        yield "quantization.kind=nf4 (now none): a quarter of a bfloat16 base's memory"
    if recipe.optim.state == "float32" and parallel.tensor == 1 and not parallel.strategy.startswith("zero"):
        yield "optim.state=int8 (now float32): a quarter of the optimizer state"
    if parallel.strategy in ("none", "ddp"):
        more = "" if world > 1 else "torchrun with several GPUs and "
        yield f"{more}parallel.strategy=fsdp (now {parallel.strategy}): every rank holds a part only"
    if parallel.offload == "none":
        yield "parallel.strategy=zero3 with parallel.offload=optimizer, or =parameters: CPU memory instead, much slower"


def _size(n_bytes: float) -> str:
    """As people write it."""
    for unit in ("bytes", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "bytes" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} GiB"


def halved(budget: int, portion: Portion) -> int | None:
    """Half of `budget`, but not less than the longest pack of `portion`; None when that is no less than `budget`."""
    lengths = portion.rows.lengths
    longest = max(int(sum(lengths[row] for row in pack)) for pack in portion.packs)
    smaller = max(budget // 2, longest)
    return smaller if smaller < budget else None


def free(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def relieve(
    failure: Failure,
    sharded: Sharded,
    portion: Portion,
    recipe: Recipe,
    budget: int,
    largest: Load,
    step: int,
    folder: Path,
    notify: Callable[[str], None],
) -> int:
    """A smaller `tokens_per_microbatch` for this step and all that follow, also of a resumed run.

    Raises OutOfMemory when the recipe wants that, when it would not help, and under several ranks: the others wait in a
    collective that this one has left, so the run must start again, and then does with the smaller budget.
    """
    ranks = sharded.layout.ranks
    problem = explain(failure, recipe, budget, largest, ranks.world, ranks.rank, step)
    smaller = halved(budget, portion)
    if recipe.train.on_oom == "stop":
        raise problem
    if smaller is None or failure.load.rows == 1:
        raise OutOfMemory(f"{problem}. train.on_oom=halve cannot help: one row or pack is a microbatch by itself")
    _remember(folder / NOTE, smaller, budget, step, ranks.rank)
    if ranks.world > 1:
        raise OutOfMemory(
            f"{problem}. train.on_oom=halve: continued with --resume (or by torchrun --max-restarts) the run takes "
            f"{smaller} tokens a microbatch"
        )
    free(sharded.device)
    notify(
        f"step {step}: out of memory at {failure.load.tokens:,} tokens; from here on train.tokens_per_microbatch is "
        f"{smaller} (was {budget}), tokens per step stay as they are"
    )
    return smaller


def budget_of(recipe: Recipe, folder: Path, notify: Callable[[str], None]) -> int:
    """`tokens_per_microbatch` to start with: the recipe's, or what running out of memory halved it to in this run."""
    wanted = recipe.train.tokens_per_microbatch
    if recipe.train.on_oom == "stop":
        return wanted
    noted = on_main(lambda: _noted(folder / NOTE))
    if noted is None or noted >= wanted:
        return wanted
    notify(f"train.tokens_per_microbatch is {noted} instead of {wanted}: this run was out of memory before ({NOTE})")
    return noted


def _noted(path: Path) -> int | None:
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["tokens_per_microbatch"])
    except FileNotFoundError:
        return None


def _remember(path: Path, smaller: int, budget: int, step: int, rank: int) -> None:
    """Written beside and moved there: several ranks may run out of memory in the same step, and write the same."""
    values = {"tokens_per_microbatch": smaller, "was": budget, "step": step, "rank": rank}
    partial = path.with_name(f".{path.name}.{rank}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
