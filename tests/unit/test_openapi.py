"""The description of the routes that is shipped: what the table says, and valid OpenAPI 3.1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from custom_diffusion.host.http import openapi
from custom_diffusion.host.http.api import ENDPOINTS
from custom_diffusion.host.http.endpoint import PREFIX
from openapi_spec_validator import validate

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_file_is_what_the_table_gives() -> None:
    """Else: python -m custom_diffusion.host.http.openapi > docs/openapi.json"""
    assert (DOCS / "openapi.json").read_text(encoding="utf-8") == openapi.text()


def test_it_is_valid() -> None:
    described = json.loads(openapi.text())
    validate(described)
    assert described["openapi"].startswith("3.1")


def test_every_schema_is_used_and_every_reference_leads_somewhere() -> None:
    described = openapi.description()
    used = {name.rpartition("/")[2] for name in _references(described)}
    assert used == described["components"]["schemas"].keys()


def test_the_page_for_people_names_every_path() -> None:
    page = (DOCS / "http-api.md").read_text(encoding="utf-8")
    for endpoint in ENDPOINTS:
        folder, _, rest = endpoint.path[1:].partition("/")
        assert f"{PREFIX}/{folder}" in page
        assert (
            f"| {endpoint.method} | `/{rest}" in page
            if rest
            else f"| {endpoint.method} | (nothing)"
        )


def _references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [found for part in value.values() for found in _references(part)]
    if isinstance(value, list):
        return [found for part in value for found in _references(part)]
    return []
