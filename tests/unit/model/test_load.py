"""What "auto" means, and which settings a machine refuses."""

import pytest
import torch

from ingot.errors import ModelError
from ingot.model import load
from ingot.model.load import resolve_dtype

CPU = torch.device("cpu")


def test_auto_is_float32_on_a_cpu():
    assert resolve_dtype("auto", CPU) == torch.float32


def test_bfloat16_without_units_is_refused_and_names_the_override(monkeypatch):
    monkeypatch.setattr(load, "cpu_has_bf16", lambda: False)
    with pytest.raises(ModelError, match=r"no bfloat16 units.*model\.dtype=float32"):
        resolve_dtype("bfloat16", CPU)


def test_bfloat16_with_units_is_taken(monkeypatch):
    monkeypatch.setattr(load, "cpu_has_bf16", lambda: True)
    assert resolve_dtype("bfloat16", CPU) == torch.bfloat16


@pytest.mark.parametrize(
    ("flags", "expected"), [("fpu avx512f avx512_bf16", True), ("fpu amx_bf16", True), ("fpu avx2 avx512f", False)]
)
def test_reads_the_cpus_flags(monkeypatch, flags, expected):
    monkeypatch.setattr(load.platform, "system", lambda: "Linux")
    monkeypatch.setattr(load.Path, "read_text", lambda *_, **__: f"processor: 0\nflags\t\t: {flags}\n")
    assert load.cpu_has_bf16() is expected
