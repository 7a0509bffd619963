"""Processes of this machine: is one that was seen before still alive?"""

import os
import socket
from pathlib import Path


def machine() -> str:
    """The same for processes that see each other's ids: one machine, one container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def born(pid: int) -> str:
    """When process `pid` of this machine began; "" when there is none, or one that waits to be buried.

    An id that the system gave away again has another birth.
    """
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return "" if state in "ZX" else rest[18]
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
    try:  # a system without /proc
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "alive"


def myself() -> dict[str, str | int]:
    """This process, as `alive` knows it again."""
    return {"pid": os.getpid(), "born": born(os.getpid()), "machine": machine()}


def alive(process: dict[str, str | int]) -> bool:
    """Whether what `myself` returned runs on this machine. False for one of another machine: nobody knows."""
    return process["machine"] == machine() and born(int(process["pid"])) == process["born"]
