"""Licence texts and notices as files of a package: what the base model and the data came with, and what they ask."""

import shutil
from pathlib import Path

from ingot.packaging.licences import LICENCE_FILES, OBLIGATIONS, POLICY_FILES, Terms, is_called, lookup

FOLDER = "licences"


def write_notices(folder: Path, terms: Terms, name: str) -> None:
    """Write LICENSE (the base's own text, where the model stays under it), NOTICE, the base's use policy, and
    `licences/` with every file that base and data came with, as they were.
    """
    base = next((part for part in terms.parts if part.role == "base"), None)
    places: list[str] = []
    for number, part in enumerate(terms.parts):
        kept = folder / FOLDER / (part.role if part.role == "base" else f"{part.role}-{number}")
        for path in part.files:
            kept.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, kept / path.name)
            places.append((kept / path.name).relative_to(folder).as_posix())
    if base is not None:
        same = lookup(base.licence) is not None and lookup(base.licence) == lookup(terms.licence)
        for path in base.files:
            if is_called(path, LICENCE_FILES) and same and not (folder / "LICENSE").exists():
                shutil.copyfile(path, folder / "LICENSE")
            elif is_called(path, POLICY_FILES):
                shutil.copyfile(path, folder / path.name)
    (folder / "NOTICE").write_text(_notice(terms, name, places), encoding="utf-8")


def _notice(terms: Terms, name: str, places: list[str]) -> str:
    lines = [name, ""]
    for part in terms.parts:
        licence = lookup(part.licence)
        said = part.licence or "a licence that nobody stated"
        where = f" ({licence.url})" if licence is not None else ""
        if part.role == "base":
            lines.append(
                f"A changed version of {part.name}, which is under {said}{where}: its weights were fine-tuned."
            )
        else:
            lines.append(f"Trained on {part.name}, under {said}{where}.")
    known = terms.known()
    for sentence in dict.fromkeys(text for licence in known for text in (licence.built_with, licence.notice) if text):
        lines += ["", sentence]
    for part in terms.parts:
        for path in part.files:
            if is_called(path, ("NOTICE",)) and path.suffix.lower() != ".pdf":
                text = path.read_text(encoding="utf-8", errors="replace").strip()
                lines += ["", f"--- notice of {part.name} ---", text]
    if places:
        lines += ["", "Licence texts and notices as they came: " + ", ".join(places)]
    return "\n".join(lines) + "\n"


def in_words(terms: Terms) -> str:
    """A part of the model's card, in Markdown: what whoever passes the model on has to do."""
    lines = ["## Licence", "", f"Licence: {terms.licence or 'not stated by anybody'}.", ""]
    lines += [f"- {part.role}: `{part.name}`, {part.licence or 'licence unknown'}" for part in terms.parts]
    if terms.obligations:
        lines += ["", "What the licences above ask for:", ""]
        lines += [f"- {OBLIGATIONS[name]} ({', '.join(who)})" for name, who in terms.obligations.items()]
    sentences = {text: None for licence in terms.known() for text in (licence.built_with, licence.notice) if text}
    if sentences:
        lines += ["", *(f"> {text}" for text in sentences)]
    if terms.unknown:
        lines += ["", f"Unknown, so look yourself: {'; '.join(terms.unknown)}."]
    if terms.waiver:
        lines += ["", f"Waived by {terms.waiver.rstrip('.')}:", "", *(f"- {text}" for text in terms.waived)]
    return "\n".join(lines) + "\n\n"
