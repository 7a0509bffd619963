"""Licences: what base and data ask for reaches the package, and what they forbid stops it."""

from pathlib import Path

import pytest
import yaml
from every_task import packaged

from ingot.errors import RecipeError
from ingot.packaging.bundle import Origin
from ingot.packaging.licences import OBLIGATIONS, TABLE, Part, detect, lookup, merge, part_of
from ingot.packaging.notices import write_notices


def _base(licence: str | None, *files: Path) -> Part:
    return Part("base", "org/base", licence, files)


def _data(licence: str | None) -> Part:
    return Part("data", "rows.jsonl", licence)


def test_the_table_names_known_obligations_only() -> None:
    assert {name for licence in TABLE.values() for name in licence.obligations} <= set(OBLIGATIONS)
    for licence in TABLE.values():
        assert bool(licence.prefix) == ("name-prefix" in licence.obligations)
        assert bool(licence.users) == ("user-cap" in licence.obligations)
        assert licence.url.startswith("https://")


@pytest.mark.parametrize(
    ("written", "known"),
    [("Apache-2.0", "apache-2.0"), ("GPL-3.0-only", "gpl-3.0"), ("llama-3.1", "llama3.1"), ("cc0", "cc0-1.0")],
)
def test_a_licence_is_known_by_both_spellings(written: str, known: str) -> None:
    licence = lookup(written)
    assert licence is not None
    assert licence.id == known


@pytest.mark.parametrize(
    ("written", "asks", "binding"),
    [
        ("cc-by-1.0", set(), False),
        ("CC-BY-2.5", set(), False),
        ("cc-by-sa-2.1-jp", {"share-alike"}, True),
        ("cc-by-nc-2.0", {"non-commercial"}, False),
        ("CC BY-NC 4.0", {"non-commercial"}, False),
        ("cc-by-nc", {"non-commercial"}, False),
        ("cc-by-nc-sa-2.0", {"non-commercial", "share-alike"}, True),
        ("cc-by-nc-nd-2.0", {"non-commercial", "no-derivatives"}, True),
        ("cc-by-nd-nc-1.0", {"non-commercial", "no-derivatives"}, True),
        ("cc-by-nd-3.0-igo", {"no-derivatives"}, True),
    ],
)
def test_creative_commons_are_known_by_the_parts_of_their_names(written: str, asks: set[str], binding: bool) -> None:
    licence = lookup(written)
    assert licence is not None and licence.binding == binding
    assert set(licence.obligations) == {"attribution", "state-changes", "notice"} | asks


@pytest.mark.parametrize("written", ["cc", "cc-by-xx-4.0", "cc-by-nc-4", "cc-nc-4.0", "cc-by-4.0-and-mit"])
def test_other_names_are_none_of_creative_commons(written: str) -> None:
    assert lookup(written) is None


def test_an_early_version_that_allows_no_commercial_use_stays_so() -> None:
    with pytest.raises(RecipeError, match=r"allows no commercial use; use package\.license: cc-by-nc-2\.0"):
        merge([_base("cc-by-nc-2.0")], "mit", "tuned")
    licence = lookup("cc-by-nc-sa-2.5")
    assert licence is not None and licence.url == "https://creativecommons.org/licenses/by-nc-sa/2.5/"


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("\n      Apache License\n   Version 2.0, January 2004", "apache-2.0"),
        ("MIT License\n\nCopyright (c) 2024", "mit"),
        ("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT", "llama3.1"),
        ("META LLAMA 3 COMMUNITY LICENSE AGREEMENT", "llama3"),
        ("Attribution-NonCommercial 4.0 International", "cc-by-nc-4.0"),
        ("GNU GENERAL PUBLIC LICENSE\n   Version 3, 29 June 2007", "gpl-3.0"),
        ("All rights reserved.", None),
        ("We permit licensees to read this.", None),
    ],
)
def test_a_text_is_recognised_by_what_it_calls_itself(text: str, known: str | None) -> None:
    assert detect(text) == known


def test_obligations_of_base_and_data_are_united() -> None:
    terms = merge([_base("apache-2.0"), _data("cc-by-4.0")], "apache-2.0", "tuned")
    assert terms.licence == "apache-2.0"
    assert terms.obligations["attribution"] == ["data rows.jsonl (cc-by-4.0)"]
    assert len(terms.obligations["notice"]) == 2
    assert terms.unknown == ()


def test_without_a_statement_it_is_the_base_s() -> None:
    assert merge([_base("MIT")], None, "tuned").licence == "mit"
    found = merge([_base("mit"), _data("cc-by-nc-4.0")], None, "tuned")
    assert found.licence == "other"  # MIT would promise more than the data allow
    assert "non-commercial" in found.obligations


def test_what_is_not_known_is_said_to_be_unknown() -> None:
    terms = merge([_base("house-licence-7"), _data(None)], None, "tuned")
    assert terms.unknown == ("base org/base: house-licence-7", "data rows.jsonl")
    assert terms.licence == "house-licence-7"


