"""What the licences of a base model and of its data ask of whoever passes the tuned model on.

The table holds what each licence says of itself; nothing here is legal advice. What is not in the table is said to be
unknown, never taken for permissive.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ingot.errors import RecipeError

# Obligation -> what it asks, in one sentence.
OBLIGATIONS = {
    "notice": "pass on the licence's text and the notices that came with it",
    "state-changes": "say that it was changed",
    "attribution": "name the authors",
    "non-commercial": "no commercial use",
    "share-alike": "share it under the same licence only",
    "no-derivatives": "changed versions may not be shared",
    "use-policy": "pass on the restrictions of use, and keep to them",
    "name-prefix": "the model's name must begin as the licence says",
    "built-with": "say prominently what it was built with",
    "user-cap": "ask for a licence of one's own above a number of monthly users",
    "no-train-on-output": "its output may not be used to improve other models",
}
ALIASES = {
    "apache 2.0": "apache-2.0",
    "apache2": "apache-2.0",
    "bsd": "bsd-3-clause",
    "cc0": "cc0-1.0",
    "gpl": "gpl-3.0",
    "gpl-3.0-only": "gpl-3.0",
    "gpl-3.0-or-later": "gpl-3.0",
    "agpl-3.0-only": "agpl-3.0",
    "agpl-3.0-or-later": "agpl-3.0",
    "lgpl-3.0-only": "lgpl-3.0",
    "lgpl-3.0-or-later": "lgpl-3.0",
    "llama-2": "llama2",
    "llama-3": "llama3",
    "llama-3.1": "llama3.1",
    "llama-3.2": "llama3.2",
    "llama-3.3": "llama3.3",
    "llama-4": "llama4",
}
CREATIVE_COMMONS = re.compile(r"cc-(?P<kind>by(?:-(?:nc|nd|sa)){0,2})(?:-(?P<number>\d\.\d)(?:-[a-z]{2,3})?)?")
CC_PARTS = {"nc": "non-commercial", "sa": "share-alike", "nd": "no-derivatives"}
LLAMA = "is licensed under the {0} Community License, Copyright © Meta Platforms, Inc. All Rights Reserved."


@dataclass(frozen=True)
class Licence:
    """A licence by the name that Hugging Face's cards use. `binding`: only this very licence may stand on what is made
    from it. `notice`: the sentence it wants to see. `prefix`, `built_with`, `users`: what its obligations name.
    """

    id: str
    url: str
    obligations: tuple[str, ...]
    binding: bool = False
    notice: str = ""
    prefix: str = ""
    built_with: str = ""
    users: int = 0


def _spdx(name: str, *obligations: str, binding: bool = False, file: str | None = None) -> Licence:
    return Licence(name, f"https://spdx.org/licenses/{file or name}.html", obligations, binding)


def _creative_commons(name: str) -> Licence | None:
    """One of Creative Commons, of any version and country, by the parts of its name; None for another name."""
    name = re.sub(r"[\s_-]+", "-", name)
    if (found := CREATIVE_COMMONS.fullmatch(name)) is None:
        return None
    kind, number = found["kind"], found["number"]
    more = [obligation for part, obligation in CC_PARTS.items() if part in kind.split("-")]
    return Licence(
        name,
        "https://creativecommons.org/licenses/" + (f"{kind}/{number}/" if number else ""),
        ("attribution", "state-changes", "notice", *more),
        binding=bool({"share-alike", "no-derivatives"} & {*more}),
    )


def _openrail(name: str, url: str) -> Licence:
    return Licence(name, url, ("notice", "state-changes", "use-policy"), binding=True)


def _llama(name: str, title: str, *more: str, prefix: str = "", built: str = "", url: str) -> Licence:
    obligations = ("notice", "use-policy", "user-cap", *more)
    obligations += ("name-prefix",) if prefix else ()
    obligations += ("built-with",) if built else ()
    notice = f"{title} {LLAMA.format(title)}"
    return Licence(name, url, obligations, True, notice, prefix, built, 700_000_000)


_BIGSCIENCE = "https://huggingface.co/spaces/bigscience/license"
_META = "https://www.llama.com"
TABLE = {
    licence.id: licence
    for licence in (
        _spdx("apache-2.0", "notice", "state-changes", file="Apache-2.0"),
        _spdx("mit", "notice", file="MIT"),
        _spdx("isc", "notice", file="ISC"),
        _spdx("bsd-2-clause", "notice", file="BSD-2-Clause"),
        _spdx("bsd-3-clause", "notice", file="BSD-3-Clause"),
        _spdx("unlicense", file="Unlicense"),
        _spdx("cc0-1.0", file="CC0-1.0"),
        _spdx("odc-by", "attribution", "notice", file="ODC-By-1.0"),
        _spdx("cdla-permissive-2.0", "notice", file="CDLA-Permissive-2.0"),
        _spdx("gpl-3.0", "notice", "state-changes", "share-alike", binding=True, file="GPL-3.0-only"),
        _spdx("agpl-3.0", "notice", "state-changes", "share-alike", binding=True, file="AGPL-3.0-only"),
        _spdx("lgpl-3.0", "notice", "state-changes", "share-alike", binding=True, file="LGPL-3.0-only"),
        _openrail("openrail", "https://www.licenses.ai"),
        _openrail("openrail++", "https://www.licenses.ai"),
        _openrail("creativeml-openrail-m", _BIGSCIENCE),
        _openrail("bigscience-openrail-m", _BIGSCIENCE),
        _openrail("bigscience-bloom-rail-1.0", _BIGSCIENCE),
        _openrail("bigcode-openrail-m", "https://huggingface.co/spaces/bigcode/bigcode-model-license-agreement"),
        Licence(
            "gemma",
            "https://ai.google.dev/gemma/terms",
            ("notice", "state-changes", "use-policy"),
            True,
            "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
        ),
        _llama("llama2", "Llama 2", "no-train-on-output", url=f"{_META}/llama2/license/"),
        _llama(
            "llama3",
            "Meta Llama 3",
            "no-train-on-output",
            prefix="Llama 3",
            built="Built with Meta Llama 3",
            url=f"{_META}/llama3/license/",
        ),
        _llama("llama3.1", "Llama 3.1", prefix="Llama", built="Built with Llama", url=f"{_META}/llama3_1/license/"),
        _llama("llama3.2", "Llama 3.2", prefix="Llama", built="Built with Llama", url=f"{_META}/llama3_2/license/"),
        _llama("llama3.3", "Llama 3.3", prefix="Llama", built="Built with Llama", url=f"{_META}/llama3_3/license/"),
        _llama("llama4", "Llama 4", prefix="Llama", built="Built with Llama", url=f"{_META}/llama4/license/"),
    )
}
# How a licence's text begins or what it calls itself -> its name; the first that is found.
TEXTS = (
    (r"llama 4 community license", "llama4"),
    (r"llama 3\.3 community license", "llama3.3"),
    (r"llama 3\.2 community license", "llama3.2"),
    (r"llama 3\.1 community license", "llama3.1"),
    (r"meta llama 3 community license", "llama3"),
    (r"llama 2 community license", "llama2"),
    (r"gemma terms of use", "gemma"),
    (r"attribution-noncommercial-sharealike 4\.0", "cc-by-nc-sa-4.0"),
    (r"attribution-noncommercial-noderivatives 4\.0", "cc-by-nc-nd-4.0"),
    (r"attribution-noncommercial 4\.0", "cc-by-nc-4.0"),
    (r"attribution-sharealike 4\.0", "cc-by-sa-4.0"),
    (r"attribution 4\.0 international", "cc-by-4.0"),
    (r"cc0 1\.0 universal", "cc0-1.0"),
    (r"gnu affero general public license\s+version 3", "agpl-3.0"),
    (r"gnu lesser general public license\s+version 3", "lgpl-3.0"),
    (r"gnu general public license\s+version 3", "gpl-3.0"),
    (r"apache license,?\s+version 2\.0", "apache-2.0"),
    (r"mit license", "mit"),
)
LICENCE_FILES = ("LICENSE", "LICENCE", "COPYING")
POLICY_FILES = ("USE_POLICY", "ACCEPTABLE_USE", "PROHIBITED_USE")
FILES = (*LICENCE_FILES, "NOTICE", *POLICY_FILES)
MOST_TEXT_BYTES = 1 << 20


@dataclass(frozen=True)
class Part:
    """What a model was made from. `role`: base or data. `licence`: a name as its card writes it, None where it says
    nothing. `files`: its own licence texts and notices.
    """

    role: str
    name: str
    licence: str | None
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Terms:
    """Under which terms a tuned model may be passed on. `licence`: as a card writes it; None where nobody said.

    `obligations`: name -> the parts that ask for it. `unknown`: parts whose licence nobody said or is not in the table.
    `waiver`: who let a conflict pass and why, with the conflicts in `waived`.
    """

    licence: str | None
    parts: tuple[Part, ...]
    obligations: dict[str, list[str]] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    waived: tuple[str, ...] = ()
    waiver: str | None = None

    def record(self) -> dict[str, Any]:
        """As plain values, without a path of this machine."""
        parts = [{"role": part.role, "name": part.name, "license": part.licence or "unknown"} for part in self.parts]
        found: dict[str, Any] = {"license": self.licence or "unknown", "parts": parts}
        found |= {"obligations": self.obligations, "unknown": list(self.unknown)}
        return found | ({"waiver": self.waiver, "waived": list(self.waived)} if self.waiver else {})

    def known(self) -> list[Licence]:
        """What the table has on the parts and on the model itself, each once."""
        names = [*(part.licence for part in self.parts), self.licence]
        found = [licence for name in names if (licence := lookup(name)) is not None]
        return list(dict.fromkeys(found))


def lookup(name: str | None) -> Licence | None:
    """The licence of that name, as SPDX or Hugging Face write it; None where the table has none."""
    if name is None:
        return None
    plain = name.strip().lower()
    return TABLE.get(ALIASES.get(plain, plain)) or _creative_commons(plain)


def detect(text: str) -> str | None:
    """Which licence a text is, by what it calls itself at its beginning; None where that is none of the table's."""
    head = " ".join(text[:3000].lower().split())
    return next((name for pattern, name in TEXTS if re.search(rf"\b{pattern}\b", head)), None)


