"""Other processes: a clean environment, a program that ends, a child that answers rows, a server for a block's time."""

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
INHERITED_NOT = ("PYTHON", "MLFLOW_", "HF_", "INGOT_", "TRANSFORMERS_", "AZUREML_", "OPENAI_")
LAST_LINES = 8
PYTHON = Path(sys.executable)
OURS = {"PYTHONPATH": str(Path(__file__).parents[2])}
"""For processes of Ingot's own: where this one has it from."""


def clean(
    case: Case, more: Mapping[str, str] | None = None, python: Path = PYTHON, *, gpu: bool = False
) -> dict[str, str]:
    """This process's environment without what could help a package to load: offline, and without writing bytecode.

    Without GPUs too, unless `gpu`: what is expected is computed on the CPU, in float32, and elsewhere numbers differ.
    """
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
    if not gpu:
        kept["CUDA_VISIBLE_DEVICES"] = ""
    # Servers start programs of their environment by name.
    kept["PATH"] = os.pathsep.join([str(python.parent), kept.get("PATH", os.defpath)])
    return kept | dict(more or {})


def ingot(*arguments: str) -> list[str]:
    """The command of one of our own verbs; its environment needs `OURS`."""
    return [str(PYTHON), "-m", "ingot", *arguments]


def run(case: Case, name: str, command: list[str], env: Mapping[str, str]) -> Path:
    """Run a program to its end, and return its log. Raises Mismatch where it fails, or takes longer than the case's
    `timeout_s`.
    """
    path = case.scratch / f"{name}.log"
    with path.open("w", encoding="utf-8") as log:
        child = _start(command, case.scratch, env, log)
        try:
            child.wait(case.timeout_s)
        except subprocess.TimeoutExpired:
            raise Mismatch(_late(case)) from None
        finally:
            _end(child)
    if child.returncode != 0:
        raise Mismatch(f"exit status {child.returncode}: {last_lines(path)}")
    return path


def ask_child(case: Case, script: Path, python: Path = PYTHON, **request: Any) -> Any:
    """Run `script` with `request` (and the package, its task and rows); the JSON that it wrote, mostly records.

    Raises Mismatch with its last lines where it fails.
    """
    name = script.stem
    asked, answered = case.scratch / f"{name}-request.json", case.scratch / f"{name}-response.json"
    about = {"package": str(case.package), "model": str(case.model), "task": case.task, "rows": case.rows}
    # examples: as packaging/clean_process.py calls them.
    request |= {"examples": case.rows, "timeout_s": case.timeout_s}
    asked.write_text(json.dumps(about | request), encoding="utf-8")
    # -I: nothing from the working directory or the user's own site; -B: no __pycache__ in the package.
    log = run(case, name, [str(python), "-I", "-B", str(script), str(asked), str(answered)], clean(case, python=python))
    if not answered.is_file():
        raise Mismatch(f"it wrote no answer: {last_lines(log)}")
    return json.loads(answered.read_text(encoding="utf-8"))


def _late(case: Case) -> str:
    return f"no answer within {case.timeout_s:g} s (--timeout)"


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
def server(
    case: Case, name: str, command: list[str], url: str, env: Mapping[str, str] | None = None, *, gpu: bool = False
) -> Iterator[None]:
    """A server for the time of the block, up once GET `url` answers 200. Raises Mismatch where it does not come up
    within the case's `timeout_s`.
    """
    log_file = case.scratch / f"{name}.log"
    with log_file.open("w", encoding="utf-8") as log:
        child = _start(command, case.scratch, clean(case, env, Path(command[0]), gpu=gpu), log)
        try:
            deadline = time.monotonic() + case.timeout_s
            while not _up(url):
                if child.poll() is not None:
                    raise Mismatch(f"the server ended with status {child.returncode}: {last_lines(log_file)}")
                if time.monotonic() > deadline:
                    raise Mismatch(f"the server was not up within {case.timeout_s:g} s: {last_lines(log_file)}")
                time.sleep(0.1)
            yield
        finally:
            _end(child)


def _start(command: list[str], place: Path, env: Mapping[str, str], log: IO[str]) -> "subprocess.Popen[bytes]":
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


def post(case: Case, url: str, body: Any) -> Any:
    """POST JSON to loopback; the answer's JSON. Raises Mismatch for another status than 200, and for none within the
    case's `timeout_s`.
    """
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with _opener().open(request, timeout=case.timeout_s) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        # Servers repeat the request in their errors: of the text only the beginning is told.
        text = error.read().decode("utf-8", "replace")
        raise Mismatch(f"{url.partition('//')[2].partition('/')[2]} answered {error.code}: {text[:160]}") from error
    except TimeoutError as error:
        raise Mismatch(_late(case)) from error
    except OSError as error:
        raise Mismatch(f"no connection to the server: {error}") from error


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy: it is this machine
