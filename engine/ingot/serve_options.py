"""Options of `ingot serve` that say what is served, and how it is kept alive."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ingot.errors import IngotError, ServeError

if TYPE_CHECKING:
    from ingot.serving.channel import Parent

END_S = 15.0  # that a child has to end beyond what its requests have
Format = Literal["text", "json"]
STATE_VARIABLE = "INGOT_SERVE_STATE"  # from the supervisor to its child: where decisions outlive the child
ADMIN_VARIABLE = "INGOT_ADMIN_KEY"

Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL...",
        help="Packages, runs' folders, Hugging Face folders, models:/NAME/VERSION, ingot:// or hf://; NAME=MODEL calls "
        "one so. The first answers requests that name none.",
        show_default=False,
    ),
]
EngineOf = Annotated[
    Literal["auto", "own", "vllm"],
    typer.Option(
        "--engine",
        help="What runs the models: our own batches, or vLLM. auto: vLLM for models that write, where it is "
        "installed and there is a GPU.",
    ),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        help="NAME=FOLDER of a LoRA adapter over MODEL; requests name it as their model.",
        show_default=False,
    ),
]
EndpointName = Annotated[
    str | None,
    typer.Option(
        "--endpoint", help="A file of versions, weights and rules, or a name for --version.", show_default=False
    ),
]
VersionsOf = Annotated[
    list[str] | None,
    typer.Option("--version", help="VERSION=MODEL:WEIGHT behind --endpoint NAME.", show_default=False),
]
MirrorTo = Annotated[
    str | None,
    typer.Option("--mirror", help="VERSION[:PERCENT] that gets copies of others' requests.", show_default=False),
]
WeightsFile = Annotated[
    Path | None,
    typer.Option(
        "--weights", help="Where changed weights are kept. None: beside the endpoint's file.", show_default=False
    ),
]
Replay = Annotated[
    int, typer.Option("--replay", help="Stored rows that each model must answer equally before it serves.", min=0)
]
AdminRoutes = Annotated[
    bool, typer.Option("--admin", help="Change weights at /admin on this machine, with the key of INGOT_ADMIN_KEY.")
]
Otel = Annotated[
    str | None,
    typer.Option(
        "--otel",
        help="Address of an OpenTelemetry collector (OTLP over HTTP) that gets a span a request. None: as "
        "OTEL_EXPORTER_OTLP_ENDPOINT says.",
        show_default=False,
    ),
]
Supervise = Annotated[
    bool, typer.Option("--supervise/--no-supervise", help="Start the serving process again when it dies.")
]


def admin_key(wanted: bool) -> str | None:
    """The key of /admin; None: it is off. Raises ServeError."""
    key = os.environ.get(ADMIN_VARIABLE, "")
    if wanted and len(key) < 8:
        raise ServeError("--admin", wanted, f"set {ADMIN_VARIABLE} to a secret of 8 characters or more")
    return key if wanted else None


def weights_file(given: Path | None, endpoint: str | None) -> Path | None:
    """Where weights are kept: as given, else (None) beside the endpoint's file, else where the supervisor says."""
    kept = os.environ.get(STATE_VARIABLE)
    if given is not None or endpoint is None or Path(endpoint).is_file() or not kept:
        return given
    return Path(kept)


@contextlib.contextmanager
def refusing(parent: "Parent | None") -> Iterator[None]:
    """Tell the supervisor about an error that a user has to mend: to start again would not help."""
    try:
        yield
    except IngotError as error:
        if parent is not None:
            parent.refuse(error.exit_code)
        raise


def supervised(host: str, port: int, keys: Path | None, log_format: Format, drain_s: float) -> int:
    """Run this command again as a child, and keep it alive; the exit status. Raises ServeError and IngotError."""
    from ingot.serving.listening import bind, keyring
    from ingot.serving.logs import write_logs
    from ingot.serving.supervisor import supervise

    keyring(host, keys)
    with bind(host, port) as listener, tempfile.TemporaryDirectory(prefix="ingot-serve-") as folder:
        os.environ[STATE_VARIABLE] = str(Path(folder) / "state.json")
        write_logs(log_format)
        return supervise([sys.executable, "-m", "ingot", *sys.argv[1:]], listener, drain_s=drain_s + END_S)
