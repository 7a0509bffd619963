"""Who computes, into how many pieces, with how many warps."""

import pytest
import torch

from ingot_kernels import dispatch
from ingot_kernels.dispatch import uses_triton, warps
from ingot_kernels.head import chunks

HERE = torch.empty(1)


def test_torch_computes_on_a_cpu_unless_the_interpreter_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    assert [uses_triton(impl, HERE) for impl in ("auto", "torch", "triton")] == [False, False, True]  # type: ignore[arg-type]
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="the tensor is on cpu, where Triton runs only with TRITON_INTERPRET=1"):
        uses_triton("triton", HERE)
    monkeypatch.setattr(dispatch, "INSTALLED", False)
    assert not uses_triton("auto", HERE)
    with pytest.raises(ValueError, match="the package triton is not installed"):
        uses_triton("triton", HERE)
    with pytest.raises(ValueError, match="impl = 'cuda': use auto, triton or torch"):
        uses_triton("cuda", HERE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("n_rows", "width", "dtype", "sizes"),
    [
        (4096, 32_000, torch.float32, [512] * 8),  # 64 MiB would be 524
        (1000, 32_000, torch.float32, [500, 500]),
        (4096, 128_256, torch.bfloat16, [512] * 8),  # 64 MiB would be 261: products need rows
        (4096, 1_000, torch.float32, [4096]),
        (0, 32_000, torch.float32, []),
    ],
)
def test_pieces_of_logits_have_a_budget_and_512_rows(
    n_rows: int, width: int, dtype: torch.dtype, sizes: list[int]
) -> None:
    assert [part.stop - part.start for part in chunks(n_rows, width, HERE.to(dtype), None)] == sizes


def test_a_thread_holds_sixteen_elements() -> None:
    assert [warps(size) for size in (16, 512, 4096, 8192, 65_536)] == [1, 1, 8, 16, 16]
