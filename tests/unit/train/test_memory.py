"""Running out of memory, planted: what the message names, and the same losses from smaller microbatches."""

import gc
import json
import re
import weakref

import pytest
import torch

from ingot.errors import OutOfMemory
from ingot.parallel.strategies import parallelize
from ingot.ranks import Ranks
from ingot.train import memory
from ingot.train.memory import NOTE, Failure, Load, budget_of, explain, is_out_of_memory
from ingot.train.objectives import OBJECTIVES

CUDA = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which ..."


def plant(monkeypatch, limit, error=torch.OutOfMemoryError, text=CUDA):
    """Batches of more than `limit` tokens (counting padding) fail; returns the sizes that were tried, and keeps a
    weak reference to each failed batch's logits.
    """
    original, tried, failed = OBJECTIVES["language-modeling"], [], []

    def objective(sharded, batch, divisor, section):
        loss = original(sharded, batch, divisor, section)
        if torch.is_grad_enabled():
            tried.append(batch.ids_BT.numel())
            if tried[-1] > limit:
                failed.append(weakref.ref(loss))
                raise error(text)
        return loss

    monkeypatch.setitem(OBJECTIVES, "language-modeling", objective)
    return tried, failed


CPU = (
    "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate 1024 "
    "bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    ("batches", "error", "text"),
    [
        ("padded", torch.OutOfMemoryError, CUDA),
        ("padding-free", torch.OutOfMemoryError, CUDA),
        ("padding-free", RuntimeError, CPU),
        ("padding-free", MemoryError, ""),
    ],
    ids=["padded", "cuda", "cpu", "python"],
)
def test_halved_run_has_the_losses_of_an_undisturbed_one(
    monkeypatch, row_lists, make_recipe, make_sharded, curve, tmp_path, batches, error, text
):
    recipe = make_recipe(train={"on_oom": "halve", "max_steps": 8}, data={"batches": batches})
    whole = curve(make_sharded(recipe), row_lists, recipe, "whole")
    tried, _ = plant(monkeypatch, 50, error, text)
    said = []
    sharded = make_sharded(recipe)
    losses = curve(sharded, row_lists, recipe, "halved", notify=said.append, folder=tmp_path / "run")
    assert losses == pytest.approx(whole, abs=1e-6)
    assert sum(size > 50 for size in tried) == 1, "batches made ahead are cut again, and the smaller budget stays"
    assert max(size for size in tried if size <= 50) <= 32
    assert said == [
        f"step 1: out of memory at {max(tried)} tokens; from here on train.tokens_per_microbatch is 32 (was 64), "
        "tokens per step stay as they are"
    ]
    note = json.loads((tmp_path / "run" / NOTE).read_text())
    assert note == {"tokens_per_microbatch": 32, "was": 64, "step": 1, "rank": 0}


def test_failed_step_is_freed_before_the_next_try(monkeypatch, row_lists, make_recipe, make_sharded, curve):
    recipe = make_recipe(train={"on_oom": "halve"})
    _, failed = plant(monkeypatch, 50)
    original, alive = memory.free, []

    def free(device):
        gc.disable()  # reference counts alone must do: the traceback is gone
        alive.append(failed[0]() is not None)
        gc.enable()
        original(device)

    monkeypatch.setattr(memory, "free", free)
    curve(make_sharded(recipe), row_lists, recipe)
    assert alive == [False]


def test_resumed_run_starts_with_what_fitted(monkeypatch, row_lists, make_recipe, make_sharded, curve, tmp_path):
    recipe = make_recipe(train={"on_oom": "halve"})
    curve(make_sharded(recipe), row_lists, make_recipe(train={"on_oom": "halve", "max_steps": 3}), "run")
    (tmp_path / "run" / NOTE).write_text(json.dumps({"tokens_per_microbatch": 32}))
    tried, _ = plant(monkeypatch, 50)
    said = []
    curve(make_sharded(recipe), row_lists, recipe, "run", notify=said.append)
    assert max(tried) <= 50
    assert said == [f"train.tokens_per_microbatch is 32 instead of 64: this run was out of memory before ({NOTE})"]
    assert budget_of(make_recipe(), tmp_path / "run", said.append) == 64, "on_oom=stop does what the recipe says"


def test_stop_names_what_grew_and_the_cheapest_lever(monkeypatch, row_lists, make_recipe, make_sharded, curve):
    recipe = make_recipe()
    tried, _ = plant(monkeypatch, 60)
    with pytest.raises(OutOfMemory) as caught:
        curve(make_sharded(recipe), row_lists, recipe)
    message = str(caught.value)
    assert caught.value.exit_code == 1
    assert re.match(r"out of memory in step \d \(forward\): activations grew: ", message)
    assert f"the largest that fitted before had {max(tried[:-1])}" in message
    assert f"this microbatch has {tried[-1]} tokens" in message
    sizes = [p.numel() for p in make_sharded(recipe).plain.parameters()]
    buffers = 2 * 4  # inverse frequencies of 8 numbers a head, and the originals of them
    held = (4 * (sum(sizes) + buffers), 4 * sum(sizes), 4 * (2 * sum(sizes) + len(sizes)))
    weights, gradients, moments = (f"{size / 1024:.1f} KiB" for size in held)
    assert f"weights {weights}, gradients {gradients}, optimizer state {moments}" in message
    levers = ["train.tokens_per_microbatch=32 (now 64)", "data.batches=padding-free (now padded)",
              "train.activation_checkpointing=selective", "train.activation_checkpointing=full",
              "adapter.kind=lora (now none)",
              "optim.state=int8 (now float32)",
              "parallel.strategy=fsdp (now none)", "parallel.offload=optimizer"]  # fmt: skip
    places = [message.index(lever) for lever in levers]
    assert places == sorted(places)
    assert message.endswith("torch says: " + CUDA)


