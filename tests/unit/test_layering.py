"""Which part of the pack may import which: an import walk over its files, and over violations that
it must find.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.pack import ROOT, pack_files

pytestmark = pytest.mark.any_version

PACKAGE = "custom_diffusion"

LOW = {
    *("concept", "diffusion", "pictures", "merge", "compression", "composition", "formats"),
    *("attention", "inspection", "evaluation"),
}
MAY_IMPORT = {
    "concept": set[str](),
    "diffusion": {"concept"},
    "pictures": {"concept"},
    "merge": {"concept"},
    "compression": {"concept", "pictures"},
    "composition": {"concept", "diffusion", "attention"},
    "attention": {"concept", "diffusion", "pictures"},
    "formats": {"concept"},
    "inspection": {"concept", "compression", "formats", "pictures"},
    "evaluation": {"concept", "pictures"},
    "trainer": {"concept", "diffusion", "pictures"},
    "host": {*LOW, "trainer"},
    "nodes": {*LOW, "trainer", "host"},
    "miniature": {*LOW, "trainer", "host"},
    "cli": {*LOW, "trainer", "host", "miniature"},
}
"""Folder → the other folders of ours it may import. Files beside them may import all."""
INSIDE_TRAINER = {
    "settings": set[str](),
    "options": {"settings"},
    "config": {"settings", "options"},
    "checkpoint": set[str](),
    "events": {"checkpoint"},
    "economy": set[str](),
    "request": {"config", "data"},
    "data": {"config"},
    "regularization": {"config", "data"},
    "learning": {"config", "options", "data"},
    "methods": {"config", "learning"},
    "jobs": {"settings", "config", "data", "checkpoint", "events", "request"},
    "earlier": {"config", "learning", "methods"},
    "automatic": {"card", "config", "methods"},
    "card": {"config"},
    "prepare": {"config", "data", "learning", "methods"},
    "learner": {"config", "checkpoint", "events", "data", "learning", "methods", "earlier"},
    "validation": {
        *("config", "checkpoint", "events", "economy", "data", "learning", "learner"),
    },
    "loop": {
        *("config", "checkpoint", "events", "economy", "data", "learning", "learner"),
        "validation",
    },
    "teach": {"data", "events", "loop", "prepare", "request", "earlier"},
}
"""Rooms of the trainer, and files at its door → the others they may import. Nothing there knows
jobs: a run has no idea that it is one.
"""
PURE = {*LOW, "trainer"}
"""Folders that know no model library and no user interface."""
COMFYUI = {
    *("comfy", "comfy_api", "comfy_api_nodes", "comfy_config", "comfy_execution", "comfy_extras"),
    *("folder_paths", "server", "execution", "nodes", "latent_preview", "app", "api_server"),
    *(
        "node_helpers",
        "cuda_malloc",
        "utils",
        "main",
        "protocol",
        "comfyui_version",
        "hook_breaker",
    ),
}
NOT_PURE = {
    *("diffusers", "transformers", "open_clip", "accelerate", "peft"),
    *("aiohttp", "tkinter", "gradio", "matplotlib", "argparse", "tqdm"),
    *COMFYUI,
}


def violations(source: str, file: str) -> list[str]:
    """What is wrong with the imports of a file, given by its path below the root of the pack."""
    parts = Path(file).parts
    folder = parts[0] if len(parts) > 1 else ""
    return [
        f"{file}:{line} imports {'.' * level}{module}: {wrong}"
        for line, level, module in _imports(source)
        for wrong in (
            _relative(parts, folder, level, module) if level else _absolute(parts, folder, module)
        )
    ]


def _imports(source: str) -> Iterator[tuple[int, int, str]]:
    """Line, leading dots, dotted module of every import, wherever it stands in the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, 0, name.name
        elif isinstance(node, ast.ImportFrom):
            for name in node.names:  # `from . import x` imports the module x
                yield node.lineno, node.level, ".".join(filter(None, (node.module, name.name)))
        elif isinstance(node, ast.Call) and _is_import_call(node.func):
            name = node.args[0] if node.args else None
            known = isinstance(name, ast.Constant) and isinstance(name.value, str)
            yield node.lineno, 0, name.value if known else "<computed>"  # type: ignore[union-attr]