def front_matter(folder: Path) -> dict[str, Any]:
    """What the card of a model or of a data set says in its head; empty without one."""
    card = folder / "README.md"
    try:
        text = card.read_text(encoding="utf-8")
        found = yaml.safe_load(text.split("---\n", 2)[1]) if text.startswith("---\n") else None
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def is_called(path: Path, names: tuple[str, ...]) -> bool:
    """Whether a file's name begins with one of `names`."""
    return path.name.upper().replace("-", "_").startswith(names)


def texts_in(folder: Path) -> tuple[Path, ...]:
    """Licence texts and notices that lie in `folder` itself."""
    if not folder.is_dir():
        return ()
    return tuple(
        path
        for path in sorted(folder.iterdir())
        if is_called(path, FILES)
        and path.suffix.lower() in ("", ".txt", ".md", ".pdf")
        and path.is_file()
        and path.stat().st_size <= MOST_TEXT_BYTES
    )


def part_of(role: str, name: str, folder: Path | None, stated: str | None = None) -> Part:
    """A part as its folder describes it: what was `stated`, else its card, else the text of its licence."""
    files = texts_in(folder) if folder is not None else ()
    card = front_matter(folder) if folder is not None and stated is None else {}
    said = stated or card.get("license")
    if isinstance(said, list):
        said = said[0] if len(said) == 1 else None
    if said in (None, "other"):
        said = card.get("license_name") or next(filter(None, map(_detected, files)), said)
    return Part(role, name, None if said is None else str(said), files)


