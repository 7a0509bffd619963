"""Options of `ingot serve` that say what is served, and how it is kept alive."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from ingot.errors import IngotError, ServeError
from ingot.recipe_serve import Serve
from ingot.runfolder import Run, open_run
from ingot.serving.endpoint_file import named

if TYPE_CHECKING:
    from ingot.serving.channel import Parent

END_S = 15.0  # that a child has to end beyond what its requests have
DEFAULT_PORT = 8000
NAMES = [name for name in Serve.model_fields if name not in ("enabled", "question")]  # of options
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


def setting(name: str) -> Any:
    """The option that is `serve.NAME` of recipes: its help, bounds and default are said there."""
    field = Serve.model_fields[name]
    inner = [it for kind in get_args(field.annotation) for it in getattr(kind, "__metadata__", ())]  # of `int | None`
    parts = [*field.metadata, *(part for it in inner for part in it.metadata)]
    found = {bound: getattr(part, bound) for part in parts for bound in ("gt", "ge", "le") if hasattr(part, bound)}
    return typer.Option(
        help=field.description,
        min=found.get("ge", found["gt"] + 1 if "gt" in found else None),
        max=found.get("le"),
        show_default=False if field.default is None else str(field.default),
    )


def settings(models: Sequence[str], given: Mapping[str, Any]) -> tuple[Serve, str]:
    """How to serve: as `given` (None: it is not), else as the recipe of the run that is served, alone, and a sentence
    where that says something. Raises what opening the run raises.
    """
    given = {name: str(it) if isinstance(it, Path) else it for name, it in given.items() if it is not None}
    run = _run_of(models[0]) if len(models) == 1 else None
    if run is None:
        return Serve().model_copy(update=given), ""
    section, plain = run.recipe.serve, Serve()
    new = [name for name in NAMES if name not in given and getattr(section, name) != getattr(plain, name)]
    said = ", ".join(f"{name}={getattr(section, name)}" for name in new)
    return section.model_copy(update=given), said and f"as the recipe of {run.folder.name} says: {said}"


def _run_of(model: str) -> Run | None:
    """The run that is served, or whose package or model is."""
    target = Path(named(model)[1]).resolve()
    return next((open_run(folder) for folder in (target, target.parent) if (folder / "run.json").is_file()), None)


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


def supervised(section: Serve) -> int:
    """Run this command again as a child, and keep it alive; the exit status. Raises ServeError and IngotError."""
    from ingot.serving.listening import bind, keyring
    from ingot.serving.logs import write_logs
    from ingot.serving.supervisor import supervise

    keyring(section.host, None if section.keys is None else Path(section.keys))
    with bind(section.host, port_of(section)) as listener, tempfile.TemporaryDirectory(prefix="ingot-serve-") as folder:
        os.environ[STATE_VARIABLE] = str(Path(folder) / "state.json")
        write_logs(section.log_format)
        command = [sys.executable, "-m", "ingot", *sys.argv[1:]]
        return supervise(command, listener, drain_s=section.drain + END_S, hung_s=section.hung_after)


def port_of(section: Serve) -> int:
    """Where `ingot serve` listens."""
    return DEFAULT_PORT if section.port is None else section.port
