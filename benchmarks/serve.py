"""Serving on a CPU: Ingot beside `mlflow models serve` (its transformers flavour) and `transformers serve` with
continuous batching.

    python benchmarks/serve.py [--out FILE.json] [--rounds 2] [--loads ...] [--work FOLDER] [--quick]

Every contender serves the same model in float32 in a process of its own, in turn; 16 or 64 clients at once send
requests of mixed lengths over HTTP, each the next one when it has its answer. The encoder is asked questions (as long
as banking77's, 12 words in the mean) and texts (4 to 60 words). Every answer must be the right one, or
nothing is reported and the exit status is 1. Writes FILE.json (per load: requests/s, p50, p95, ratio), and beside it a
table (.md).
"""

import argparse
import asyncio
import contextlib
import importlib.util
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import httpx
from harness import Refused, machine, reported, summary
from serve_work import FULL, QUICK, Size, asking, classifying, expected, prepare, writing

HERE = Path(__file__).resolve().parent
THREADS = 2
START_SECONDS = 180
ANSWER_SECONDS = 900


class Load(NamedTuple):
    """What is sent: by how many clients at once, how many requests, to whom."""

    model: str  # causal or encoder
    make: Callable[[Size, int], list[dict[str, Any]]]
    clients: int
    requests: int
    contenders: tuple[str, ...]
    goals: dict[str, float]  # Ingot's requests/s, as a multiple of a contender's


BOTH, ALL = ("ingot", "mlflow"), ("ingot", "mlflow", "transformers")
LOADS = {
    "causal_16": Load("causal", writing, 16, 96, ALL, {"mlflow": 4.0, "transformers": 1.0}),
    "causal_64": Load("causal", writing, 64, 128, ALL, {"mlflow": 4.0, "transformers": 1.0}),
    "questions_16": Load("encoder", asking, 16, 960, BOTH, {"mlflow": 5.0}),
    "questions_64": Load("encoder", asking, 64, 1920, BOTH, {"mlflow": 5.0}),
    "texts_64": Load("encoder", classifying, 64, 1280, BOTH, {"mlflow": 5.0}),
}


def command(who: str, model: str, folder: Path, port: int) -> list[str]:
    """What starts a contender."""
    binaries = Path(sys.executable).parent
    at = ["--host", "127.0.0.1", "--port", str(port)]
    if who == "ingot":
        return [str(binaries / "ingot"), "serve", str(folder / model), *at]
    if who == "mlflow":
        words = ["models", "serve", "-m", str(folder / f"mlflow-{model}"), "--env-manager", "local"]
        return [str(binaries / "mlflow"), *words, *at]
    # One request more than the clients: pages for all, as Ingot holds them.
    batching = ["--continuous-batching", "--device", "cpu", "--dtype", "float32"]
    return [str(binaries / "transformers"), "serve", str(folder / model), *batching, *at]


ALIVE = {"ingot": "/ready", "mlflow": "/ping", "transformers": "/health"}


@contextlib.contextmanager
def served(who: str, model: str, folder: Path, log: Path) -> Iterator[tuple[str, int]]:
    """A contender that answers: its address and its process. Raises RuntimeError where it does not come up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # MLflow looks for uvicorn
        "OMP_NUM_THREADS": str(THREADS),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT": str(ANSWER_SECONDS),
        "MLFLOW_MODELS_WORKERS": "1",
    }
    with log.open("ab") as out:
        process = subprocess.Popen(
            command(who, model, folder, port), env=environment, stdout=out, stderr=out, start_new_session=True
        )
        try:
            url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
            while not answers(url + ALIVE[who]):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{who} does not come up:\n{log.read_text(errors='replace')[-3000:]}")
                time.sleep(0.25)
            yield url, process.pid
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def answers(url: str) -> bool:
    """Whether it is there."""
    try:
        return httpx.get(url, timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def body(who: str, model: str, folder: Path, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Route and body of a request, as each contender takes it."""
    if model == "encoder":
        if who == "ingot":
            return "/invocations", {"dataframe_records": [request]}
        return "/invocations", {"inputs": [request["text"]]}
    if who == "mlflow":
        return "/invocations", {"inputs": [request["prompt"]], "params": {"max_new_tokens": request["max_tokens"]}}
    name = {"model": str(folder / "causal")} if who == "transformers" else {}
    return "/v1/completions", name | {**request, "temperature": 0.0}


