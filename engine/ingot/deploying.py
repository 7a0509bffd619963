"""What `ingot serve` is given -> what is served: every target found, and allowed to be served."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ingot.errors import NotPromoted, RecipeError, ServeError
from ingot.model.source import model_folder
from ingot.packaging.registry import fetched
from ingot.promoting import Clearance, parse_override, require_promotion
from ingot.recipe import Model
from ingot.replaying import stored_rows
from ingot.serving.endpoint_file import EndpointSection, endpoint_of_flags, named, read_endpoint
from ingot.serving.fleet import Fleet, Target, named_models
from ingot.stages import servable


def assemble(
    models: Sequence[str | Path] = (),
    *,
    adapters: Sequence[str] = (),
    endpoint: str | None = None,
    versions: Sequence[str] = (),
    mirror: str | None = None,
    weights: Path | None = None,
    replay: int = 0,
    override: str | None = None,
) -> tuple[Fleet, list[Clearance]]:
    """What is served, and why it may be. `models`, `adapters` and `versions` as the command line has
    them: `TARGET` or `NAME=TARGET`, `NAME=FOLDER`, `VERSION=TARGET:WEIGHT`; `endpoint`: a file, or what
    `versions` are called together.

    Raises ServeError, NotPromoted, and what opening a target raises. Nothing is loaded yet.
    """
    section, allowed = _section(endpoint, versions, mirror), _Allowed(override)
    if not models and section is None:
        raise ServeError("MODEL", "", "name what to serve, or an endpoint of several versions: --endpoint")
    if adapters and replay:
        raise ServeError("--replay", replay, "adapters have no stored answers; leave --replay out, or serve a package")
    found = tuple(allowed.target(*named(str(text)), replay) for text in models)
    of = {} if section is None else {it: allowed.target(it, one.target, replay) for it, one in section.versions.items()}
    if weights is None and endpoint is not None and Path(endpoint).is_file():
        weights = Path(endpoint).with_suffix(".state.json")
    fleet = Fleet(found, _adapters(adapters), section, of, weights)
    named_models(fleet)
    allowed.check_used()
    return fleet, allowed.cleared


def _section(endpoint: str | None, versions: Sequence[str], mirror: str | None) -> EndpointSection | None:
    if endpoint is None:
        if versions or mirror:
            raise ServeError("--version", (*versions, mirror)[0], "needs a name for all versions: --endpoint NAME")
        return None
    if Path(endpoint).is_file() or Path(endpoint).suffix in (".yaml", ".yml"):
        if versions or mirror:
            fix = "the file says versions and mirror; leave out --version and --mirror"
            raise ServeError("--endpoint", endpoint, fix)
        return read_endpoint(Path(endpoint))
    return endpoint_of_flags(endpoint, list(versions), mirror)


def _adapters(texts: Sequence[str]) -> Mapping[str, Path]:
    found: dict[str, Path] = {}
    for text in texts:
        name, folder = named(text)
        if name is None:
            raise ServeError("--adapter", text, "write NAME=FOLDER")
        if name in found:
            raise ServeError("--adapter", text, f"there are two adapters {name!r}; give each its own name")
        found[name] = Path(folder)
    return found


class _Allowed:
    """Why each target may be served. One override serves all that need it."""

    def __init__(self, override: str | None) -> None:
        self.override, self.cleared = override, list[Clearance]()
        self._first: Path | None = None  # that a policy could speak of

    def target(self, name: str | None, source: str, replay: int) -> Target:
        """The folder behind `source`. Raises NotPromoted."""
        if "://" in source:  # a foundation model: nobody has measured it, so that no policy is asked
            if replay:
                raise ServeError("--replay", replay, f"{source} has no stored answers; leave --replay out")
            return Target(model_folder(Model(source=source), Path.cwd()), name or source.rpartition("/")[2])
        given = fetched(source) if source.startswith("models:/") else Path(source)
        cleared, place = self._require(given), servable(given)
        self.cleared.append(cleared)
        if place != given and (place / "MLmodel").is_file():  # a run's package is what it was when it was written
            packaged = self._require(place)
            if (packaged.status, packaged.sentence) != (cleared.status, cleared.sentence):
                self.cleared.append(packaged)
        return Target(place, name, stored_rows(given, replay) if replay else ())

    def _require(self, place: Path) -> Clearance:
        self._first = self._first or place
        try:
            return require_promotion(place)
        except NotPromoted:
            if self.override is None:
                raise
            return require_promotion(place, self.override)

    def check_used(self) -> None:
        """Raise RecipeError for an override that nothing needed."""
        if self.override is None:
            return
        given = parse_override(self.override)
        if self._first is None:
            fix = "there is nothing to override (a foundation model has no policy); remove it"
            raise RecipeError("--override", self.override, fix)
        made = [it.override for it in self.cleared if it.override is not None]
        if given not in [(it.name, it.reason) for it in made]:
            require_promotion(self._first, self.override)
