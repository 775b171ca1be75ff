"""The archive as the registry publishes it, alone in a fresh ComfyUI: every node is there with its
help, its translations and the example workflows, and nothing of it misses a file.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.archive import ROOT, shipped_files, write_archive
from support.comfy_server import PACK_FOLDER, ComfyServer

LARGEST = 2 << 20
"""Bytes; pictures are most of it"""
IMPORT_ALL = """
import importlib, pathlib, sys, types
root = pathlib.Path(sys.argv[1])
pack = types.ModuleType("pack_from_archive")
pack.__path__ = [str(root)]
sys.modules["pack_from_archive"] = pack
for path in sorted(root.rglob("*.py")):
    parts = path.relative_to(root).with_suffix("").parts
    # ComfyUI imports these itself, in the other test.
    if parts[0] == "nodes" or parts[:2] == ("host", "comfyui") or parts[-1].startswith("__main"):
        continue
    name = ".".join(("pack_from_archive", *(part for part in parts if part != "__init__")))
    print(importlib.import_module(name).__name__)
"""


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archive(tmp_path_factory.mktemp("archive") / "pack.zip")


@pytest.fixture(scope="module")
def unpacked(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def alone(comfyui_path: Path, unpacked: Path, base: Path) -> Iterator[ComfyServer]:
    """ComfyUI with nothing but the archive."""
    with ComfyServer(comfyui_path, base, pack=unpacked, preloaded=False) as running:
        yield running


def node_ids() -> set[str]:
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "nodes").glob("*.py"))
    return {name for source in sources for name in re.findall(r'node_id="(\w+)"', source)}


def run_python(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_archive_is_small(archive: Path) -> None:
    size = archive.stat().st_size
    print(f"The archive has {size} bytes in {len(shipped_files())} files.")
    assert size < LARGEST


def test_comfyui_starts_from_the_archive_alone(alone: ComfyServer, unpacked: Path) -> None:
    ids = node_ids()
    assert len(ids) > 10
    assert ids <= alone.object_info().keys()
    log = alone.log()
    assert PACK_FOLDER in log
    for sign in ("IMPORT FAILED", "Traceback", "Cannot import", "[ERROR]"):
        assert sign not in log, log[-3000:]
    modules = {alone.object_info(node)["python_module"] for node in ids}
    assert modules == {f"custom_nodes.{PACK_FOLDER}"}


def test_pages_of_the_archive_are_served(alone: ComfyServer) -> None:
    served = f"/extensions/{PACK_FOLDER}"
    for name in shipped_files():
        if name.startswith("web/"):
            assert alone.get_bytes(f"{served}/{name[4:]}") == (ROOT / name).read_bytes()
    for node in node_ids():
        assert alone.get_bytes(f"{served}/docs/{node}.md")
    entries = {path for path in alone.get("/extensions") if path.startswith(served)}
    assert entries == {
        f"{served}/{name[4:]}" for name in shipped_files() if re.match(r"web/.*\.js$", name)
    }


def test_workflows_and_languages_of_the_archive_are_offered(alone: ComfyServer) -> None:
    workflows = {path.stem for path in (ROOT / "example_workflows").glob("*.json")}
    assert set(alone.get("/workflow_templates")[PACK_FOLDER]) == workflows
    translated = alone.get("/i18n")
    languages = {path.name for path in (ROOT / "locales").iterdir()}
    assert languages <= translated.keys()
    for language in languages - {"en"}:
        assert node_ids() <= translated[language]["nodeDefs"].keys()


def test_every_module_of_the_archive_can_be_imported(unpacked: Path, tmp_path: Path) -> None:
    done = run_python("-c", IMPORT_ALL, unpacked, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 80


def test_the_demo_says_that_the_archive_comes_without_it(unpacked: Path, tmp_path: Path) -> None:
    (tmp_path / "from_archive").symlink_to(unpacked, target_is_directory=True)
    done = run_python("-m", "from_archive", "demo", folder=tmp_path)
    assert done.returncode == 1
    assert "left out of the archive that ComfyUI Manager installs" in done.stderr
    assert "Get the project's whole repository" in done.stderr
    assert "Traceback" not in done.stderr