def said(who: str, model: str, request: dict[str, Any], reply: Any) -> str:
    """The text or the label of a reply."""
    if model == "encoder":
        return str((reply["predictions"][0] if isinstance(reply, dict) else reply[0])["label"])
    if who == "mlflow":
        found = reply["predictions"][0] if isinstance(reply, dict) else reply[0]
        return str(found).removeprefix(request["prompt"]).strip()
    return str(reply["choices"][0]["text"]).strip()


async def drive(
    url: str, who: str, load: Load, folder: Path, requests: Sequence[dict[str, Any]]
) -> tuple[float, list[float], list[str]]:
    """Seconds of all, of each, and what was said. `load.clients` ask at once, each again when it has its answer."""
    left = iter(range(len(requests)))
    latencies, replies = [0.0] * len(requests), [""] * len(requests)
    # httpx looks through all its connections for every request: at 64 it took more time than the endpoint (9 ms).
    connections = aiohttp.TCPConnector(limit=load.clients, keepalive_timeout=2)  # MLflow closes them after 5 s
    timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
    async with aiohttp.ClientSession(url, connector=connections, timeout=timeout) as client:

        async def ask() -> None:
            for place in left:
                path, sent = body(who, load.model, folder, requests[place])
                began = time.perf_counter()
                async with client.post(path, json=sent) as answer:
                    text = await answer.text()
                latencies[place] = time.perf_counter() - began
                if answer.status != 200:
                    raise Refused(f"{who} answered {answer.status}: {text[:300]}")
                replies[place] = said(who, load.model, requests[place], json.loads(text))

        started = time.perf_counter()
        await asyncio.gather(*(ask() for _ in range(load.clients)))
        return time.perf_counter() - started, latencies, replies


def measure(who: str, name: str, folder: Path, size: Size, count: int, log: Path) -> dict[str, Any]:
    """One contender under one load. Raises Refused."""
    load = LOADS[name]
    asked = load.make(size, count)
    with served(who, load.model, folder, log) as (url, process):
        warm = load._replace(clients=min(4, load.clients))
        asyncio.run(drive(url, who, warm, folder, asked[:8]))
        seconds, latencies, replies = asyncio.run(drive(url, who, load, folder, asked))
        peak = sum(memory(process, "VmHWM"))
    if load.model == "causal":
        for request, reply in zip(asked, replies, strict=True):
            if reply.split() != expected(request).split():
                raise Refused(f"{name}: {who} wrote {reply[:80]!r} for {expected(request)[:80]!r}")
    return {
        "requests_per_second": count / seconds,
        "p50": statistics.median(latencies),
        "p95": sorted(latencies)[math.ceil(0.95 * count) - 1],
        "peak_memory": peak,
        "said": replies,
    }