def _detected(path: Path) -> str | None:
    """The licence that a file is the text of: notices and policies name licences of other things, too."""
    if not is_called(path, LICENCE_FILES) or path.suffix.lower() == ".pdf":
        return None
    return detect(path.read_text(encoding="utf-8", errors="replace"))


def merge(parts: Sequence[Part], stated: str | None, name: str, waiver: str | None = None) -> Terms:
    """The terms of a model called `name`, made from `parts` and licensed as `stated` (None: as its base is).

    Raises RecipeError for what the licences of the parts do not allow, unless it is waived; also for a waiver of
    nothing.
    """
    obligations: dict[str, list[str]] = {}
    unknown = []
    for part in parts:
        licence = lookup(part.licence)
        if licence is None:
            unknown.append(f"{part.role} {part.name}" + (f": {part.licence}" if part.licence else ""))
            continue
        for obligation in licence.obligations:
            obligations.setdefault(obligation, []).append(f"{part.role} {part.name} ({licence.id})")
    conflicts = [*_conflicts(parts, stated), *_names(parts, name)]
    if conflicts and waiver is None:
        key, value, fix = conflicts[0]
        raise RecipeError(key, value, f"{fix}; or let it pass by name: package.license_waiver: 'NAME: REASON'")
    if waiver is not None and not conflicts:
        raise RecipeError("package.license_waiver", waiver, "there is no conflict to waive; remove it")
    base = next((part.licence for part in parts if part.role == "base"), None)
    said = stated or base
    if stated is None and "non-commercial" in obligations and not _has(base, "non-commercial"):
        said = "other"  # the data add what the base's licence does not say
    texts = tuple(fix for _, _, fix in conflicts)
    known = lookup(said)
    return Terms(known.id if known else said, tuple(parts), obligations, tuple(unknown), texts, waiver)


