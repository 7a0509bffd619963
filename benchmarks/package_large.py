"""Memory, time and bytes of packaging a large model: `make bench-package OUT=file.json` (and .md).

    python benchmarks/package_large.py [--gigabytes 4] [--out FILE.json]

Writes a random model of that size in one safetensors file, and packages it in fresh processes: by hard links, cut into
shards of 1 GB, and copied as on a file system without links. Of each: peak resident memory of the process, how much of
it came after the imports, seconds, bytes written. Every tensor of every package is compared with the model's by its
SHA-256. Ends with status 1 where a tensor differs or a peak is over the goal of 300 MB. Needs room for twice the model.

The file is not called packaging.py: beside other scripts it would hide the library of that name from their imports.
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
GOAL_MB = 300
TENSOR_BYTES = 64_000_000
NANO = HERE.parent / "engine" / "ingot" / "catalog" / "nano"
# name -> (largest file in bytes, whether links are refused)
WAYS = {"linked": (5_000_000_000, False), "cut": (1_000_000_000, False), "copied": (5_000_000_000, True)}


def write_model(folder: Path, size: int) -> None:
    """A folder with configuration, tokenizer and `size` random bytes of bfloat16 weights; one tensor in memory."""
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(NANO / name, folder / name)
    (folder / "ingot.json").write_text('{"task": "text-generation"}')
    count = max(1, -(-size // TENSOR_BYTES))
    header = {
        f"layers.{i}.weight": {
            "dtype": "BF16",
            "shape": [TENSOR_BYTES // 2000, 1000],
            "data_offsets": [i * TENSOR_BYTES, (i + 1) * TENSOR_BYTES],
        }
        for i in range(count)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(count):
            file.write(os.urandom(TENSOR_BYTES))


def package_alone(model: Path, out: Path, way: str) -> dict[str, Any]:
    """In a process of its own: package, and say what it took."""
    limit, refused = WAYS[way]
    if refused:

        def no_links(*_: Any) -> None:
            raise OSError(18, "links are refused for this measurement")

        os.link = no_links
    from ingot.packaging import bundle

    bundle._mlflow_pyfunc()
    imported = peak_mb()
    started = time.perf_counter()
    bundle.package_model(
        model,
        out,
        name="large",
        task="text-generation",
        example_input={"input_string": "Hello"},
        metadata={},
        license=None,
        shard_bytes=limit,
    )
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_mb": peak_mb(), "after_imports_mb": peak_mb() - imported}


def peak_mb() -> float:
    """Peak resident memory of this process in 10^6 bytes.

    Linux: of this program alone. getrusage's also counts the process that it was started from.
    """
    status = Path("/proc/self/status")
    if status.exists():
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS counts bytes


def tensor_hashes(folder: Path) -> dict[str, str]:
    """Tensor -> SHA-256 of its bytes, over all files of a folder."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
            for name, tensor in header.items():
                if name != "__metadata__":
                    begin, end = tensor["data_offsets"]
                    file.seek(8 + length + begin)
                    found[name] = hashlib.sha256(file.read(end - begin)).hexdigest()
    return found


def measure(model: Path, place: Path, way: str) -> dict[str, Any]:
    """Package in a fresh process; compare; remove."""
    out = place / way
    command = [sys.executable, str(Path(__file__).resolve()), "--alone", way, str(model), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    files = [path for path in out.rglob("*") if path.is_file()]
    found["bytes_written"] = sum(path.stat().st_size for path in files if path.stat().st_nlink == 1)
    found["weight_files"] = len(list((out / "model").glob("*.safetensors")))
    found["largest_file_bytes"] = max(path.stat().st_size for path in files)
    found["same_tensors"] = tensor_hashes(out / "model") == tensor_hashes(model)
    shutil.rmtree(out)
    return found


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    about = result["machine"]
    lines = [
        "# Packaging a large model",
        "",
        f"{result['model_bytes'] / 1e9:.2f} GB of random bfloat16 weights in one file; each row a fresh process. "
        f"{about['cpu']}, {about['cores']} cores, {about['date']}, commit {about['commit']}; other programs used the "
        "machine too, so seconds say little.",
        "",
        "| way | peak memory, MB | after the imports, MB | bytes written | weight files | seconds | same tensors |",
        "|---|---|---|---|---|---|---|",
    ]
    for way, one in result["ways"].items():
        lines.append(
            f"| {way} | {one['peak_mb']:.0f} | {one['after_imports_mb']:.1f} | {one['bytes_written']:,} | "
            f"{one['weight_files']} | {one['seconds']:.1f} | {'yes' if one['same_tensors'] else 'NO'} |"
        )
    lines += ["", f"Goal: a peak under {GOAL_MB} MB: {'reached' if result['reached'] else 'missed'}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "packaging.json")
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.alone:
        way, model, out = asked.alone
        print(json.dumps(package_alone(Path(model), Path(out), way)))
        return
    from harness import machine

    with tempfile.TemporaryDirectory(prefix="ingot-bench-") as name:
        place = Path(name)
        write_model(place / "model", int(asked.gigabytes * 1e9))
        ways = {way: measure(place / "model", place, way) for way in WAYS}
        size = (place / "model" / "model.safetensors").stat().st_size
    reached = all(one["peak_mb"] < GOAL_MB and one["same_tensors"] for one in ways.values())
    result = {"machine": machine(), "model_bytes": size, "goal_mb": GOAL_MB, "ways": ways, "reached": reached}
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    asked.out.with_suffix(".md").write_text(table(result), encoding="utf-8")
    print(table(result))
    if not reached:
        sys.exit(1)


if __name__ == "__main__":
    main()
