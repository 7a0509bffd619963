"""Matrices in oneDNN's order: the same answers, and nobody else's matrices are touched."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ingot.model import packed
from ingot.model.packed import PackedLinear, pack, packs, rounded
from ingot.model.runtime import Runtime
from ingot.model.side_by_side import side_by_side
from ingot.serving.engines import start_engine

needs_packing = pytest.mark.skipif(not packs(), reason="this torch does not pack matrices")


def _kinds(model: nn.Module) -> set[type]:
    return {type(module) for module in model.modules() if type(module) in (nn.Linear, PackedLinear)}


@needs_packing
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 16, 65])
def test_it_multiplies_as_the_plain_layer(rows: int, biased: bool) -> None:
    linear = nn.Linear(24, 40, bias=biased)
    one = PackedLinear(linear)
    states = torch.randn(rows, 5, 24)
    with torch.inference_mode():
        for inputs in (states, states[:, -1:], states.transpose(0, 1), states[0, 0]):
            torch.testing.assert_close(one(inputs), linear(inputs))
    assert torch.equal(one.weight, linear.weight)


def test_few_numbers_of_rows_are_multiplied() -> None:
    assert [rounded(rows) for rows in (1, 2, 15, 16, 17, 64, 65, 1000)] == [1, 2, 15, 16, 18, 64, 72, 1024]
    assert all(rows <= rounded(rows) <= rows * 9 / 8 for rows in range(1, 5000))
    assert len({rounded(rows) for rows in range(1, 1025)}) == 64


@needs_packing
def test_memory_does_not_grow_with_the_numbers_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    met, multiplied = set(), packed._multiplied

    def counted(inputs: torch.Tensor, *others: Any) -> torch.Tensor:
        met.add(inputs.shape[:-1].numel())
        return multiplied(inputs, *others)

    monkeypatch.setattr(packed, "_multiplied", counted)
    linear = nn.Linear(8, 16)
    one, states = PackedLinear(linear), torch.randn(2, 300, 8)
    with torch.inference_mode():
        for tokens in range(1, 301):
            torch.testing.assert_close(one(states[:, :tokens]), linear(states[:, :tokens]))
    assert len(met) < 60


@needs_packing
def test_a_model_says_the_same_and_holds_its_matrices_once(text_folder: Path) -> None:
    plain, model = Runtime.load(text_folder).model, Runtime.load(text_folder).model
    pack(model)
    assert _kinds(model) == {PackedLinear}
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    ids = torch.arange(4, 28).view(3, 8)
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits)


@needs_packing
def test_a_matrix_that_the_embeddings_share_stays(text_folder: Path) -> None:
    model: Any = Runtime.load(text_folder).model
    model.lm_head.weight = model.get_input_embeddings().weight
    pack(model)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert type(model.model.layers[0].mlp.up_proj) is PackedLinear


def test_what_is_not_in_float32_stays(text_folder: Path) -> None:
    model = Runtime.load(text_folder).model.to(torch.bfloat16)
    pack(model)
    assert _kinds(model) == {nn.Linear}


def test_a_layer_that_somebody_listens_to_stays(text_folder: Path) -> None:
    model: Any = Runtime.load(text_folder).model
    model.lm_head.register_forward_hook(lambda *_: None)
    pack(model)
    assert type(model.lm_head) is nn.Linear


def test_a_base_below_adapters_stays(text_folder: Path) -> None:
    runtime, _ = side_by_side(Runtime.load(text_folder), {})
    pack(runtime.model)
    assert _kinds(runtime.model) == {nn.Linear}


@pytest.mark.parametrize("fault", ["absent", "other arguments", "wrong"])
def test_where_torch_does_not_pack_nothing_changes(
    text_folder: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def multiplied(inputs: torch.Tensor, *_: Any) -> torch.Tensor:
        if fault == "wrong":
            return inputs.new_zeros(3, 48)
        raise {"absent": AttributeError, "other arguments": RuntimeError}[fault]

    monkeypatch.setattr(packed, "_multiplied", multiplied)
    model = Runtime.load(text_folder).model
    pack(model)
    assert _kinds(model) == {nn.Linear}


@needs_packing
def test_the_engine_of_a_model_that_writes_packs_it(text_folder: Path) -> None:
    runtime = Runtime.load(text_folder)
    engine = start_engine(runtime)
    engine.close()
    assert _kinds(runtime.model) == {PackedLinear}