def test_row_alone_in_its_batch_cannot_be_halved(monkeypatch, row_lists, make_recipe, make_sharded, curve):
    recipe = make_recipe(train={"on_oom": "halve"})
    plant(monkeypatch, 23)
    longest = max(len(row.ids) for row in row_lists[0])
    assert longest > 23
    with pytest.raises(OutOfMemory, match="halve cannot help: one row or pack is a microbatch by itself"):
        curve(make_sharded(recipe), row_lists, recipe)


def test_moments_that_do_not_fit_are_no_matter_of_batches(monkeypatch, row_lists, make_recipe, make_sharded, curve):
    recipe = make_recipe(train={"on_oom": "halve"})
    sharded = make_sharded(recipe)

    def step(lr, limit):
        raise torch.OutOfMemoryError(CUDA)

    monkeypatch.setattr(sharded, "step", step)
    with pytest.raises(OutOfMemory, match=r"in step 1 \(step\): the optimizer state grew") as caught:
        curve(sharded, row_lists, recipe)
    assert "tokens_per_microbatch" not in str(caught.value)
    assert "(1) adapter.kind=lora" in str(caught.value)


def test_validation_that_does_not_fit_says_so(monkeypatch, row_lists, make_recipe, make_sharded, curve):
    original = OBJECTIVES["language-modeling"]

    def objective(sharded, batch, divisor, section):
        if not torch.is_grad_enabled():
            raise torch.OutOfMemoryError(CUDA)
        return original(sharded, batch, divisor, section)

    monkeypatch.setitem(OBJECTIVES, "language-modeling", objective)
    recipe = make_recipe(train={"evaluate_every_steps": 2})
    with pytest.raises(OutOfMemory, match=r"in step 2 \(validation\): activations of a validation batch grew"):
        curve(make_sharded(recipe), row_lists, recipe)


@pytest.mark.parametrize(
    ("load", "largest", "said"),
    [
        (Load(900, 3, 300, 50), Load(800, 3, 300, 50), "activations grew"),
        (Load(800, 3, 300, 700), Load(800, 3, 300, 50), "logits grew"),
        (Load(800, 2, 700, 50), Load(800, 3, 300, 50), "attention grew"),
        (Load(700, 3, 300, 50), Load(800, 3, 300, 50), "not the batch"),
        (Load(700, 3, 300, 50), Load(), "no microbatch fitted before"),
    ],
)
def test_term_that_grew(make_recipe, load, largest, said):
    failure = Failure(CUDA, "forward", load, {"weights": 10, "gradients": 1, "optimizer state": 2})
    assert said in str(explain(failure, make_recipe(), 64, largest, 1, 0, 5))


def test_weights_that_fill_the_device_are_told_from_activations(make_recipe):
    held = {"weights": 70 * 2**30, "gradients": 2**20, "optimizer state": 2**21}
    failure = Failure(CUDA, "forward", Load(64, 3, 30, 5), held, activations=2**30)
    text = str(explain(failure, make_recipe(adapter={"kind": "lora"}), 64, Load(), 2, 1, 1))
    assert "on rank 1" in text
    assert "weights are the largest term" in text
    assert "activations 1.0 GiB" in text
    assert "quantization.kind=nf4" in text


def test_errors_that_are_no_lack_of_memory_pass(monkeypatch, row_lists, make_recipe, make_sharded, curve):
    assert not is_out_of_memory(RuntimeError("The size of tensor a (3) must match"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    plant(monkeypatch, 0, ValueError, "a defect")
    recipe = make_recipe(train={"on_oom": "halve"})
    with pytest.raises(ValueError, match="a defect"):
        curve(make_sharded(recipe), row_lists, recipe)


def test_real_allocation_failure_of_a_cpu_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.gpu
def test_device_that_is_full_gets_smaller_batches(row_lists, make_recipe, make_model, curve):
    """A real one: everything but a little is taken, then given to activations a batch at a time."""
    recipe = make_recipe(train={"on_oom": "halve", "tokens_per_microbatch": 64})
    device = torch.device("cuda")
    sharded = parallelize(make_model(), Ranks(), recipe, device, torch.float32)
    whole = curve(sharded, row_lists, recipe, "whole")
    original = OBJECTIVES["language-modeling"]

    def hungry(sharded, batch, divisor, section):
        loss = original(sharded, batch, divisor, section)
        free, _ = torch.cuda.mem_get_info()
        share = batch.ids_BT.numel() / 48 if torch.is_grad_enabled() else 0.0
        filler = torch.empty(int(free * share), dtype=torch.uint8, device=device)
        return loss + 0 * filler[:1].float().sum()

    OBJECTIVES["language-modeling"] = hungry
    try:
        said = []
        sharded = parallelize(make_model(), Ranks(), recipe, device, torch.float32)
        losses = curve(sharded, row_lists, recipe, "full", notify=said.append)
    finally:
        OBJECTIVES["language-modeling"] = original
    assert any("from here on train.tokens_per_microbatch is 32" in line for line in said)
    assert losses == pytest.approx(whole, abs=1e-5)


def test_levers_are_settings_that_go_together(monkeypatch, row_lists, make_recipe, make_sharded, curve):
    recipe = make_recipe(train={"compile": True})
    plant(monkeypatch, 60)
    with pytest.raises(OutOfMemory) as caught:
        curve(make_sharded(recipe), row_lists, recipe)
    message = str(caught.value)
    assert "train.tokens_per_microbatch=32" in message
    assert "activation_checkpointing" not in message and "offload_activations" not in message
