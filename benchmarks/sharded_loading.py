"""How much memory a rank needs to load a model that is cut over two: written to benchmarks/results/sharded_loading.md.

    python benchmarks/sharded_loading.py [--layers 4] [--out FILE]

A random Llama is written to a temporary folder. Two gloo ranks load it under parallel.strategy=fsdp, once whole on each
rank and cut then, once each rank its rows only, and read every weight they hold once. A thread of each rank watches
/proc/self/smaps_rollup: anonymous memory is what the rank itself holds, file pages are the mapped checkpoint, which
the kernel drops when it needs room.
"""

import argparse
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RANKS = 2
HIDDEN, WIDE, VOCABULARY, HEADS = 2048, 5632, 32_000, 16


def write_model(folder: Path, layers: int, dtype: torch.dtype) -> int:
    """A Llama folder, one file a layer, so that this process never holds it all. Returns its bytes."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")  # never read here
    outer = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    inner: dict[str, tuple[int, ...]] = {f"self_attn.{n}_proj.weight": (HIDDEN, HIDDEN) for n in "qkvo"}
    inner |= {"mlp.gate_proj.weight": (WIDE, HIDDEN), "mlp.up_proj.weight": (WIDE, HIDDEN)}
    inner |= {"mlp.down_proj.weight": (HIDDEN, WIDE)}
    inner |= {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}
    parts = [outer, *({f"model.layers.{i}.{name}": shape for name, shape in inner.items()} for i in range(layers))]
    places, total = {}, 0
    for number, part in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        tensors = {name: (torch.randn(shape) * 0.02).to(dtype) for name, shape in part.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


class Watch(threading.Thread):
    """Peaks of this process's memory, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.anonymous = self.file = self.resident = 0
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.is_set():
            anonymous, file = memory()
            self.anonymous, self.file = max(self.anonymous, anonymous), max(self.file, file)
            self.resident = max(self.resident, anonymous + file)
            time.sleep(0.02)

    def stop(self) -> None:
        self._ended.set()
        self.join()


def memory() -> tuple[int, int]:
    """(anonymous, file-backed) resident bytes of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    kib = {name: int(value.split()[0]) for name, value in fields.items() if "kB" in value}
    return kib["Anonymous"] << 10, (kib["Rss"] - kib["Anonymous"]) << 10


def load(folder: Path, way: str, adapter: str, out: Path) -> None:
    """What one rank does."""
    import torch.distributed as dist

    from ingot.assembly import build
    from ingot.parallel.strategies import parallelize
    from ingot.ranks import read_ranks
    from ingot.recipe_io import parse_recipe

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = read_ranks()
    recipe = parse_recipe(
        {
            "name": "loading",
            "model": {"source": str(folder), "dtype": "float32"},
            "data": {"train": "unused"},
            "objective": {"task": "language-modeling"},
            "adapter": {"kind": adapter, "rank": 8},
            "parallel": {"strategy": "fsdp"},
        }
    )
    base = memory()
    watch = Watch()
    watch.start()
    started = time.perf_counter()
    model, _, fill = build(recipe, folder, (), ranks, cut=way == "part")
    sharded = parallelize(model, ranks, recipe, torch.device("cpu"), torch.float32, fill)
    seconds = time.perf_counter() - started
    for parameter in sharded.plain.parameters():  # what is mapped comes in when it is read
        parameter.to_local().sum()  # type: ignore[operator]
    watch.stop()
    held = sum(p.to_local().nbytes for p in sharded.plain.parameters())  # type: ignore[operator]
    found = {
        "rank": ranks.rank,
        "seconds": seconds,
        "held": held,
        "anonymous": watch.anonymous - base[0],
        "file": watch.file - base[1],
        "resident": watch.resident - sum(base),
    }
    (out / f"{way}-{ranks.rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measured(folder: Path, way: str, adapter: str, out: Path) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS), "OMP_NUM_THREADS": "1"}
    names |= {"LOCAL_WORLD_SIZE": str(RANKS), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", __file__, "--rank", str(folder), way, adapter, str(out)]
    ranks = [
        subprocess.Popen(command, env={**os.environ, **names, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(RANKS)
    ]
    for process in ranks:
        if process.wait(timeout=900):
            raise SystemExit(f"rank failed with {process.returncode}")
    return [json.loads((out / f"{way}-{rank}.json").read_text()) for rank in range(RANKS)]


def report(rows: list[tuple[str, str, str, dict[str, Any]]], sizes: dict[str, int], date: str) -> str:
    import transformers

    mib = 2**20
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")),
        platform.processor(),
    )
    lines = [
        "# Loading a model that is cut over two ranks",
        "",
        f"{date}; {os.cpu_count()} shared cores of {cpu}, gloo; torch {torch.__version__}, transformers "
        f"{transformers.__version__}. Written by `python benchmarks/sharded_loading.py`.",
        "",
        f"A random Llama, held in float32 ({sizes['model'] / mib:,.0f} MiB), with LoRA (rank 8, "
        f"{sizes['adapter'] / mib:,.0f} MiB) or all of it trainable; the largest tensor takes "
        f"{sizes['tensor'] / mib:,.0f} MiB, a block {sizes['block'] / mib:,.0f} MiB. Peaks above what the process held "
        "before loading, in MiB and as shares of the model, until every weight was read once. `anonymous` is the "
        "rank's own memory; `file` are pages of the mapped checkpoint, which the kernel can drop.",
        "",
        "| files | adapter | way | rank | anonymous | | file | anonymous + file | | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    names = {"whole": "whole, then cut", "part": "its rows only"}
    for files, adapter, way, found in rows:
        size = sizes["model"]
        lines.append(
            f"| {files} | {adapter} | {names[way]} | {found['rank']} | {found['anonymous'] / mib:,.0f} | "
            f"{found['anonymous'] / size:.2f} | {found['file'] / mib:,.0f} | {found['resident'] / mib:,.0f} | "
            f"{found['resident'] / size:.2f} | {found['seconds']:.1f} |"
        )
    lines += [
        "",
        "Where the files hold another type than the recipe asks for, every weight is converted: loading whole takes "
        "the whole model of each rank's own memory. Where the types agree, safetensors maps the files and nothing is "
        "copied before it is cut: even loading whole takes little on a CPU, but a GPU then sees every block whole.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        load(Path(sys.argv[2]), sys.argv[3], sys.argv[4], Path(sys.argv[5]))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sharded_loading.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        rows: list[tuple[str, str, str, dict[str, Any]]] = []
        block = (4 * HIDDEN * HIDDEN + 3 * HIDDEN * WIDE + 2 * HIDDEN) * 4
        adapter = 8 * (4 * 2 * HIDDEN + 3 * (HIDDEN + WIDE)) * args.layers * 4
        sizes = {"tensor": VOCABULARY * HIDDEN * 4, "block": block, "adapter": adapter}
        for dtype in (torch.bfloat16, torch.float32):
            files = str(dtype).removeprefix("torch.")
            folder = Path(temporary) / files
            sizes["model"] = write_model(folder, args.layers, dtype) * 4 // dtype.itemsize
            for kind, way in (("none", "whole"), ("none", "part"), ("lora", "whole"), ("lora", "part")):
                rows += [(files, kind, way, found) for found in measured(folder, way, kind, Path(temporary))]
            shutil.rmtree(folder)
    text = report(rows, sizes, args.date)
    args.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
