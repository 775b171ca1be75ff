"""What the project says it needs is said once and is true: requirements.txt, packages and the
lowest versions follow from pyproject.toml.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.any_version

ROOT = Path(__file__).resolve().parents[2]
tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def dev() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dev", ROOT / "dev.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_requirements_are_the_dependencies(project: dict[str, Any]) -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert lines == project["project"]["dependencies"]


def test_packages_are_the_folders(project: dict[str, Any]) -> None:
    outside = {"tests", "benchmarks", "docs", "web", "example_workflows", "locales"}
    folders = {
        ".".join(("custom_diffusion", *inside.parts))
        for path in ROOT.rglob("*.py")
        if (inside := path.parent.relative_to(ROOT)).parts[:1] == ()
        or (inside.parts[0] not in outside and not inside.parts[0].startswith("."))
        if inside.parts[:1] not in (("build",), ("dist",))
    }
    packages = project["tool"]["setuptools"]["packages"]
    assert sorted(packages) == sorted(folders)
    inits = [ROOT.joinpath(*name.split(".")[1:]) / "__init__.py" for name in packages]
    assert [path for path in inits if not path.is_file()] == []


def test_lowest_versions_are_those_of_the_project(project: dict[str, Any], dev: ModuleType) -> None:
    extras = project["project"]["optional-dependencies"]
    stated = [*project["project"]["dependencies"], *extras["headless"], *extras["8bit"]]
    pins = dev.lowest_versions((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert pins == [requirement.replace(">=", "==") for requirement in stated]
    assert len(pins) >= 10
    assert project["project"]["requires-python"] == f">={dev.LOWEST_PYTHON}"


@pytest.mark.parametrize("requirement", ["numpy", "numpy>=1,<2", "numpy>1", "numpy==1.0"])
def test_a_dependency_without_a_lowest_version_is_refused(
    dev: ModuleType, requirement: str
) -> None:
    with pytest.raises(ValueError, match="is not name>=version"):
        dev.lowest_versions(f'dependencies = ["{requirement}"]\nheadless = []\n8bit = []\n')


def test_a_missing_list_is_refused(dev: ModuleType) -> None:
    with pytest.raises(ValueError, match="headless"):
        dev.lowest_versions("dependencies = []\n8bit = []\n")
