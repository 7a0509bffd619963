"""Kills a batch 30 times by signal 9 at random points, then lets it end; run as a script.

    python batch_kills.py MODEL INPUT FOLDER

FOLDER/whole is the output of a batch that nobody killed, FOLDER/killed the other; prints as JSON how many buckets are
done after each kill. A process that has imported everything forks the batches: the imports would take most of the time.
"""

import contextlib
import json
import os
import random
import select
import signal
import sys
import time
from pathlib import Path

import torch

import ingot
from ingot.batches import Options
from ingot.batching.local import Rows
from ingot.batching.manifest import NAME, read

torch.set_num_threads(1)


def forked(model: str, rows: str, output: Path, said: int) -> int:
    """A child that answers the batch, and says when it asks the model first."""
    pid = os.fork()
    if pid:
        return pid
    code, answer = 1, Rows.answer

    def speaking(self, entries):
        os.write(said, b"!")
        return answer(self, entries)

    try:
        Rows.answer = speaking
        ingot.batch(model, rows, output, Options(params={"max_tokens": 3}, bucket_rows=2, max_errors="-1"))
        code = 0
    finally:
        os._exit(code)


def main(model: str, rows: str, folder: Path) -> None:
    heard, said = os.pipe()
    draws, left = random.Random(3), []
    whole = forked(model, rows, folder / "whole", said)
    os.read(heard, 1)
    began = time.monotonic()
    assert os.waitpid(whole, 0)[1] == 0
    longest = (time.monotonic() - began) / 20
    os.set_blocking(heard, False)
    for number in range(30):
        with contextlib.suppress(BlockingIOError):
            os.read(heard, 65536)  # what the last one said
        pid = forked(model, rows, folder / "killed", said)
        while number % 3 and not select.select([heard], [], [], 0.01)[0]:  # else it may be killed while it begins
            pass
        time.sleep(draws.uniform(0.0, longest))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        begun = (folder / "killed" / NAME).exists()
        left.append(len(read(folder / "killed")["buckets"]) if begun else 0)
    assert os.waitpid(forked(model, rows, folder / "killed", said), 0)[1] == 0
    print(json.dumps(left))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
