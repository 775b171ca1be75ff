"""Makes the pack importable as `custom_diffusion` from a checkout, without ComfyUI.

Importing this module is enough. As in the tests, the repository root itself stays off sys.path:
the pack has folders whose names other packages use as well.
"""

import importlib.machinery
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

_pack = types.ModuleType("custom_diffusion")
_pack.__path__ = [str(ROOT)]
_pack.__spec__ = importlib.machinery.ModuleSpec("custom_diffusion", None, is_package=True)
sys.modules["custom_diffusion"] = _pack
