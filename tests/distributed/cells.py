"""Trains small cells on this rank; run as a script by several ranks, imported for the run on one rank to compare with.

    python cells.py CELLS.json OUT     (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment)

A cell is {"name", "model", "sections" of its recipe, "resume": name of the folder to continue, "stop": step to die
after, "fused": whether fused operations are in it; by default on several ranks only, so that they are compared with one
rank's logits, "carried": whether to measure what ranks exchange}. Rank 0 leaves OUT/NAME.safetensors (the first
gradient, the final weights) and OUT/NAME.json (losses, norms).
"""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ingot.assembly import fuse
from ingot.data.encoded import IGNORE
from ingot.data.plan import PlannedFeed
from ingot.data.rows import ListRows
from ingot.data.template import Encoded
from ingot.model.adapters import attach_adapter, trainable_tensors
from ingot.model.kinds import KINDS
from ingot.model.pooling import MeanPoolClassifier
from ingot.model.quantize import quantized
from ingot.parallel.recompute import apply_activations
from ingot.parallel.sharded import MODEL
from ingot.parallel.strategies import parallelize
from ingot.ranks import Ranks
from ingot.recipe_io import parse_recipe
from ingot.train.checkpoint import Checkpoints
from ingot.train.loop import Rows, fit

VOCABULARY, HALF, CLASSES = 97, 50, 3
POOLED = ("text-classification", "multi-label-classification")
POINTING = (*POOLED, "token-classification", "question-answering", "fill-mask")
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Died(Exception):
    """A run that is cut off."""


def small_model(kind: str, task: str = "language-modeling", **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, **changes})
    if task in POOLED:
        model: nn.Module = MeanPoolClassifier(AutoModel.from_config(config, attn_implementation="ingot"), CLASSES)
        model.backbone.pooler = None
    else:
        model = KINDS.get(task, AutoModelForCausalLM).from_config(config, attn_implementation="ingot")
    with torch.no_grad():  # biases and norms start as zeros and ones, where many a mistake has no effect
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def random_rows(n: int, seed: int, shortest: int = 4, longest: int = 24, *, two_kinds: bool = False) -> list[Encoded]:
    """Rows of uneven length with a masked prompt of uneven length: what makes means of means go wrong.

    `two_kinds`: every second row has other words than the rest (from HALF on), and only these rows are learned.
    """
    draw = random.Random(seed)
    rows = []
    for number in range(n):
        length = draw.randint(shortest, longest)
        prompt = draw.randint(1, length - 1)
        ids = [draw.randrange(3, VOCABULARY) for _ in range(length)]
        if two_kinds:
            prompt = 1 if number % 2 else length
            ids = [draw.randrange(HALF, VOCABULARY) if number % 2 else draw.randrange(3, HALF) for _ in range(length)]
        rows.append(Encoded(ids, [position >= prompt for position in range(length)], None, f"row:{number}"))
    return rows


def with_targets(rows: list[Encoded]) -> list[Encoded]:
    """Rows for an encoder-decoder: what was a prompt is the source."""
    splits = [(row, row.trainable.index(True)) for row in rows]
    return [replace(row, parts=(prompt, len(row.ids) - prompt)) for row, prompt in splits]


def with_answers(rows: list[Encoded], task: str) -> list[Encoded]:
    """Rows in which something is pointed out: labels that follow from their ids, or tokens to hide."""
    if task == "text-classification":
        return [replace(row, labels=[row.ids[0] % CLASSES]) for row in rows]
    if task == "multi-label-classification":
        return [replace(row, labels=[(row.ids[0] + number) % 2 for number in range(CLASSES)]) for row in rows]
    if task == "token-classification":
        tags = [
            [token % CLASSES if on else IGNORE for token, on in zip(row.ids, row.trainable, strict=True)]
            for row in rows
        ]
        return [replace(row, labels=labels) for row, labels in zip(rows, tags, strict=True)]
    if task == "question-answering":
        return [
            replace(row, labels=[row.trainable.index(True), len(row.ids) - 1], parts=(2, len(row.ids) - 2))
            for row in rows
        ]
    return [replace(row, terms=max(1, round(0.3 * sum(row.trainable)))) for row in rows]


def recipe_of(sections: dict[str, dict[str, Any]]) -> Any:
    base: dict[str, Any] = {
        "name": "cell",
        "model": {"source": "unused"},
        "data": {"train": "unused", "max_tokens": 32, "batches": "padding-free"},
        "objective": {"task": "language-modeling"},
        "adapter": {"kind": "none"},
        "parallel": {"strategy": "none"},
        "optim": {"lr": 3e-3, "weight_decay": 0.1, "clip_grad_norm": 0.5},
        "train": {"max_steps": 6, "tokens_per_step": 120, "tokens_per_microbatch": 48, "evaluate_every_steps": 3},
    }
    return parse_recipe(
        {name: {**base.get(name, {}), **sections.get(name, {})} for name in {**base, **sections} if name != "name"}
        | {"name": "cell"}
    )