def _has(name: str | None, obligation: str) -> bool:
    licence = lookup(name)
    return licence is not None and obligation in licence.obligations


def _conflicts(parts: Sequence[Part], stated: str | None) -> list[tuple[str, Any, str]]:
    """(field, value, fix) for each licence that does not allow what the recipe states."""
    found: list[tuple[str, Any, str]] = []
    mine = lookup(stated)
    for part in parts:
        licence = lookup(part.licence)
        if licence is None:
            continue
        of = f"the {part.role} {part.name} is under {licence.id}"
        if part.role == "base" and "no-derivatives" in licence.obligations:
            found.append(("model.source", part.name, f"{of}, and a tuned model may not be shared; choose another base"))
        if stated is None:
            continue
        if "non-commercial" in licence.obligations and not _has(stated, "non-commercial"):
            fix = f"{of}, which allows no commercial use; use package.license: {licence.id}, or other {part.role}"
            found.append(("package.license", stated, fix))
        # Whether share-alike of data reaches a model trained on them is unsettled: it is listed, and stops nothing.
        elif part.role == "base" and licence.binding and (mine is None or mine.id != licence.id):
            fix = f"{of}, which stays on what is made from it; use package.license: {licence.id}, or another base"
            found.append(("package.license", stated, fix))
    return found


def _names(parts: Sequence[Part], name: str) -> list[tuple[str, Any, str]]:
    wanted = [(part, it) for part in parts if (it := lookup(part.licence)) is not None and it.prefix]
    plain = re.sub(r"[-_ .]+", "", name).lower()
    return [
        ("package.name", name, f"{licence.id} of {part.role} {part.name} asks for a name that begins with "
         f"{licence.prefix!r}: package.name: {licence.prefix.replace(' ', '-')}-{name}")
        for part, licence in wanted
        if not plain.startswith(re.sub(r"[-_ .]+", "", licence.prefix).lower())
    ]  # fmt: skip
