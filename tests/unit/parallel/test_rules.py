"""The table of rules: what it turns away and with which words, and that nothing allowed is forgotten."""

import pytest

from ingot.errors import MissingPackage, RecipeError
from ingot.parallel import rules
from ingot.parallel.rules import RULES, Cell, broken, cells, check
from ingot.ranks import Ranks
from ingot.recipe_io import parse_recipe


def recipe(**sections):
    base = {"name": "a", "model": {"source": "x"}, "data": {"train": "x", "batches": "padding-free"}}
    return parse_recipe({**base, "parallel": {"strategy": "ddp"}, **sections})


def ranks(world: int) -> Ranks:
    return Ranks(0, world, 0, world)


TURNED_AWAY = {
    "8 bits under zero": (
        2,
        {"parallel": {"strategy": "zero2"}, "optim": {"state": "int8"}},
        "optim.state",
        "use fsdp",
    ),
    "bfloat16 adapters": (2, {"optim": {"weights": "bfloat16"}}, "optim.weights", "adapter.kind=none"),
    "bfloat16 and cut": (
        2,
        {"parallel": {"strategy": "ddp", "tensor": 2}, "adapter": {"kind": "none"}, "optim": {"weights": "bfloat16"}},
        "optim.weights",
        "use fsdp",
    ),
    "compiled and recomputed": (
        2,
        {"train": {"compile": True, "activation_checkpointing": "selective"}},
        "train.compile",
        "activation_checkpointing=none",
    ),
    "compiled and offloaded": (
        2,
        {"train": {"compile": True, "offload_activations": True}},
        "train.compile",
        "use one of",
    ),
    "compiled zero": (2, {"parallel": {"strategy": "zero3"}, "train": {"compile": True}}, "train.compile", "use ddp"),
    "selective and cut": (
        2,
        {"parallel": {"strategy": "ddp", "tensor": 2}, "train": {"activation_checkpointing": "selective"}},
        "train.activation_checkpointing",
        "activation_checkpointing=full",
    ),
    "offloaded zero3": (
        2,
        {"parallel": {"strategy": "zero3"}, "train": {"offload_activations": True}},
        "train.offload_activations",
        "use fsdp",
    ),
    "several models": (2, {"parallel": {"strategy": "none"}}, "parallel.strategy", "use auto or ddp"),
    "one rank": (1, {}, "parallel.strategy", "torchrun --nproc-per-node"),
    "context does not divide": (3, {"parallel": {"strategy": "ddp", "context": 2}}, "parallel.context", "divide"),
    "tensor does not divide": (1, {"parallel": {"strategy": "none", "tensor": 2}}, "parallel.tensor", "must divide"),
    "shard_ranks without hsdp": (
        2,
        {"parallel": {"strategy": "fsdp", "shard_ranks": 2}},
        "parallel.shard_ranks",
        "use parallel.strategy=hsdp",
    ),
    "shard_ranks do not divide": (
        3,
        {"parallel": {"strategy": "hsdp", "shard_ranks": 2}},
        "parallel.shard_ranks",
        "must divide",
    ),
    "full over nf4": (
        2,
        {"quantization": {"kind": "nf4"}, "adapter": {"kind": "none"}},
        "quantization.kind",
        "adapter.kind=lora",
    ),
    "nf4 cut by tensor": (
        2,
        {"quantization": {"kind": "nf4"}, "parallel": {"strategy": "ddp", "tensor": 2}},
        "quantization.kind",
        "use fsdp",
    ),
    "zero cut by tensor": (2, {"parallel": {"strategy": "zero2", "tensor": 2}}, "parallel.tensor", "use fsdp or ddp"),
    "copies cut by tensor": (4, {"parallel": {"strategy": "hsdp", "tensor": 2}}, "parallel.tensor", "use fsdp"),
    "optimizer of ddp": (2, {"parallel": {"strategy": "ddp", "offload": "optimizer"}}, "parallel.offload", "zero1"),
    "parameters of zero2": (
        2,
        {"parallel": {"strategy": "zero2", "offload": "parameters"}},
        "parallel.offload",
        "zero3 and fsdp",
    ),
    "padded lines": (
        2,
        {"parallel": {"strategy": "ddp", "context": 2}, "data": {"train": "x", "batches": "padded"}},
        "parallel.context",
        "data.batches=padding-free",
    ),
    "classes on a shared line": (
        2,
        {"parallel": {"strategy": "ddp", "context": 2}, "objective": {"task": "text-classification"}},
        "parallel.context",
        "context=1",
    ),
    "a teacher of a part of a line": (
        2,
        {"parallel": {"strategy": "ddp", "context": 2}, "objective": {"method": "distillation", "teacher": "x"}},
        "parallel.context",
        "the teacher is whole",
    ),
    "packed classes": (
        2,
        {"data": {"train": "x", "batches": "packed"}, "objective": {"task": "text-classification"}},
        "data.batches",
        "use padding-free",
    ),
}


@pytest.mark.parametrize("name", TURNED_AWAY)
def test_turns_away_with_field_and_fix(name: str) -> None:
    world, sections, field, fix = TURNED_AWAY[name]
    with pytest.raises(RecipeError) as caught:
        check(recipe(**sections), ranks(world))
    assert caught.value.field == field
    assert fix in str(caught.value)


def test_every_rule_turns_something_away() -> None:
    hit = set()
    for world, sections, _, _ in TURNED_AWAY.values():
        try:
            check(recipe(**sections), ranks(world))
        except RecipeError as error:
            hit |= {rule.because for rule in RULES if rule.because in str(error)}
    assert hit == {rule.because for rule in RULES}


def test_allowed_cells_pass_and_are_many() -> None:
    found = list(cells())
    assert len(found) == len({cell.name for cell in found}) > 200
    assert all(broken(cell) is None for cell in found)
    assert {cell.strategy for cell in found} == {"none", "ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3"}
    assert {cell.strategy for cell in cells(quantization="nf4", context=2)} >= {"ddp", "fsdp"}


def test_a_package_that_is_not_there_is_named(monkeypatch) -> None:
    sections = {"parallel": {"strategy": "zero2"}}
    check(recipe(**sections), ranks(2))
    monkeypatch.setattr(rules, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="pip install deepspeed"):
        check(recipe(**sections), ranks(2))


def test_names_tell_cells_apart() -> None:
    assert Cell("fsdp", quantization="nf4", context=2).name == "fsdp lora nf4 padding-free context2"
    assert Cell("ddp", adapter="none", batches="packed").name == "ddp full packed"