def whole(tensor: Tensor) -> Tensor:
    """A copy of all of it, from all ranks that hold parts."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().clone().contiguous()


def same_on_all_ranks(model: nn.Module) -> bool:
    """Whether what every rank holds whole has the same bits on all."""
    plain = [p.detach().flatten() for _, p in trainable_tensors(model) if not isinstance(p, DTensor)]
    if not plain or not dist.is_initialized():
        return True
    least, most = torch.cat(plain), torch.cat(plain)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return torch.equal(least, most)


class Carried(TorchDispatchMode):
    """Sees what ranks exchange: elements of the largest tensor."""

    most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):  # its own operations come by, too
            return NotImplemented
        output = function(*args, **(kwargs or {}))
        if function.namespace in ("c10d", "_c10d_functional"):
            sizes = [leaf.numel() for leaf in tree_leaves((args, output)) if isinstance(leaf, Tensor)]
            self.most = max(self.most, *sizes, 0)
        return output


def carried(sharded: Any) -> list[float]:
    """Elements of the largest tensor that ranks exchange in each microbatch from now on, for each of its tokens."""
    found: list[float] = []
    forward, microbatch, tokens = sharded.forward, sharded.microbatch, [0]

    def counted(**inputs: Any) -> Any:
        tokens.append(inputs["input_ids"].numel())
        return forward(**inputs)

    @contextlib.contextmanager
    def watched(*, last: bool) -> Iterator[None]:
        with Carried() as seen, microbatch(last=last):
            yield
        found.append(seen.most / tokens[-1])

    sharded.forward, sharded.microbatch = counted, watched
    return found


def train(cell: dict[str, Any], out: Path, ranks: Ranks = Ranks()) -> None:  # noqa: B008 (frozen)
    """Train a cell and leave what it did in `out`."""
    recipe = recipe_of(cell["sections"])
    device = torch.device(cell.get("device", "cpu"), ranks.local if "device" in cell else None)
    task = recipe.objective.task
    model = small_model(**cell.get("model", {"kind": "llama"}), task=task)
    if recipe.adapter.kind == "none":
        model.to(getattr(torch, recipe.optim.weights))
    if recipe.quantization.kind != "none":
        model = quantized(model, recipe.quantization)
    model = attach_adapter(model, recipe.adapter, recipe.objective.task, 0)
    with torch.no_grad():  # B starts at zero, and with it the gradient of A
        for name, parameter in trainable_tensors(model):
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    if cell.get("fused", ranks.world > 1):
        fuse(model, recipe, ranks)
    apply_activations(model, recipe.train, device)
    sharded = parallelize(model, ranks, recipe, device, getattr(torch, cell.get("dtype", "float32")))
    exchanged = carried(sharded) if cell.get("carried") else []
    first: dict[str, Tensor] = {}
    update = sharded.step

    def step(lr: float, limit: float | None) -> float:
        if not first:
            first.update((name, whole(p.grad)) for name, p in trainable_tensors(model) if p.grad is not None)
        return update(lr, limit)

    sharded.step = step  # type: ignore[method-assign]
    lengths = cell.get("lengths", {})
    make: Any = with_targets if model.config.is_encoder_decoder else list
    if task in POINTING:
        make = partial(with_answers, task=task)
    rows = Rows(
        PlannedFeed(ListRows(make(random_rows(60, 1, **lengths))), recipe.data, recipe.train),
        ListRows(make(random_rows(7, 2, **lengths))),
        pad_id=0,
        mask_id=3 if task == "fill-mask" else None,
        vocabulary=VOCABULARY,
    )
    checkpoints = Checkpoints(out / cell.get("folder", cell["name"]), ranks, "hash", 3)
    infos: list[Any] = []

    def watch(info: Any) -> None:
        infos.append(info)
        if info.step == cell.get("stop"):
            raise Died

    try:
        fit(sharded, rows, recipe, checkpoints, resume=cell.get("resume", False), on_step=(watch,))
    except Died:
        checkpoints.wait()
    state = sharded.state()
    weights = {f"weight/{name.removeprefix(MODEL)}": whole(state[name]) for name in state if name.startswith(MODEL)}
    same = same_on_all_ranks(model)
    if ranks.main:
        save_file({**{f"grad/{name}": value for name, value in first.items()}, **weights}, out / f"{cell['name']}.st")
        curve = {
            "same": same,
            "carried": max(exchanged, default=0.0),
            "losses": [info.loss for info in infos],
            "norms": [info.grad_norm for info in infos],
            "watched": [info.validation_loss for info in infos if info.validation_loss is not None],
        }
        (out / f"{cell['name']}.json").write_text(json.dumps(curve))


def results(out: Path, name: str) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """(curve, first gradients and final weights) of a cell."""
    return json.loads((out / f"{name}.json").read_text()), load_file(out / f"{name}.st")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(n_ranks: int, cells: list[dict[str, Any]], out: Path, script: str = __file__) -> list[subprocess.Popen[str]]:
    """Start `n_ranks` processes that train `cells` one after another, and what else `script` does."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "cells.json").write_text(json.dumps(cells))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(n_ranks)}
    roots = os.pathsep.join(str(Path(__file__).resolve().parents[2] / name) for name in ("engine", "kernels"))
    env = {**os.environ, **shared, "OMP_NUM_THREADS": "1", "PYTHONPATH": roots}
    command = [sys.executable, "-W", "ignore", script, str(out / "cells.json"), str(out)]
    said = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    numbers = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n_ranks)]
    return [subprocess.Popen(command, env={**env, **number}, **said) for number in numbers]


def finished(processes: list[subprocess.Popen[str]], seconds: float = 400) -> None:
    """Wait for them; the first that fails is shown."""
    try:
        said = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text[-4000:]


def main() -> None:
    cells, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=120))
    rank, world = dist.get_rank(), dist.get_world_size()
    for cell in cells:
        try:
            train(cell, out, Ranks(rank, world, rank, world))
        except Exception as error:
            if not cell.get("fails"):
                traceback.print_exc()
                print("in cell", cell["name"], flush=True)
                os._exit(1)  # the other ranks wait in a collective: they are killed
            if rank == 0:
                (out / f"{cell['name']}.json").write_text(
                    json.dumps({"error": str(error), "kind": type(error).__name__})
                )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