def family(process: int) -> list[Path]:
    """The `status` files of a process and of all that it started, also in sessions of their own."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # Behind the name, which may hold anything: the state, then the parent.
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found = {process}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return [Path(f"/proc/{number}/status") for number in sorted(found)]


def memory(process: int, field: str) -> list[int]:
    """Bytes in `field` of each process of a family: VmHWM the peak, VmRSS what is held now."""
    found = []
    for status in family(process):
        with contextlib.suppress(OSError, StopIteration):
            line = next(line for line in status.read_text().splitlines() if line.startswith(field))
            found.append(int(line.split()[1]) * 1024)
    return found


def cell(name: str, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Numbers of one load. Raises Refused where contenders say different things."""
    load = LOADS[name]
    for who in found:
        for place, (one, other) in enumerate(zip(found["ingot"][0]["said"], found[who][0]["said"], strict=True)):
            if one != other:
                raise Refused(f"{name}: request {place} is answered {one[:60]!r} and, by {who}, {other[:60]!r}")
    speeds = {who: [one["requests_per_second"] for one in runs] for who, runs in found.items()}
    ratios = {
        who: [one / other for one, other in zip(speeds["ingot"], speeds[who], strict=True)]
        for who in found
        if who != "ingot"
    }
    return {
        "clients": load.clients,
        "requests": len(found["ingot"][0]["said"]),
        "requests_per_second": {who: summary(speed) for who, speed in speeds.items()},
        "p50": {who: statistics.median(one["p50"] for one in runs) for who, runs in found.items()},
        "p95": {who: statistics.median(one["p95"] for one in runs) for who, runs in found.items()},
        "peak_memory": {who: max(one["peak_memory"] for one in runs) for who, runs in found.items()},
        "ratio": {who: statistics.median(values) for who, values in ratios.items()},
        "spread": {who: [min(values), max(values)] for who, values in ratios.items()},
        "goals": load.goals,
        "rounds": len(found["ingot"]),
    }


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Every contender under every load, in turn; the report. Raises Refused."""
    size = QUICK if args.quick else FULL
    if not (work / "mlflow-encoder/MLmodel").is_file():
        prepare(work, size)
    found: dict[str, dict[str, list[dict[str, Any]]]] = {
        name: {who: [] for who in LOADS[name].contenders} for name in args.loads
    }
    for number in range(args.rounds):
        for name in args.loads:
            load = LOADS[name]
            # Who comes first changes with every round.
            for who in load.contenders[:: 1 if number % 2 == 0 else -1]:
                count = load.clients * 2 if args.quick else load.requests
                one = measure(who, name, work, size, count, work / f"{who}.log")
                found[name][who].append(one)
                told = f"{one['requests_per_second']:.2f} requests/s, p95 {one['p95']:.2f} s"
                print(f"round {number + 1} {name} {who}: {told}", flush=True)
    loads = {name: cell(name, runs) for name, runs in found.items()}
    return {
        "machine": machine(),
        "settings": size._asdict() | {"threads": THREADS, "dtype": "float32"},
        "loads": loads,
        "ratio": {name: one["ratio"] for name, one in loads.items()},
    }


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    hardware, settings = report["machine"], report["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in hardware["versions"].items() if number != "absent")
    lines = [
        "# Serving on a CPU",
        "",
        f"{hardware['cpu']}, {settings['threads']} threads, {settings['dtype']}; {hardware['date']}; {versions}; "
        f"commit {hardware['commit']}. Medians; ratios are within a round. Clients run on the same machine.",
        "",
        "| load | who | requests/s | low to high | p50 s | p95 s | Ingot is | low to high | peak GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in report["loads"].items():
        for who, speed in found["requests_per_second"].items():
            ratio = f"{found['ratio'][who]:.2f}x" if who in found["ratio"] else ""
            spread = "{:.2f} to {:.2f}".format(*found["spread"][who]) if who in found["spread"] else ""
            lines.append(
                f"| {name} ({found['requests']}, rounds: {found['rounds']}) | {who} "
                f"| {speed['median']:.2f} | {speed['low']:.2f} to {speed['high']:.2f} "
                f"| {found['p50'][who]:.3f} | {found['p95'][who]:.3f} | {ratio} | {spread} "
                f"| {found['peak_memory'][who] / 1e9:.2f} |"
            )
    lines += [""]
    for name, found in report["loads"].items():
        for who, goal in found["goals"].items():
            told = "reached" if found["ratio"][who] >= goal else "missed"
            lines.append(f"- {name}: {goal}x the requests/s of {who}: {told} ({found['ratio'][who]:.2f}x)")
            if who == "mlflow":
                told = "reached" if found["p95"]["ingot"] < found["p95"][who] else "missed"
                lines.append(
                    f"- {name}: a lower 95th percentile than {who}: {told} "
                    f"({found['p95']['ingot']:.2f} and {found['p95'][who]:.2f} s)"
                )
    return "\n".join(lines) + "\n"


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results/serve.json")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--loads", nargs="+", default=list(LOADS), choices=list(LOADS))
    parser.add_argument("--work", type=Path, help="keep what is made here instead of in a temporary folder")
    parser.add_argument("--quick", action="store_true", help="tiny models and few requests: does it run at all")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    args = parsed(words)
    for needed in ("mlflow", "httpx", "fastapi"):
        if importlib.util.find_spec(needed) is None:
            print(f"{needed} is not installed: make install", file=sys.stderr)
            return 1
    return 1 if reported(run, args, table) is None else 0


if __name__ == "__main__":
    sys.exit(main())
