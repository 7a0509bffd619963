"""The form for llama.cpp: its own converter, run as a program, where it is installed."""

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

from ingot.errors import PackageError

CONVERTERS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf")
VARIABLE = "INGOT_GGUF_CONVERTER"
MODEL_FILE = "model.gguf"
LAST_LINES = 10


def find_converter() -> Path:
    """llama.cpp's converter: INGOT_GGUF_CONVERTER, else on the PATH. Raises PackageError with how to get it."""
    given = os.environ.get(VARIABLE)
    found = Path(given) if given else next(filter(None, map(shutil.which, CONVERTERS)), None)
    if found is None or not Path(found).is_file():
        what = f"{VARIABLE}={given} is no file" if given else "llama.cpp's converter is not installed"
        raise PackageError(
            f"package.forms: gguf: {what}; get llama.cpp, pip install gguf, and put convert_hf_to_gguf.py on the PATH "
            f"or its path into {VARIABLE}"
        )
    return Path(found)


def convert(folder: Path, out: Path, kind: str) -> Path:
    """Write the model in `folder` as one GGUF file of type `kind` into `out`; return it. Raises PackageError."""
    converter, target = find_converter(), out / MODEL_FILE
    out.mkdir(parents=True, exist_ok=True)
    command = [str(converter), str(folder), "--outfile", str(target), "--outtype", kind]
    if converter.suffix == ".py":
        command.insert(0, sys.executable)
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace", check=False
    )
    if done.returncode != 0 or not target.is_file():
        last = "\n".join(done.stdout.splitlines()[-LAST_LINES:])
        raise PackageError(f"{converter.name} made no GGUF of this model (exit status {done.returncode}):\n{last}")
    check_gguf(target)
    return target


def check_gguf(path: Path) -> int:
    """How many tensors a GGUF file says it holds. Raises PackageError where it is none, or holds none."""
    with path.open("rb") as file:
        head = file.read(24)
    if len(head) < 24 or head[:4] != b"GGUF":
        raise PackageError(f"{path} is no GGUF file; convert the model again")
    _, tensors, _ = struct.unpack("<IQQ", head[4:])
    if not tensors:
        raise PackageError(f"{path} holds no tensor; convert the model again")
    return int(tensors)