def _is_import_call(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in ("import_module", "__import__")


def _absolute(parts: tuple[str, ...], folder: str, module: str) -> Iterator[str]:
    top = module.split(".")[0]
    if top == PACKAGE:
        yield "inside the pack, imports of our own are relative"
    if top == "<computed>":
        yield "an import whose name is computed cannot be checked"
    if top in MAY_IMPORT and top not in COMFYUI:
        yield "our own folders are not on the path"
    if folder in PURE and top in NOT_PURE:
        yield f"{folder} knows no model library, no ComfyUI and no user interface"
    elif (
        top in COMFYUI
        and parts[:2] != ("host", "comfyui")
        and (folder, top) != ("nodes", "comfy_api")
    ):
        yield "only host/comfyui imports ComfyUI (nodes: comfy_api alone)"


def _relative(parts: tuple[str, ...], folder: str, level: int, module: str) -> Iterator[str]:
    package = list(parts[:-1])
    if level - 1 > len(package):
        yield "this leaves the pack"
        return
    target = [*package[: len(package) - level + 1], *module.split(".")]
    top = target[0]
    if folder in MAY_IMPORT and top not in {folder, *MAY_IMPORT[folder]}:
        yield f"{folder} may import {sorted(MAY_IMPORT[folder]) or 'nothing of ours'}"
    if folder == "trainer" == top and len(parts) > 1 and len(target) > 1:
        room = parts[1].removesuffix(".py")
        allowed = {room, *INSIDE_TRAINER.get(room, set())}
        if room != "__init__" and target[1] not in allowed:
            yield f"trainer/{room} may import of the trainer {sorted(allowed)}"
    if target[:2] == ["host", "comfyui"] and folder != "nodes" and parts[:2] != ("host", "comfyui"):
        yield "only nodes import host/comfyui; all else runs without ComfyUI"


def test_no_file_of_the_pack_imports_what_it_may_not() -> None:
    files = pack_files()
    assert len(files) > 30
    found = [
        violation
        for path in files
        for violation in violations(
            path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
        )
    ]
    assert not found, "\n".join(found)


def test_every_folder_with_python_files_has_a_rule() -> None:
    folders = {path.relative_to(ROOT).parts[0] for path in pack_files() if path.parent != ROOT}
    assert folders <= set(MAY_IMPORT)
    assert {"concept", "merge", "trainer", "host", "nodes"} <= folders


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("concept/file.py", "from ..merge import merging"),
        ("concept/file.py", "from .. import merge"),
        ("concept/file.py", "from ..host.clip.text_encoder import ClipTextEncoder"),
        ("merge/merging.py", "from ..trainer.config import TrainConfig"),
        ("merge/merging.py", "def f():\n    from ..trainer import config"),
        ("trainer/loop.py", "from ..merge.merging import merge_concepts"),
        ("trainer/loop.py", "from .jobs.job import Job"),
        ("trainer/data/latents.py", "from ..learning.tokens import drift"),
        ("trainer/economy/backward.py", "from ..loop import train"),
        ("trainer/learning/tokens.py", "from .. import loop"),
        ("diffusion/sampling.py", "from ..trainer.config import TrainConfig"),
        ("merge/merging.py", "from ..compression.ranks import compress"),
        ("trainer/loop.py", "if TYPE_CHECKING:\n    from ..host.diffusers import X"),
        ("host/diffusers/loading.py", "from ...nodes.types import X"),
        ("host/diffusers/loading.py", "from ..comfyui.paths import concept_folder"),
        ("host/diffusers/loading.py", "from .. import comfyui"),
        ("cli/training.py", "from ..host.comfyui import models"),
        ("miniature/demo.py", "from ..host.comfyui.models import x"),
        ("host/comfyui/apply.py", "from ...miniature import judge"),
        ("miniature/demo.py", "from ..nodes import types"),
        ("concept/text.py", "import comfy.utils"),
        ("concept/text.py", "import transformers"),
        ("trainer/loop.py", "from diffusers import DDPMScheduler"),
        ("trainer/loop.py", "try:\n    import tqdm\nexcept ImportError:\n    raise"),
        ("merge/merging.py", "import folder_paths"),
        ("merge/merging.py", "import aiohttp.web"),
        ("host/diffusers/loading.py", "import folder_paths"),
        ("host/clip/text_encoder.py", "from comfy import sd1_clip"),
        ("nodes/training.py", "import comfy.utils"),
        ("nodes/training.py", "import nodes"),
        ("nodes/training.py", "from server import PromptServer"),
        ("cli/training.py", "import execution"),
        ("__init__.py", "from nodes import NODES"),
        ("trainer/loop.py", "from custom_diffusion.concept import text"),
        ("cli/training.py", "import custom_diffusion"),
        ("host/comfyui/paths.py", "from concept.errors import DataError"),
        ("__init__.py", "from .. import x"),
        ("concept/file.py", "from ...server import PromptServer"),
        ("host/comfyui/paths.py", "from ....custom_nodes import x"),
        ("trainer/loop.py", "importlib.import_module('diffusers')"),
        ("trainer/loop.py", "__import__('comfy.utils')"),
        ("host/diffusers/loading.py", "import_module(name)"),
    ],
)
def test_the_walk_finds_a_violation(file: str, source: str) -> None:
    found = violations(f"import os\n{source}\n", file)
    assert found
    assert all(violation.startswith(f"{file}:") for violation in found)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("concept/file.py", "from .errors import ConceptFileError"),
        ("concept/file.py", "from . import errors"),
        ("concept/file.py", "import torch, safetensors"),
        ("merge/merging.py", "from ..concept.text import TextEncoder"),
        ("trainer/loop.py", "import numpy\nfrom ..concept import concept"),
        (
            "host/diffusers/loading.py",
            "from diffusers import X\nfrom ...diffusion.protocols import Y",
        ),
        ("host/comfyui/models/unet.py", "import comfy.utils\nimport folder_paths, server, nodes"),
        (
            "host/comfyui/models/unet.py",
            "from ....trainer import loop\nfrom ...clip.text_encoder import X",
        ),
        ("nodes/training.py", "from comfy_api.latest import io"),
        ("nodes/training.py", "from ..host.comfyui.paths import concept_folder"),
        ("nodes/__init__.py", "from . import files"),
        (
            "cli/demo.py",
            "import argparse\nfrom ..host import diffusers\nfrom ..miniature.demo import x",
        ),
        ("__init__.py", "from .nodes import CustomDiffusionExtension"),
    ],
)
def test_the_walk_allows_what_is_allowed(file: str, source: str) -> None:
    assert violations(source, file) == []


def test_importing_the_pack_imports_nothing_else() -> None:
    """ComfyUI imports every pack at start, so this must cost nothing and cannot fail."""
    code = f"""
import importlib.util, sys, typing
before = set(sys.modules)
spec = importlib.util.spec_from_file_location(
    "any_name", {str(ROOT / "__init__.py")!r}, submodule_search_locations=[{str(ROOT)!r}]
)
module = importlib.util.module_from_spec(spec)
sys.modules["any_name"] = module
spec.loader.exec_module(module)
print(sorted(set(sys.modules) - before), module.WEB_DIRECTORY, callable(module.comfy_entrypoint))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "['any_name'] ./web True"


def test_the_lower_parts_load_no_model_library() -> None:
    """Not even through what they import."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import conftest
import {PACKAGE}.concept.file, {PACKAGE}.merge.merging
print([name for name in ("transformers", "diffusers", "PIL") if name in sys.modules])
import {PACKAGE}.trainer.jobs.service
print([name for name in ("transformers", "diffusers") if name in sys.modules])
import {PACKAGE}.host.clip.text_encoder
print([name for name in ("transformers", "diffusers") if name in sys.modules])
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.split() == ["[]"] * 3