@pytest.mark.parametrize(
    ("parts", "stated", "name", "field", "says"),
    [
        ([_base("cc-by-nc-4.0")], "apache-2.0", "t", "package.license", "cc-by-nc-4.0"),
        ([_base("mit"), _data("cc-by-nc-sa-4.0")], "mit", "t", "package.license", "no commercial use"),
        ([_base("gpl-3.0")], "mit", "t", "package.license", "gpl-3.0"),
        ([_base("gemma")], "apache-2.0", "t", "package.license", "gemma"),
        ([_base("openrail")], "mit", "t", "package.license", "openrail"),
        ([_base("cc-by-nd-4.0")], None, "t", "model.source", "may not be shared"),
        ([_base("llama3.1")], None, "my-bot", "package.name", "Llama-my-bot"),
        ([_base("llama3")], None, "llama-bot", "package.name", "Llama 3"),
        ([_base("mit"), _data("llama3.1")], None, "bot", "package.name", "Llama"),
    ],
)
def test_a_conflict_names_the_field_and_the_fix(
    parts: list[Part], stated: str | None, name: str, field: str, says: str
) -> None:
    with pytest.raises(RecipeError, match=field.replace(".", r"\.")) as caught:
        merge(parts, stated, name)
    assert says in str(caught.value)
    waived = merge(parts, stated, name, "Jane Doe: cleared by legal, ticket 12")
    assert waived.waiver == "Jane Doe: cleared by legal, ticket 12"
    assert says in waived.waived[0]
    assert waived.record()["waiver"] == waived.waiver


@pytest.mark.parametrize("name", ["Llama-3.1-bot", "llama_bot", "Llama bot"])
def test_a_prefix_may_be_written_in_any_way(name: str) -> None:
    assert merge([_base("llama3.1")], None, name).licence == "llama3.1"


def test_share_alike_of_data_is_listed_and_stops_nothing() -> None:
    terms = merge([_base("apache-2.0"), _data("cc-by-sa-4.0")], "apache-2.0", "t")
    assert "share-alike" in terms.obligations


def test_a_waiver_of_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match="no conflict to waive"):
        merge([_base("mit")], "mit", "t", "Jane Doe: just in case")


def test_a_part_is_read_off_its_card_or_its_text(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: llama3.1\n---\n# x\n")
    assert part_of("base", "x", tmp_path).licence == "llama3.1"
    (tmp_path / "README.md").write_text("# no head\n")
    (tmp_path / "LICENSE.txt").write_text("Apache License\nVersion 2.0, January 2004\n")
    (tmp_path / "NOTICE").write_text("Copyright the authors")
    part = part_of("base", "x", tmp_path)
    assert part.licence == "apache-2.0"
    assert [path.name for path in part.files] == ["LICENSE.txt", "NOTICE"]
    assert part_of("data", "x", tmp_path, "mit").licence == "mit"
    assert part_of("data", "x", None).licence is None


@pytest.mark.parametrize("name", ["NOTICE", "USE_POLICY.md"])
def test_what_a_notice_names_is_not_the_licence(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("It holds code of others under the MIT License")
    part = part_of("base", "x", tmp_path)
    assert (part.licence, [path.name for path in part.files]) == (None, [name])


def test_texts_and_notices_travel(tmp_path: Path, text_folder: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for name, text in (
        ("LICENSE", "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT"),
        ("USE_POLICY.md", "# Policy"),
        ("NOTICE", "Copyright them"),
    ):
        (base / name).write_text(text)
    terms = merge([part_of("base", "org/base", base), _data("cc-by-4.0")], None, "Llama-tuned")
    out = packaged(
        text_folder,
        tmp_path / "package",
        name="Llama-tuned",
        metadata={"base_model": "org/base"},
        origin=Origin(terms=terms),
    )
    assert (out / "LICENSE").read_text() == "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT"
    assert (out / "USE_POLICY.md").read_text() == "# Policy"
    assert (out / "licences/base/NOTICE").read_text() == "Copyright them"
    notice = (out / "NOTICE").read_text()
    for sentence in ("Built with Llama", "Llama 3.1 is licensed under", "Copyright them", "Trained on rows.jsonl"):
        assert sentence in notice
    card = (out / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert (head["license"], head["base_model_relation"]) == ("llama3.1", "finetune")
    assert head["license_link"].startswith("https://www.llama.com")
    assert "Built with Llama" in card
    metadata = yaml.safe_load((out / "MLmodel").read_text())["metadata"]
    assert metadata["license"] == "llama3.1"
    assert set(metadata["terms"]["obligations"]) >= {"use-policy", "user-cap", "name-prefix", "attribution"}


def test_the_base_s_text_is_not_the_licence_of_a_model_under_another(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("MIT License")
    terms = merge([part_of("base", "b", tmp_path)], "apache-2.0", "t")
    out = tmp_path / "out"
    out.mkdir()
    write_notices(out, terms, "t")
    assert not (out / "LICENSE").exists()
    assert (out / "licences/base/LICENSE").read_text() == "MIT License"
