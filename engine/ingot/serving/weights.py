"""Where an endpoint's decisions are kept, so that a restart does not forget them."""

import contextlib
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from ingot.serving.endpoint_file import EndpointSection, Mirror

log = logging.getLogger("ingot.serve")


class Weights:
    """A JSON file beside the endpoint's own. It holds for the targets and weights that were configured when it was
    written, what it says of the mirror for the mirror: where somebody has changed those since, theirs count.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, section: EndpointSection) -> dict[str, Any] | None:
        """What was kept for this configuration; None where nothing was."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            versions = found["versions"]
            kept = {
                "versions": {
                    name: {"weight": float(versions[name]["weight"]), "rolled_back": str(versions[name]["rolled_back"])}
                    for name in section.versions
                },
                "mirror": _mirror(section, found),
                "changes": list(found["changes"]),
            }
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.error("%s cannot be read (%s): the configured weights count", self.path, type(error).__name__)
            return None
        if found.get("configured") != _digest(section):
            log.warning("%s was kept for other targets or weights: the configured ones count now", self.path)
            return None
        return kept

    def write(self, section: EndpointSection, state: dict[str, Any]) -> None:
        """Replace the file in one step. A disk that is full costs the memory of the decision, not the decision."""
        kept = {
            "configured": _digest(section),
            "versions": {
                name: {"weight": one["weight"], "rolled_back": one["rolled_back"]}
                for name, one in state["versions"].items()
            },
            "configured_mirror": _plain(section.mirror),
            "mirror": state["mirror"],
            "changes": state["changes"],
        }
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        try:
            with partial.open("w", encoding="utf-8") as file:
                json.dump(kept, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path)
        except OSError as error:
            log.error("%s cannot be written (%s): a restart begins with the configured weights", self.path, error)
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def _mirror(section: EndpointSection, found: dict[str, Any]) -> Mirror | None:
    """What was kept, where the configured one is still the same. Raises ValueError."""
    if "mirror" not in found or found.get("configured_mirror") != _plain(section.mirror):
        return section.mirror
    kept = None if found["mirror"] is None else Mirror.model_validate(found["mirror"])
    if kept is not None and kept.version not in section.versions:
        raise ValueError("mirror.version")
    return kept


def _plain(mirror: Mirror | None) -> dict[str, Any] | None:
    return None if mirror is None else mirror.model_dump()


def _digest(section: EndpointSection) -> str:
    text = json.dumps({name: [one.target, one.weight] for name, one in section.versions.items()}, sort_keys=True)
    return hashlib.sha256(f"{section.name}\n{text}".encode()).hexdigest()
