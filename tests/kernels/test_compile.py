"""Every kernel compiles for an A100, H100 and B200, without one: the interpreter takes what the compiler refuses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton.backends.nvidia.compiler")
HERE = Path(__file__).parent
SOURCES = (HERE.parents[1] / "kernels/ingot_kernels").glob("*.py")
KERNELS = {name for path in SOURCES for name in re.findall(r"@jit\ndef (\w+_kernel)\(", path.read_text())}
SHARED = 64 << 10  # bytes that every one of these GPUs has for two programs at a time
SPILLED = 16  # bytes of a thread: a register or two of float32 rotations on a B200, nothing elsewhere


def compiled(capability: int, folder: Path, *dtypes: str) -> list[dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", str(HERE / "compile_kernels.py"), str(capability), *dtypes]
    done = subprocess.run(
        command, env=environment | {"TRITON_CACHE_DIR": str(folder)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("capability", "dtypes"),
    [
        pytest.param(90, ("bfloat16",), id="H100"),
        pytest.param(80, ("bfloat16", "float16", "float32"), id="A100", marks=pytest.mark.slow),
        pytest.param(90, ("float16", "float32"), id="H100-others", marks=pytest.mark.slow),
        pytest.param(100, ("bfloat16", "float16", "float32"), id="B200", marks=pytest.mark.slow),
    ],
)
def test_compiles_within_registers_and_shared_memory(capability: int, dtypes: tuple[str, ...], tmp_path: Path) -> None:
    found = compiled(capability, tmp_path, *dtypes)
    for dtype in dtypes:
        names = {facts["kernel"] for facts in found if facts["dtype"] == dtype}
        assert names == (KERNELS if capability >= 89 else KERNELS - {"_quantize_rows_kernel"})
    for facts in found:
        assert facts["shared"] <= SHARED, facts
        assert 0 <= facts["spilled"] <= SPILLED, facts
