"""A user's script around `ingot.finetune` whose rank gets a signal once the run has logged some steps.

python faulty.py RECIPE OUTPUT [SIGNAL STEPS]: the process that first finds the file OUTPUT.armed, is rank 1 and sees
STEPS lines of metrics sends itself SIGNAL. All ranks get the same arguments; a restart finds no file any more.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import ingot
from ingot.launch.detect import detect
from ingot.progress import Progress


def plant(output: Path, number: signal.Signals, steps: int) -> None:
    armed = output.with_suffix(".armed")
    while armed.exists():
        for path in output.glob("*/metrics.jsonl"):
            if path.read_bytes().count(b"\n") >= steps:
                armed.unlink()
                os.kill(os.getpid(), number)
        time.sleep(0.005)


def main(recipe: str, output: str, *fault: str) -> None:
    if fault and detect(os.environ).rank == 1:
        arguments = (Path(output), signal.Signals[fault[0]], int(fault[1]))
        threading.Thread(target=plant, args=arguments, daemon=True).start()
    loaded = ingot.load_recipe(recipe, [f"output={output}"])
    try:
        ingot.finetune(loaded, home=Path(recipe).parent, progress=Progress())
    except ingot.IngotError as error:
        print(f"raised {type(error).__name__}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(*sys.argv[1:])
