"""Sets the project up in `.venv` and runs it: `python3 dev.py demo` or `python3 dev.py test`.

Needs nothing but Python 3.10 or newer. When a ComfyUI is found (COMFYUI_PATH, an enclosing one, or
~/comfy/ComfyUI) its requirements are installed too and the tests run against it.
"""

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
CONSTRAINTS = ROOT / "tests" / "constraints.txt"
# Everything but the ComfyUI glue, whose types ComfyUI does not publish.
STRICTLY_TYPED = [
    "concept",
    "merge",
    "trainer",
    "formats",
    "evaluation",
    "host.clip_text",
    "host.clip_pair",
    "host.diffusers",
    "host.http_api",
    "host.http_schemas",
    "host.open_clip_text",
    "host.open_clip_vocabulary",
    "host.openapi",
    "miniature",
    "cli",
]
TWO_AT_A_TIME = ["-n2", "--dist=loadfile", "--no-loadscope-reorder"]


def main() -> int:
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command == "demo":
        install("headless", None)
        return run(BIN / "custom-diffusion", "demo", *sys.argv[2:])
    if command == "test":
        comfyui = find_comfyui()
        install("test", comfyui)
        return test(comfyui, sys.argv[2:])
    print(__doc__)
    return 2


def install(extra: str, comfyui: Path | None) -> None:
    """Installs into `.venv`, once for the same requirements."""
    requirements = [comfyui / "requirements.txt"] if comfyui else []
    inputs = [ROOT / "pyproject.toml", CONSTRAINTS, *requirements]
    key = hashlib.sha256(extra.encode() + b"".join(p.read_bytes() for p in inputs)).hexdigest()
    stamp = VENV / "installed"
    if stamp.is_file() and stamp.read_text() == key:
        return
    if not (BIN / "pip").exists() and not (BIN / "pip.exe").exists():
        venv.create(VENV, with_pip=True)
    extras = [item for path in requirements for item in ("-r", path)]
    pip = [BIN / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    status = run(*pip, "-c", CONSTRAINTS, "-e", f"{ROOT}[{extra}]", *extras)
    if status:
        raise SystemExit(status)
    stamp.write_text(key)


def test(comfyui: Path | None, arguments: list[str]) -> int:
    """Linters, types and tests; the first failure ends it."""
    environment = {"COMFYUI_PATH": str(comfyui)} if comfyui else {}
    checks = [
        [BIN / "ruff", "check", ROOT],
        [BIN / "ruff", "format", "--check", ROOT],
        [BIN / "oxlint", ROOT / "web"],
        [BIN / "mypy", *(f"-pcustom_diffusion.{name}" for name in STRICTLY_TYPED)],
        # Two at a time, a file each: most of them use one thread, and ComfyUI's servers wait a lot.
        [BIN / "python", "-m", "pytest", *TWO_AT_A_TIME, *arguments],
    ]
    for check in checks:
        if status := run(*check, MYPYPATH=str(package_folder()), **environment):
            return status
    return 0


def package_folder() -> Path:
    """A folder in which this one is called `custom_diffusion`, as the type checker needs it."""
    folder = VENV / "package"
    folder.mkdir(exist_ok=True)
    if not (link := folder / "custom_diffusion").exists():
        link.symlink_to(ROOT, target_is_directory=True)
    return folder


def find_comfyui() -> Path | None:
    """COMFYUI_PATH, else the ComfyUI whose custom_nodes holds this folder, else ~/comfy/ComfyUI."""
    named = os.environ.get("COMFYUI_PATH")
    candidates = [Path(named)] if named else [*ROOT.parents, Path.home() / "comfy" / "ComfyUI"]
    return next(
        (p for p in candidates if (p / "main.py").is_file() and (p / "comfy").is_dir()), None
    )


def run(*command: object, **environment: str) -> int:
    words = [str(word) for word in command]
    print("+", " ".join(words), flush=True)
    return subprocess.run(
        words, cwd=ROOT, env={**os.environ, **environment}, check=False
    ).returncode


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
