"""Makes the pack importable as `custom_diffusion` without running its root `__init__`, and PyTorch
run on one thread.

ComfyUI loads the pack by path, and ComfyUI itself has a top-level module called `nodes`; so the
repository root must never be on sys.path.
"""

import importlib.machinery
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
sys.path.append(str(ROOT / "tests"))  # for `from support... import ...`

_pack = types.ModuleType("custom_diffusion")
_pack.__path__ = [str(ROOT)]
_pack.__spec__ = importlib.machinery.ModuleSpec("custom_diffusion", None, is_package=True)
sys.modules["custom_diffusion"] = _pack


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: of two processes, none gets a long one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices are quicker on one thread, sums always come out in the same order, and two
    tests can run at a time.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
