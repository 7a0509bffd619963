"""A process that makes passes through one model for `passes.Processes`: `python -m ingot.serving.pass_process FOLDER`.

Standard input: a line of JSON a pass, [rows, parameters, threads]. Standard output: {"unpadded": whether its passes
compute no padding} or {"refused": why}, then a line a pass: {"answers": ...}, {"input": [field, what is wrong]} or
{"failed": name}. It ends with its input, that is with the server.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from ingot.model.runtime import Runtime
from ingot.model.sampling import InputError
from ingot.model.unpadded import unpad


def main() -> None:
    """Answer until there is no more input."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group, and what runs may end
        signal.signal(number, signal.SIG_IGN)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed is not an answer

    def say(said: dict[str, Any]) -> None:
        out.write(json.dumps(said).encode() + b"\n")
        out.flush()

    try:
        runtime = Runtime.load(Path(sys.argv[1]), "cpu")
    except (OSError, ValueError, KeyError) as error:
        say({"refused": str(error)})
        return
    say({"unpadded": unpad(runtime.model)})
    for line in sys.stdin.buffer:
        say(answered(runtime, *json.loads(line)))


def answered(runtime: Runtime, rows: list[dict[str, Any]], params: dict[str, Any], threads: int) -> dict[str, Any]:
    """One pass."""
    try:
        torch.set_num_threads(threads)
        return {"answers": runtime.answer(rows, params)}
    except InputError as error:
        return {"input": [error.field, str(error)]}
    except Exception as error:
        where = "".join(traceback.format_tb(error.__traceback__))  # the message may hold a part of a request
        print(f"{type(error).__name__}\n{where}", file=sys.stderr, flush=True)
        return {"failed": type(error).__name__}


if __name__ == "__main__":
    main()
