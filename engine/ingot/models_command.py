"""`ingot models`: the registry of packages."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ingot.command import Debug, Json, Override, guarded, out
from ingot.display import short

if TYPE_CHECKING:  # mlflow is for the verbs, not for their help
    from ingot.packaging.versions import ModelVersion, Registry

models = typer.Typer(
    help="Register packages, and give them aliases that their verdict allows.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
Store = Annotated[
    str | None,
    typer.Option(
        help="The registry's address. None: MLFLOW_REGISTRY_URI, MLFLOW_TRACKING_URI, else runs/mlflow.db.",
        show_default=False,
    ),
]
Reference = Annotated[
    str, typer.Argument(metavar="MODEL", help="NAME or NAME/latest (its newest version), NAME/VERSION or NAME@ALIAS.")
]
Alias = Annotated[str, typer.Option(help="The alias, such as champion.", show_default=False)]


def _registry(store: str | None) -> "Registry":
    from ingot.registering import open_registry

    return open_registry(store)


@models.command()
def register(
    package: Annotated[Path, typer.Argument(metavar="PACKAGE", help="A package, or a run's folder.")],
    name: Annotated[
        str | None, typer.Option(help="Its name there. None: the package's own.", show_default=False)
    ] = None,
    alias: Annotated[str | None, typer.Option(help="Also give it this alias.", show_default=False)] = None,
    override: Override = None,
    store: Store = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Register a package as a new version; the same files again are the version that they are.

    Exit code 3: an alias is asked for that its verdict does not allow; nothing is registered.

    Examples:

        ingot models register runs/quickstart-20261124-101500-1a2b3c

        ingot models register runs/quickstart-20261124-101500-1a2b3c/package --name support --alias champion
    """

    def work() -> None:
        from ingot import registering

        made, copied = registering.register(_registry(store), package, name, alias, override)
        if as_json:
            print(json.dumps({**made.as_dict(), "copied_bytes": copied}, ensure_ascii=False))
            return
        out.print(f"registered: {made.uri} ({_copied(copied)})", highlight=False, soft_wrap=True)
        out.print(f"next: ingot models promote {made.name}/{made.version} --alias champion", highlight=False)

    guarded(work, debug)


@models.command("list")
def list_(
    name: Annotated[
        str | None, typer.Argument(help="Only this model, with all its versions.", show_default=False)
    ] = None,
    store: Store = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List models with their newest version, or all versions of one.

    Example:

        ingot models list support
    """

    def work() -> None:
        registry = _registry(store)
        found = registry.newest() if name is None else registry.versions(name)
        if name is not None and not found:
            registry.version(name)
        if as_json:
            print(json.dumps([it.as_dict() for it in found], ensure_ascii=False))
        elif found:
            out.print(_table(found))
        else:
            out.print("nothing is registered; begin with: ingot models register PACKAGE", highlight=False)

    guarded(work, debug)


@models.command()
def show(model: Reference, store: Store = None, as_json: Json = False, debug: Debug = False) -> None:
    """Show a version: verdict, metrics, conformance, and the other forms of its lineage.

    Examples:

        ingot models show support@champion

        ingot models show support/3 --json
    """

    def work() -> None:
        from ingot import registering

        registry = _registry(store)
        version = registering.find(registry, model)
        related = registering.family(registry, version)
        if as_json:
            forms = [it.as_dict() for it in related]
            print(json.dumps({**version.as_dict(), "lineage_versions": forms}, ensure_ascii=False))
            return
        _show(version)
        if len(related) > 1:
            out.print(f"\nforms of lineage {version.lineage}", highlight=False)
            out.print(_table(related))

    guarded(work, debug)


@models.command()
def promote(
    model: Reference,
    alias: Alias,
    override: Override = None,
    store: Store = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Give a version an alias; the version that has it loses it.

    Exit code 3: its promotion verdict is not granted, or its files are not what was registered.

    Examples:

        ingot models promote support/3 --alias champion

        ingot models promote support --alias champion --override "Jane Doe: customer demo, ticket 123"
    """

    def work() -> None:
        from ingot import registering

        version = registering.promote(_registry(store), model, alias, override)
        _result(as_json, version, f"{version.name}@{alias} is version {version.version}")

    guarded(work, debug)


@models.command()
def demote(
    name: Annotated[str, typer.Argument(help="The model's name.")],
    alias: Alias,
    store: Store = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Remove an alias from the version that has it.

    Example:

        ingot models demote support --alias champion
    """

    def work() -> None:
        from ingot import registering

        version = registering.demote(_registry(store), name, alias)
        _result(as_json, version, f"{version.name}@{alias} named version {version.version}, and no version now")

    guarded(work, debug)


@models.command()
def fetch(
    model: Reference,
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.", show_default=False)],
    store: Store = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a version's package to a new folder; its files are what its manifest says.

    Example:

        ingot models fetch support@champion champion
    """

    def work() -> None:
        from ingot import registering

        place, copied = registering.fetch(_registry(store), model, folder)
        if as_json:
            print(json.dumps({"folder": str(place), "copied_bytes": copied}, ensure_ascii=False))
        else:
            out.print(f"fetched: {short(place)} ({_copied(copied)})", highlight=False, soft_wrap=True)

    guarded(work, debug)


def _result(as_json: bool, version: "ModelVersion", text: str) -> None:
    if as_json:
        print(json.dumps(version.as_dict(), ensure_ascii=False))
    else:
        out.print(text, highlight=False, soft_wrap=True)


def _copied(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB copied" if n_bytes else "no byte copied"


def _table(found: "list[ModelVersion]") -> Table:
    table = Table(box=None, header_style="bold")
    for column in ("model", "aliases", "task", "form", "promotion", "created"):
        table.add_column(column, no_wrap=column == "model")
    for it in found:
        plain = it.as_dict()
        aliases = " ".join(f"@{alias}" for alias in it.aliases)
        shown = (f"{it.name}/{it.version}", aliases, plain["task"], plain["form"], plain["promotion"]["status"])
        table.add_row(*(Text(text or "") for text in shown), plain["created"][:16].replace("T", " "))
    return table


def _show(version: "ModelVersion") -> None:
    plain: dict[str, Any] = version.as_dict()
    table = Table(box=None, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    facts = {key: plain[key] for key in ("uri", "created", "source", "task", "form", "lineage", "manifest", "override")}
    promotion = plain["promotion"]
    facts |= {"aliases": " ".join(f"@{it}" for it in version.aliases), "promotion": promotion["status"]}
    facts |= {"verdict": promotion["sentence"]}
    facts |= {f"metric {name}": value for name, value in plain["metrics"].items()}
    facts |= {f"conformance {name}": value for name, value in plain["conformance"].items()}
    for name, value in facts.items():
        if value:
            table.add_row(Text(name), Text(str(value)))
    out.print(table)
