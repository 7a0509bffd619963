"""deepspeed under our verbs, looked at from inside; run as a script by two ranks.

    python zero_ranks.py CELLS.json OUT     (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT in the environment)

Trains the cells as cells.py does, then runs every check below under every stage. Rank 0 leaves OUT/checks.json:
{"stage check": what went wrong, "" for nothing}.
"""

import contextlib
import json
import math
import os
import sys
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import cells
import torch
import torch.distributed as dist
from torch import Tensor

from ingot.assembly import build
from ingot.data.loader import Batch, batches_of, collate
from ingot.data.plan import Cursor, PlannedFeed
from ingot.data.rows import ListRows
from ingot.model.adapters import attach_adapter, trainable_tensors
from ingot.parallel import zero
from ingot.parallel.strategies import parallelize
from ingot.ranks import Ranks
from ingot.train.objectives import next_token

LR, LIMIT, BETA = 1e-3, 0.5, 0.9


class Trainer:
    """A small model under a strategy, stepped by hand. Matrices of one row are among what it trains."""

    def __init__(
        self,
        strategy: str,
        dtype: torch.dtype = torch.float32,
        source: str = "",
        cut: bool = True,
        **adapter: Any,
    ) -> None:
        """`source`: folder to read the model from; with `cut` each rank its rows only."""
        sections = {
            "model": {"source": source or "unused", "dtype": "float32"},
            "adapter": {"kind": "lora", "rank": 1, "alpha": 2.0, **adapter},
            "parallel": {"strategy": strategy},
            # A whole model is built without fused operations, and both ways of reading are to give the same bits.
            "kernels": {"ops": "none"},
            # Adam divides by a gradient's size: with a small eps rounding decides the sign of the smallest updates.
            "optim": {"eps": 1e-4, "weight_decay": 0.1},
        }
        self.recipe, self.fill = cells.recipe_of(sections), None
        if source:
            model, _, self.fill, _ = build(self.recipe, Path(source), (), ranks(), cut=cut)
        else:
            model = attach_adapter(cells.small_model("llama"), self.recipe.adapter, "language-modeling", 0)
        with torch.no_grad():
            for name, parameter in trainable_tensors(model):
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        self.start = {name: parameter.detach().clone() for name, parameter in trainable_tensors(model)}
        self.sharded = parallelize(model, ranks(), self.recipe, torch.device("cpu"), dtype, self.fill)
        feed = PlannedFeed(ListRows(cells.random_rows(60, 1)), self.recipe.data, self.recipe.train)
        self.portions = list(feed.start(Cursor()))

    def learn(self, number: int, scale: float = 1.0, stop: int | None = None) -> float:
        """Gradients of step `number`, times `scale`; `stop` leaves out microbatches from there on. Returns the loss."""
        portion, layout, total = self.portions[number], self.sharded.layout, torch.zeros(())
        parts = batches_of(portion, layout.data_rank, layout.data, 30, flat=True, even=self.sharded.even)
        batches: list[Batch] = [collate(part, 0, flat=True) for part in parts]
        assert len(batches) > 1
        torch.manual_seed(number)
        self.sharded.wrapped.train()
        for index, batch in enumerate(batches[:stop]):
            with self.sharded.microbatch(last=index == len(batches) - 1):
                loss = next_token(self.sharded, batch, portion.divisor, self.recipe.objective)
                self.sharded.backward(loss * scale)
            total += loss.detach()
        dist.all_reduce(total)
        return total.item()

    def step(self, number: int, scale: float = 1.0, limit: float | None = LIMIT) -> tuple[float, float]:
        """(loss, norm)"""
        return self.learn(number, scale), self.sharded.step(LR, limit)

    def state(self) -> dict[str, Tensor]:
        """Copies of whole tensors."""
        return {name: cells.whole(tensor) for name, tensor in self.sharded.state().items()}


def ranks() -> Ranks:
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.get_rank(), dist.get_world_size())


def same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance, msg=lambda text, name=name: name + text)


def check_start_changes_nothing(strategy: str) -> None:
    """deepspeed makes the optimizer's state before the first step: no decay, no counted step."""
    trainer = Trainer(strategy)
    state = trainer.state()
    weights = {name: state[f"model/{name}"] for name in trainer.start}
    rest = [tensor for name, tensor in state.items() if name.startswith("optimizer/")]
    same(weights, trainer.start)
    assert len(rest) == 3 * len(weights)
    assert not any(bool(tensor.any()) for tensor in rest)


def check_steps_are_those_of_ddp(strategy: str) -> None:
    """Clipped, hardly clipped and not at all; dropout; moments and step count too."""
    for adapter, limits in (({}, (0.05, 1e3, None)), ({"dropout": 0.3}, (LIMIT,)), ({"dora": True}, (None, 0.1))):
        found, expected = Trainer(strategy, **adapter), Trainer("ddp", **adapter)
        pairs = [(found.step(n, limit=limit), expected.step(n, limit=limit)) for n, limit in enumerate(limits)]
        states = found.state(), expected.state()
        for (loss, norm), (wanted_loss, wanted_norm) in pairs:
            assert math.isclose(loss, wanted_loss, abs_tol=1e-5), (adapter, loss, wanted_loss)
            assert math.isclose(norm, wanted_norm, rel_tol=1e-5), (adapter, norm, wanted_norm)
        same(*states, tolerance=1e-6)


