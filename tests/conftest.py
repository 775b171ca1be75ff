"""Makes the pack importable as `custom_diffusion` without running its root `__init__`.

ComfyUI loads the pack by path, and ComfyUI itself has a top-level module called `nodes`; so the
repository root must never be on sys.path.
"""

import importlib.machinery
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
sys.path.append(str(ROOT / "tests"))  # for `from support... import ...`

_pack = types.ModuleType("custom_diffusion")
_pack.__path__ = [str(ROOT)]
_pack.__spec__ = importlib.machinery.ModuleSpec("custom_diffusion", None, is_package=True)
sys.modules["custom_diffusion"] = _pack
