"""Other processes: a clean environment, a child that answers rows, a server on loopback for the time of a block."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ingot.model.adapted import BASE_VARIABLE

from .case import Case, Mismatch

CHILDREN = Path(__file__).with_name("children")
INHERITED_NOT = ("PYTHON", "MLFLOW_", "HF_", "INGOT_", "TRANSFORMERS_", "AZUREML_")
LAST_LINES = 8
START_TIMEOUT_S = 180.0
PYTHON = Path(sys.executable)


def clean(case: Case, more: Mapping[str, str] | None = None, python: Path = PYTHON) -> dict[str, str]:
    """This process's environment without what could help a package to load: offline, and without writing bytecode."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(INHERITED_NOT)}
    if case.base is not None:  # an adapter's base is part of what is asked
        kept[BASE_VARIABLE] = str(case.base)
    kept |= {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HOME": str(case.scratch / "hf"),
        "TQDM_DISABLE": "1",
    }
    # The package must stay as its manifest says: without __pycache__ folders.
    kept |= {"PYTHONDONTWRITEBYTECODE": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    # Servers start programs of their environment by name.
    kept["PATH"] = os.pathsep.join([str(python.parent), kept.get("PATH", os.defpath)])
    return kept | dict(more or {})


def ask_child(case: Case, script: Path, python: Path = PYTHON, **request: Any) -> Any:
    """Run `script` with `request` (and the package, its task and rows); the JSON that it wrote, mostly records.

    Raises Mismatch with its last lines where it fails.
    """
    name = script.stem
    asked, answered = case.scratch / f"{name}-request.json", case.scratch / f"{name}-response.json"
    about = {"package": str(case.package), "model": str(case.model), "task": case.task, "rows": case.rows}
    request |= {"examples": case.rows}  # as packaging/clean_process.py calls them
    asked.write_text(json.dumps(about | request), encoding="utf-8")
    # -I: nothing from the working directory or the user's own site; -B: no __pycache__ in the package.
    command = [str(python), "-I", "-B", str(script), str(asked), str(answered)]
    with (case.scratch / f"{name}.log").open("w+", encoding="utf-8", errors="replace") as log:
        child = _start(command, case.scratch, clean(case, python=python), log)
        try:
            child.wait(case.timeout_s)
        except subprocess.TimeoutExpired:
            raise Mismatch(f"no answer within {case.timeout_s:g} s") from None
        finally:
            _end(child)
        if child.returncode != 0 or not answered.is_file():
            raise Mismatch(f"exit status {child.returncode}: {last_lines(log.name)}")
    return json.loads(answered.read_text(encoding="utf-8"))


def last_lines(log: str | Path) -> str:
    """The end of a log, in one line."""
    lines = Path(log).read_text(encoding="utf-8", errors="replace").splitlines()
    return " | ".join(line.strip() for line in lines[-LAST_LINES:] if line.strip())[-600:]


def free_port() -> int:
    """A port of loopback that nobody has now, for servers that cannot choose one themselves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextlib.contextmanager
def server(case: Case, name: str, command: list[str], url: str, env: Mapping[str, str] | None = None) -> Iterator[None]:
    """A server for the time of the block, up once GET `url` answers 200. Raises Mismatch where it does not come up."""
    log_file = case.scratch / f"{name}.log"
    with log_file.open("w", encoding="utf-8") as log:
        child = _start(command, case.scratch, clean(case, env, Path(command[0])), log)
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not _up(url):
                if child.poll() is not None:
                    raise Mismatch(f"the server ended with status {child.returncode}: {last_lines(log_file)}")
                if time.monotonic() > deadline:
                    raise Mismatch(f"the server was not up within {START_TIMEOUT_S:g} s: {last_lines(log_file)}")
                time.sleep(0.1)
            yield
        finally:
            _end(child)


def _start(command: list[str], place: Path, env: dict[str, str], log: IO[str]) -> "subprocess.Popen[bytes]":
    """In a process group of its own, which `_end` ends."""
    return subprocess.Popen(
        command, cwd=place, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )


def _end(child: "subprocess.Popen[bytes]") -> None:
    """End a process and those that it started: they are one process group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(5.0)


def _up(url: str) -> bool:
    with contextlib.suppress(OSError), _opener().open(url, timeout=5.0) as response:
        return bool(response.status == 200)
    return False


def post(url: str, body: Any, headers: Mapping[str, str] | None = None, timeout_s: float = 120.0) -> Any:
    """POST JSON to loopback; the answer's JSON. Raises Mismatch for another status than 200."""
    sent = {"Content-Type": "application/json", **(headers or {})}
    request = urllib.request.Request(url, json.dumps(body).encode(), sent)
    try:
        with _opener().open(request, timeout=timeout_s) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        # Servers repeat the request in their errors: of the text only the beginning is told.
        text = error.read().decode("utf-8", "replace")
        raise Mismatch(f"{url.partition('//')[2].partition('/')[2]} answered {error.code}: {text[:160]}") from error
    except OSError as error:
        raise Mismatch(f"no connection to the server: {error}") from error


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy: it is this machine
