"""Answers a batch on this rank; run as a script by several ranks, or by one.

    python batch_ranks.py MODEL INPUT OUTPUT [--die-after N] [--pause SECONDS]

--die-after: rank 1 is killed by signal 9 in its bucket number N + 1, once: OUTPUT.died says that it was.
--pause: every bucket takes so long more. Each rank writes its buckets to OUTPUT.rank-N.
"""

import argparse
import os
import signal
import time
from pathlib import Path

import ingot
from ingot.batches import Options
from ingot.batching.local import Rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("input")
    parser.add_argument("output")
    parser.add_argument("--die-after", type=int)
    parser.add_argument("--pause", type=float, default=0.0)
    asked = parser.parse_args()
    rank, died, answer = os.environ.get("RANK", "0"), Path(f"{asked.output}.died"), Rows.answer
    buckets = 0

    def counted(self, entries):
        nonlocal buckets
        if rank == "1" and buckets == asked.die_after and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(asked.pause)
        buckets += 1
        Path(f"{asked.output}.rank-{rank}").write_text(str(buckets))
        return answer(self, entries)

    Rows.answer = counted
    options = Options(params={"max_tokens": 3}, bucket_rows=3, max_errors="-1")
    ingot.batch(asked.model, asked.input, asked.output, options)


if __name__ == "__main__":
    main()