def check_not_finite_updates_nothing(strategy: str) -> None:
    """One rank's gradient is bad: every rank hears of it, nothing moves, and the next step is as if it had not been."""
    trainer, clean = Trainer(strategy), Trainer(strategy)
    trainer.step(0), clean.step(0)
    before, mine = trainer.state(), dist.get_rank() == 1
    norms = [trainer.step(1, scale=bad if mine else 1.0)[1] for bad in (math.nan, math.inf)]
    after = trainer.state()
    steps = trainer.step(2), clean.step(2)
    states = trainer.state(), clean.state()
    assert not any(math.isfinite(norm) for norm in norms)
    same(after, before)
    assert steps[0] == steps[1]
    same(*states)


def check_dropped_gradients_are_gone(strategy: str) -> None:
    """A whole step's, and those of one that was cut off between microbatches, in a forward and in a backward pass."""
    trainer, clean = Trainer(strategy), Trainer(strategy)
    trainer.step(0), clean.step(0)
    trainer.learn(1)
    trainer.sharded.drop()
    trainer.learn(1, stop=1)
    trainer.sharded.drop()
    steps = [(trainer.step(2), clean.step(2))]
    inside = dict(trainer.sharded.plain.named_modules())["base_model.model.model.layers.1.mlp"]
    for register in (inside.register_forward_hook, inside.register_full_backward_hook):
        handle = register(_run_out_of_memory)
        with contextlib.suppress(torch.OutOfMemoryError):
            trainer.learn(3)
        handle.remove()
        trainer.sharded.drop()
    steps.append((trainer.step(4), clean.step(4)))
    states = trainer.state(), clean.state()
    for found, expected in steps:
        assert found == expected
    same(*states)


def _run_out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("as if")


def check_unused_parameters_get_no_old_gradient(strategy: str) -> None:
    """What takes no part in a step has a gradient of zero, not that of the step before."""
    trainer = Trainer(strategy)
    trainer.step(0)
    layer = dict(trainer.sharded.plain.named_modules())["base_model.model.model.layers.0.mlp.up_proj"]
    [name] = [name for name in trainer.start if "layers.0.mlp.up_proj.lora_B" in name]
    key = f"optimizer/{name}/exp_avg"
    before = trainer.state()[key]
    layer._disable_adapters = True  # not `enable_adapters`, which freezes
    trainer.step(1)
    after = trainer.state()[key]
    assert bool(before.any())
    torch.testing.assert_close(after, BETA * before)


def check_matrix_products_are_of_the_compute_type(strategy: str) -> None:
    """On a GPU deepspeed switches autocast off if it is not told of it. This looks like a GPU's autocast to it."""
    trainer = Trainer(strategy, torch.bfloat16)
    seen: dict[str, torch.dtype] = {}
    for name, module in trainer.sharded.plain.named_modules():
        if name.endswith(("lora_A.default", "up_proj.base_layer", "lm_head")):
            module.register_forward_hook(lambda _module, _inputs, output, name=name: seen.update({name: output.dtype}))
    torch.set_autocast_enabled("cuda", True)
    try:
        trainer.step(0)
    finally:
        torch.set_autocast_enabled("cuda", False)
    state = trainer.state()
    assert seen
    assert set(seen.values()) == {torch.bfloat16}, seen
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def check_weights_read_in_parts_train_as_whole_ones(strategy: str) -> None:
    """ZeRO-3 from a folder: no rank holds the whole model, and matrices are decayed, vectors are not."""
    if strategy != "zero3":
        return  # every rank holds every weight
    folder = Path(sys.argv[2]) / "folder"
    if dist.get_rank() == 0:
        cells.small_model("llama").save_pretrained(folder)
        (folder / "tokenizer.json").write_text("{}")  # never read here
    dist.barrier()
    states = []
    for cut in (True, False):
        trainer = Trainer(strategy, kind="none", source=str(folder), cut=cut)
        assert (trainer.fill is not None) == cut
        trainer.step(0), trainer.step(1)
        states.append(trainer.state())
    same(states[0], states[1])


def checks() -> Iterator[tuple[str, Any]]:
    return ((name.removeprefix("check_"), value) for name, value in globals().items() if name.startswith("check_"))


def main() -> None:
    out = Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    found: dict[str, str] = {}
    default = zero.WHOLE_ELEMENTS, zero.BUCKET_ELEMENTS
    try:
        for cell in json.loads(Path(sys.argv[1]).read_text()):
            # Every parameter is cut, and buckets are full before a layer is through.
            zero.WHOLE_ELEMENTS, zero.BUCKET_ELEMENTS = (0, 500) if cell.get("tight") else default
            cells.train(cell, out, ranks())
        zero.WHOLE_ELEMENTS, zero.BUCKET_ELEMENTS = 100, 500
        for strategy in ("zero1", "zero2", "zero3"):
            for name, check in checks():
                try:
                    check(strategy)
                    found[f"{strategy} {name}"] = ""
                except AssertionError as error:
                    found[f"{strategy} {name}"] = f"{error}\n{traceback.format_exc()}"
    except Exception:
        traceback.print_exc()
        print("in", list(found)[-1:], flush=True)
        os._exit(1)  # the other rank waits in a collective
    if dist.get_rank() == 0:
        (out / "checks.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
