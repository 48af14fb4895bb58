"""Words of the code: the field's terms in names, and module docstrings that say first what a module is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
GLOSSARY = ROOT / "docs" / "reference" / "glossary.md"
MODULES = sorted(path for path in ROOT.glob("packages/*/**/*.py") if "build" not in path.parts)

QUESTION = re.compile(r"(What|Who|Whose|Where|Whether|How|Which|When|Why)\b")


def rejected_words() -> set[str]:
    """Words in code marks in the last column of the glossary, but not those that are rejected in one sense only."""
    cells = [row.rsplit("|", 2)[1] for row in GLOSSARY.read_text().splitlines() if row.startswith("| ")]
    return {word for cell in cells for word in re.findall(r"`(\w+)`(?! alone| of)", cell)}


def words_of(name: str) -> set[str]:
    """Lower-case words of `snake_case` and `CamelCase`."""
    return {part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def names() -> Iterator[tuple[str, str]]:
    for path in MODULES:
        where = str(path.relative_to(ROOT))
        yield where, path.parent.name if path.stem == "__init__" else path.stem
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                yield f"{where}: {node.name}", node.name


def test_rejected_words_are_in_no_name_of_a_module_or_class() -> None:
    rejected = rejected_words()
    assert len(rejected) > 20
    found = [f"{where} ({', '.join(bad)})" for where, name in names() if (bad := sorted(words_of(name) & rejected))]
    assert not found, found


def test_names_are_taken_apart_into_words() -> None:
    assert words_of("PagedKV") == {"paged", "kv"} and words_of("KVLayout") == {"kv", "layout"}
    assert words_of("in_flight_step") == words_of("InFlightStep") == {"in", "flight", "step"}


def test_a_module_says_first_what_it_is() -> None:
    riddles = []
    for path in MODULES:
        doc = ast.get_docstring(ast.parse(path.read_text()))
        if doc is None or QUESTION.match(doc):
            riddles.append(str(path.relative_to(ROOT)))
    assert not riddles, riddles


def test_no_term_is_explained_twice() -> None:
    terms = [row.split("|")[1].strip() for row in GLOSSARY.read_text().splitlines() if row.startswith("| ")]
    terms = [term for term in terms if term != "term"]
    assert len(terms) > 50 and len(set(terms)) == len(terms)
