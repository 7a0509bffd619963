"""Four ranks that share rows, lines and matrices at once: the same losses, gradients and model as one rank."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

LORA = {"adapter": {"kind": "lora", "rank": 4}}
HEAD = {"adapter": {"kind": "lora", "rank": 4, "targets": ["lm_head", "q_proj"]}}
EVEN = {"vocab_size": 98, "tie_word_embeddings": False}  # ranks share the vocabulary, which is 97 elsewhere
FEW = {"train": {"tokens_per_step": 10}}  # one row a step: all groups but one have nothing to add


def cell(
    name: str, strategy: str, context: int = 1, tensor: int = 1, kind: str = "llama", **more: Any
) -> dict[str, Any]:
    parallel = {"strategy": strategy, "context": context, "tensor": tensor, **more.pop("parallel", {})}
    sections = {"parallel": parallel, **more.pop("sections", {})}
    model = {"kind": kind, **({"head_dim": 8} if kind == "qwen3" else {}), **more.pop("model", {})}
    return {"name": name, "model": model, "sections": sections, **more}


CELLS = [
    cell("rows and lines", "ddp", context=2),
    cell("rows and lines, adapters", "ddp", context=2, sections=LORA),
    cell("rows and lines, few", "ddp", context=2, sections=FEW),
    cell("rows and lines, fsdp", "fsdp", context=2),
    cell("rows and lines, hsdp", "hsdp", context=2, parallel={"shard_ranks": 2}),
    cell("rows and lines, fsdp, adapters", "fsdp", context=2, sections=LORA),
    cell("lines, more ranks than key heads", "ddp", context=4, sections={"data": {"batches": "packed"}, **LORA}),
    cell("lines of two or three tokens", "ddp", context=4, lengths={"shortest": 2, "longest": 3}, sections=FEW),
    cell("rows and matrices", "ddp", tensor=2),
    cell("rows and matrices, adapters", "ddp", tensor=2, sections=LORA),
    cell("rows and matrices, few", "ddp", tensor=2, sections=FEW),
    cell("rows and matrices, norms of heads", "ddp", tensor=2, kind="qwen3"),
    cell("rows and matrices, fsdp", "fsdp", tensor=2),
    cell("rows and matrices, fsdp, adapters", "fsdp", tensor=2, sections=LORA),
    cell("rows and matrices, fsdp, few", "fsdp", tensor=2, sections=FEW),
    cell("rows and matrices, fsdp, norms of heads", "fsdp", tensor=2, kind="qwen3"),
    cell("rows and matrices, of the vocabulary", "ddp", tensor=2, model=EVEN),
    cell("rows and matrices, of the vocabulary, fsdp", "fsdp", tensor=2, model=EVEN),
    cell("rows and matrices, of the vocabulary, fsdp, few", "fsdp", tensor=2, model=EVEN, sections={**FEW, **HEAD}),
    cell("lines and matrices, of the vocabulary", "ddp", context=2, tensor=2, model=EVEN, sections=HEAD),
    cell("lines and matrices", "ddp", context=2, tensor=2),
    cell("lines and matrices, adapters", "ddp", context=2, tensor=2, sections=LORA),
    cell("lines and matrices, fsdp", "fsdp", context=2, tensor=2),
    cell("lines and matrices, none", "none", context=2, tensor=2),
]
ZERO = [cell(f"rows and lines, {name}", name, context=2) for name in ("zero2", "zero3")]


@pytest.fixture(scope="session")
def ran(compared: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compared(4, [*CELLS, *ZERO], tmp_path_factory.mktemp("four"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [cell["name"] for cell in CELLS])
def test_four_ranks_train_as_one(ran: Any, name: str) -> None:
    ran(name)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [cell["name"] for cell in ZERO])
def test_four_ranks_train_as_one_by_deepspeed(ran: Any, name: str) -> None:
    ran(name, gradients=False)  # deepspeed keeps them to itself


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_each_of_four_ranks_reads_its_part(trainer: ModuleType, tmp_path: Path) -> None:
    trainer.finished(trainer.launch(4, [], tmp_path, str(Path(__file__).with_name("tensor_models.py"))), seconds=1500)
    cases = json.loads((tmp_path / "found.json").read_text())
    assert len(cases) == 5
    for name, found in cases.items():
        assert (found["weights"], found["buffers"], found["in parts"]) == (0, 0, True), name
        assert found["gradients"] < 1e-5, name
        assert found["steps"] < 1e-4, name
        assert found["held"] < (0.3 if name.startswith("cut") else 0.6), name
