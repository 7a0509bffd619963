"""Virtual environments of targets whose packages conflict with ours, kept in a cache and named by what is in them."""

import fcntl
import hashlib
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from ingot.data.cache import default_folder

from .case import Unavailable
from .processes import last_lines

INSTALL_TIMEOUT_S = 900.0
READY = "ingot-ready"


def environment(name: str, requirements: Sequence[str], *, install: bool, beside: bool = True) -> Path:
    """The interpreter of the environment in which `requirements` are installed; it is made where it is missing.

    `beside`: it sees the packages of this interpreter too (torch, transformers, mlflow: gigabytes that need no copy),
    and pip installs on top only what is missing or of another version. Without it, nothing is shared.

    Raises Unavailable where it is missing and `install` is off, or pip cannot install them.
    """
    ours = sysconfig.get_paths()["purelib"]
    parts = [*requirements, sys.version, ours if beside else "alone"]
    root = default_folder() / "conform" / f"{name}-{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:12]}"
    python = root / "bin" / "python"
    if (root / READY).is_file():
        return python
    if not install:
        raise Unavailable(f"its environment ({', '.join(requirements)[:80]}) is not there; run without --no-install")
    root.parent.mkdir(parents=True, exist_ok=True)
    with (root.parent / f"{root.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be making it
        if not (root / READY).is_file():
            _make(root, python, requirements, ours if beside else None)
    return python


def _make(root: Path, python: Path, requirements: Sequence[str], ours: str | None) -> None:
    log = root.with_suffix(".log")
    bare = ["--without-pip"] if ours else []
    _run([sys.executable, "-m", "venv", "--clear", *bare, str(root)], log)
    if ours:
        own = root / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        # Behind the environment's own packages: what is installed there wins.
        (own / "beside.pth").write_text(f"{ours}\n", encoding="utf-8")
    options = ["--disable-pip-version-check", "--no-input", "--no-compile", "--quiet"]
    _run([str(python), "-m", "pip", "install", *options, *requirements], log)
    (root / READY).write_text("\n".join(requirements) + "\n", encoding="utf-8")


def _run(command: list[str], log: Path) -> None:
    # Without PYTHONPATH: pip would take a checkout on it for an installed package.
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    with log.open("a", encoding="utf-8") as file:
        try:
            done = subprocess.run(
                command, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file, timeout=INSTALL_TIMEOUT_S
            )
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"its environment was not installed within {INSTALL_TIMEOUT_S:g} s") from error
    if done.returncode != 0:
        raise Unavailable(f"its environment cannot be installed: {last_lines(log)[-200:]}")
