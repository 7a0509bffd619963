"""A process that was seen before: alive, dead, or another one with its id."""

import subprocess
import sys

from ingot.launch.process import alive, born, myself


def test_a_process_until_it_ends():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        seen = myself() | {"pid": process.pid, "born": born(process.pid)}
        assert alive(seen)
        assert not alive(seen | {"born": "1"})
        assert not alive(seen | {"machine": "another"})
        process.kill()
        process.wait()
    assert not alive(seen)
    assert born(process.pid) == ""


def test_myself():
    assert alive(myself())
