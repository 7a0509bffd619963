"""The address that is served, and who may call there. Without a model or a web framework, for the supervisor."""

import errno
import ipaddress
import os
import socket
from pathlib import Path

from ingot.errors import ServeError
from ingot.serving.keys import KEY_VARIABLE, Keyring


def keyring(host: str, keys: Path | None = None) -> Keyring:
    """Who may call: the key of the environment, and those of the file. An address that others can reach needs one.
    Raises ServeError.
    """
    found = Keyring(keys, os.environ.get(KEY_VARIABLE) or None)
    if not is_loopback(host) and found.open:
        fix = (
            f"others could reach this address: give a file of keys (ingot keys add NAME), set {KEY_VARIABLE} to a "
            "secret that callers must send, or use 127.0.0.1"
        )
        raise ServeError("serve.host", host, fix)
    return found


def is_loopback(host: str) -> bool:
    """Whether a name or address can only mean this machine, whoever resolves it."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, so that a taken port is known before the model is loaded. Port 0: any free one."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise ServeError("serve.host", host, "is not an address of this machine") from error
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            fix = "another program listens there; stop it, choose another port, or use 0 for a free one"
            raise ServeError("serve.port", port, fix) from error
        if error.errno == errno.EACCES:
            raise ServeError("serve.port", port, "needs administrator rights; choose a port above 1023") from error
        raise ServeError("serve.host", host, "is not an address of this machine") from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Where clients reach it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
