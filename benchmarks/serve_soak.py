"""What an overloaded endpoint does: twice the requests that it can answer, clients that leave or read slowly.

    python benchmarks/serve_soak.py [--out FILE.json] [--minutes 10] [--leavers 1000] [--work FOLDER] [--quick]

Serves the causal model of `serve.py` with `ingot serve`, measures what it answers with 16 clients, then sends twice as
much, whether answers come or not. Every request must be answered rightly, or refused with 429 or 503 and Retry-After;
memory must stay; afterwards everybody is answered again. Otherwise the exit status is 1.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
from harness import Refused, machine
from serve import ANSWER_SECONDS, LOADS, drive, memory, served
from serve_work import FULL, QUICK, Size, expected, prepare, writing

HERE = Path(__file__).resolve().parent
REFUSALS = (429, 503)
Sample = dict[str, Any]  # at (s), bytes, rows
GROWTH = 1.10  # of memory while requests are sent, as it grows once the running batch is full
SAMPLES = 120  # of memory while requests are sent; a window is a tenth of them
FULL_ROWS = 0.9  # of the most rows that ever ran together


async def overload(
    client: httpx.AsyncClient, requests: Sequence[dict[str, Any]], rate: float, seconds: float, process: int
) -> dict[str, Any]:
    """Send `rate` requests a second, whether answers come or not."""
    told: Counter[str] = Counter()
    latencies: list[float] = []
    series: list[Sample] = []
    running: set[asyncio.Task[None]] = set()

    async def one(request: dict[str, Any]) -> None:
        began = time.perf_counter()
        try:
            answer = await client.post("/v1/completions", json=request | {"temperature": 0.0})
        except httpx.HTTPError as error:
            told[type(error).__name__] += 1
            return
        if answer.status_code == 200:
            latencies.append(time.perf_counter() - began)
            right = answer.json()["choices"][0]["text"].split() == expected(request).split()
            told["right" if right else "wrong"] += 1
        elif answer.status_code in REFUSALS and "retry-after" in answer.headers:
            told[f"refused {answer.status_code}"] += 1
        else:
            told[f"status {answer.status_code}"] += 1

    started = time.monotonic()
    ended = threading.Event()
    # A thread: the loop of so many clients may come to nothing else for seconds.
    work = asyncio.to_thread(watch, str(client.base_url), process, seconds / SAMPLES, series, ended)
    watcher = asyncio.create_task(work)
    sent = 0
    while (now := time.monotonic() - started) < seconds:
        if watcher.done():
            await watcher  # what it failed of
        while sent < now * rate:
            task = asyncio.create_task(one(requests[sent % len(requests)]))
            running.add(task)
            task.add_done_callback(running.discard)
            sent += 1
        await asyncio.sleep(0.01)
    await asyncio.gather(*running)
    await asyncio.sleep(2 * seconds / SAMPLES)  # a sample of it at rest
    ended.set()
    await watcher
    return {
        "sent": sent,
        "rate": rate,
        "told": dict(told),
        "p95": sorted(latencies)[int(0.95 * (len(latencies) - 1))] if latencies else None,
        "memory": kept(series, seconds),
        "series": series,
    }


def watch(url: str, process: int, every: float, series: list[Sample], ended: threading.Event) -> None:
    """Append to `series` every so many seconds, until it has ended."""
    started = time.monotonic()
    with httpx.Client(base_url=url, timeout=ANSWER_SECONDS, trust_env=False) as client:
        while not ended.wait(every):
            page = client.get("/metrics").text
            rows = sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith("ingot_running_rows{"))
            size = max(memory(process, "VmRSS"))  # of the process with the model
            series.append({"at": round(time.monotonic() - started, 1), "bytes": size, "rows": int(rows)})


def kept(series: Sequence[Sample], seconds: float) -> dict[str, float | None]:
    """Bytes before, at most and at rest; `full` and `last`: medians of a tenth of the seconds in which requests were
    sent, from when the running batch was first full, and of the last tenth; `growth`: from the one to the other, as it
    would be in all those seconds. None: the batch was not full long enough.
    """
    window, most = seconds / 10, max(one["rows"] for one in series)
    full = next(one["at"] for one in series if one["rows"] >= FULL_ROWS * most)

    def median(start: float) -> float | None:
        found = [one["bytes"] for one in series if start <= one["at"] < start + window]
        return statistics.median(found) if found else None

    first, last, between = median(full), median(seconds - window), seconds - window - full
    growth = None
    if first is not None and last is not None and between >= window:
        growth = (last / first) ** (seconds / between)
    return {
        "before": series[0]["bytes"],
        "full_at": full,
        "full": first,
        "last": last,
        "growth": growth,
        "peak": max(one["bytes"] for one in series),
        "at_rest": series[-1]["bytes"],
    }


async def leaving(client: httpx.AsyncClient, requests: Sequence[dict[str, Any]], count: int) -> int:
    """Clients that leave: half while they wait, half after the first piece of a stream. How many got so far."""

    async def one(number: int) -> bool:
        body = requests[number % len(requests)] | {"temperature": 0.0}
        with contextlib.suppress(httpx.HTTPError, TimeoutError):
            async with asyncio.timeout(0.2 + (number % 7) / 10):
                if number % 2:
                    await client.post("/v1/completions", json=body)
                else:
                    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
                        async for _ in answer.aiter_bytes():
                            return True
            return False
        return True

    left = 0
    for start in range(0, count, 50):
        left += sum(await asyncio.gather(*(one(number) for number in range(start, min(count, start + 50)))))
    return left


async def slowly(port: int, request: dict[str, Any], readers: int, others: Callable[[], Awaitable[float]]) -> float:
    """Seconds that others wait while `readers` clients of streams read nothing of what is sent to them."""
    body = json.dumps(request | {"temperature": 0.0, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    writers = []
    for _ in range(readers):
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.write(head.encode() + b"\r\n\r\n" + body)
        await writer.drain()
        writers.append(writer)
    try:
        return await others()
    finally:
        for writer in writers:
            writer.close()


async def soak(url: str, process: int, folder: Path, size: Size, args: argparse.Namespace) -> dict[str, Any]:
    """All of it, in turn; numbers. Raises Refused."""
    requests = writing(size, 256, seed=1)
    load = LOADS["causal_16"]
    seconds, _, _ = await drive(url, "ingot", load, folder, requests[: 32 if args.quick else 96])
    rate = (32 if args.quick else 96) / seconds
    print(f"16 clients: {rate:.2f} requests/s; now twice that for {args.minutes:g} min", flush=True)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_SECONDS, limits=limits, trust_env=False) as client:

        async def answered() -> float:
            began = time.perf_counter()
            for request in requests[:4]:
                answer = await client.post("/v1/completions", json=request | {"temperature": 0.0})
                if answer.status_code != 200:
                    raise Refused(f"afterwards: {answer.status_code}")
                if answer.json()["choices"][0]["text"].split() != expected(request).split():
                    raise Refused("afterwards: a wrong answer")
            return time.perf_counter() - began

        over = await overload(client, requests, 2 * rate, args.minutes * 60, process)
        print(f"overload: {over['told']}, memory {over['memory']}", flush=True)
        after_overload = await answered()
        left = await leaving(client, requests, args.leavers)
        after_leaving = await answered()
        print(f"{left} of {args.leavers} left; then 4 requests in {after_leaving:.2f} s", flush=True)
        after_slow = await slowly(int(url.rsplit(":", 1)[1]), requests[0], 8, answered)
        ready = (await client.get("/ready")).status_code
    return {
        "sustainable_requests_per_second": rate,
        "overload": over,
        "leavers": {"count": args.leavers, "left": left},
        "four_requests_seconds": {
            "after_overload": after_overload,
            "after_leaving": after_leaving,
            "beside_slow_readers": after_slow,
        },
        "ready": ready,
    }


def faults(found: dict[str, Any]) -> list[str]:
    """What must not be."""
    over = found["overload"]
    wrong = {what: count for what, count in over["told"].items() if what != "right" and not what.startswith("refused ")}
    said = [f"{count} requests: {what}" for what, count in wrong.items()]
    if sum(over["told"].values()) != over["sent"]:
        said.append(f"{over['sent']} requests were sent and {sum(over['told'].values())} ended")
    growth = over["memory"]["growth"]
    if growth is None:
        said.append("the running batch was not full long enough to tell whether memory grows")
    elif growth > GROWTH:
        said.append(f"memory grows to {growth:.3f} of itself while requests are sent to a full batch")
    if found["ready"] != 200:
        said.append(f"/ready says {found['ready']} afterwards")
    return said


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results/serve_soak.json")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--leavers", type=int, default=1000)
    parser.add_argument("--work", type=Path, help="keep what is made here instead of in a temporary folder")
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    args = parser.parse_args(words)
    size = QUICK if args.quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        if not (work / "mlflow-encoder/MLmodel").is_file():
            prepare(work, size)
        try:
            with served("ingot", "causal", work, work / "soak.log") as (url, process):
                found = asyncio.run(soak(url, process, work, size, args))
        except (Refused, RuntimeError) as refusal:
            print(f"refused: {refusal}", file=sys.stderr)
            return 1
    report = {"machine": machine(), "settings": size._asdict() | {"minutes": args.minutes}} | found
    report["faults"] = faults(found)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
