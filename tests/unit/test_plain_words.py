"""One thing has one everyday name in all that a person reads; ids and code keep theirs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from support.pack import ROOT

PAGES = ("README.md", "docs/*.md", "web/docs/*.md", "locales/en/*.json")
CODE = (
    *("nodes", "concept", "merge", "composition", "trainer", "host", "formats", "compression"),
    *("cli", "inspection"),
)
NOT_SAID = re.compile(r"modifier token|\bprolong", re.IGNORECASE)
"""They are called trigger word and extend."""


def docstrings(tree: ast.Module) -> set[ast.AST]:
    """Every string that stands alone: those of modules, classes, functions and values."""
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def said(path: Path) -> Iterator[str]:
    """The texts of a file that can reach a person."""
    if path.suffix != ".py":
        yield path.read_text("utf-8")
        return
    tree = ast.parse(path.read_text("utf-8"))
    silent = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value for part in node.values if isinstance(part, ast.Constant))
            yield "".join(str(part) for part in parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in silent:
            yield node.value


def test_the_trigger_word_and_extending_have_one_name() -> None:
    pages = [path for pattern in PAGES for path in ROOT.glob(pattern)]
    code = [path for folder in CODE for path in (ROOT / folder).rglob("*.py")]
    assert len(pages) > 15 and len(code) > 80
    found = [
        (str(path.relative_to(ROOT)), text)
        for path in (*pages, *code)
        for text in said(path)
        if NOT_SAID.search(text)
    ]
    assert found == []
