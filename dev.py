"""Sets the project up in `.venv` and runs it: `python3 dev.py demo` or `python3 dev.py test`.

`python3 dev.py test --fast` checks what two minutes can: linters, types, and the tests that need no
ComfyUI and take no training. `python3 dev.py test --lowest` runs the unit tests in `.venv-lowest`,
on the lowest versions that pyproject.toml allows, of Python too where it is found.

Needs nothing but Python 3.10 or newer. When a ComfyUI is found (COMFYUI_PATH, an enclosing one, or
~/comfy/ComfyUI) its requirements are installed too and the tests run against it.
"""

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV, VENV_LOWEST = ROOT / ".venv", ROOT / ".venv-lowest"
BIN = Path("Scripts" if os.name == "nt" else "bin")  # in either
PYPROJECT = ROOT / "pyproject.toml"
CONSTRAINTS = ROOT / "tests" / "constraints.txt"
STRICTLY_TYPED = [
    *("concept", "diffusion", "pictures", "merge", "compression", "inspection", "formats"),
    *("attention", "composition", "evaluation", "trainer", "host", "nodes", "miniature", "cli"),
]
TWO_AT_A_TIME = ["-n2", "--dist=loadfile", "--no-loadscope-reorder"]
LOWEST_PYTHON = "3.10"


def main() -> int:
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command == "demo":
        install(VENV, sys.executable, "headless", CONSTRAINTS)
        return run(VENV / BIN / "custom-diffusion", "demo", *sys.argv[2:])
    if command == "test" and sys.argv[2:3] == ["--lowest"]:
        return test_lowest(sys.argv[3:])
    if command == "test" and sys.argv[2:3] == ["--fast"]:
        install(VENV, sys.executable, "test", CONSTRAINTS, find_comfyui())
        return test(None, ["-q", "-m", "not slow", str(ROOT / "tests" / "unit"), *sys.argv[3:]])
    if command == "test":
        comfyui = find_comfyui()
        install(VENV, sys.executable, "test", CONSTRAINTS, comfyui)
        return test(comfyui, sys.argv[2:])
    print(__doc__)
    return 2


def install(
    folder: Path, python: str, extra: str, constraints: Path, comfyui: Path | None = None
) -> None:
    """Installs into a virtual environment, once for the same requirements."""
    requirements = [comfyui / "requirements.txt"] if comfyui else []
    inputs = [PYPROJECT, constraints, *requirements]
    words = f"{extra} {version_of(python)}"
    key = hashlib.sha256(words.encode() + b"".join(p.read_bytes() for p in inputs)).hexdigest()
    stamp = folder / "installed"
    if stamp.is_file() and stamp.read_text() == key:
        return
    if not (folder / BIN / "pip").exists() and not (folder / BIN / "pip.exe").exists():
        must(python, "-m", "venv", folder)
    extras = [item for path in requirements for item in ("-r", path)]
    pip = [folder / BIN / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    must(*pip, "-c", constraints, "-e", f"{ROOT}[{extra}]", *extras)
    stamp.write_text(key)


def test_lowest(arguments: list[str]) -> int:
    """The unit tests, but for those marked as saying nothing about versions."""
    python = lowest_python()
    print(f"Lowest versions, on Python {version_of(python)}")
    if version_of(python).rpartition(".")[0] != LOWEST_PYTHON:
        print(f"!!! NOT ON THE LOWEST PYTHON: no Python {LOWEST_PYTHON} was found !!!", flush=True)
    VENV_LOWEST.mkdir(exist_ok=True)
    constraints = VENV_LOWEST / "lowest.txt"
    pins = lowest_versions(PYPROJECT.read_text(encoding="utf-8"))
    constraints.write_text("\n".join(pins) + "\n")
    print("\n".join(pins), flush=True)
    install(VENV_LOWEST, python, "unit", constraints)
    chosen = ["-m", "not any_version", ROOT / "tests" / "unit"]
    interpreter = VENV_LOWEST / BIN / "python"
    return run(
        interpreter, "-m", "pytest", *TWO_AT_A_TIME, *chosen, *arguments, OMP_NUM_THREADS="1"
    )


def lowest_versions(pyproject: str) -> list[str]:
    """`name==version` of every dependency and of the extras, as far down as they are allowed.

    Raises ValueError where one is not written as `name>=version`.
    """
    pins = []
    for key in ("dependencies", "headless", "8bit"):
        found = re.search(rf"^{key} = (\[.*?\])$", pyproject, re.MULTILINE | re.DOTALL)
        for requirement in ast.literal_eval(found[1]) if found else [key]:
            if not re.fullmatch(r"[\w-]+>=[\d.]+", requirement):
                raise ValueError(f"{requirement!r} in pyproject.toml is not name>=version")
            pins.append(requirement.replace(">=", "=="))
    return pins


def lowest_python() -> str:
    """The interpreter of the lowest version, else the one that runs this."""
    name = f"python{LOWEST_PYTHON}"
    pyenv = sorted((Path.home() / ".pyenv" / "versions").glob(f"{LOWEST_PYTHON}.*/bin/{name}"))
    uv = output_of("uv", "python", "find", "--no-python-downloads", LOWEST_PYTHON)
    for candidate in filter(None, (shutil.which(name), *map(str, pyenv), uv)):
        if version_of(candidate).startswith(f"{LOWEST_PYTHON}."):
            return candidate
    return sys.executable


def version_of(python: str) -> str:
    """As 3.10.13; empty where it does not start, as a shim of a Python that is not there."""
    return output_of(python, "-c", "import platform; print(platform.python_version())")


def output_of(*command: str) -> str:
    """What a command says; empty where it is not there or fails."""
    if not shutil.which(command[0]):
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def test(comfyui: Path | None, arguments: list[str]) -> int:
    """Linters, types and tests; the first failure ends it."""
    environment = {"COMFYUI_PATH": str(comfyui)} if comfyui else {}
    checks = [
        [VENV / BIN / "ruff", "check", ROOT],
        [VENV / BIN / "ruff", "format", "--check", ROOT],
        [VENV / BIN / "oxlint", ROOT / "web"],
        [VENV / BIN / "mypy", *(f"-pcustom_diffusion.{name}" for name in STRICTLY_TYPED)],
        # Two at a time, a file each: most of them use one thread, and ComfyUI's servers wait a lot.
        [VENV / BIN / "python", "-m", "pytest", *TWO_AT_A_TIME, *arguments],
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


def must(*command: object) -> None:
    if status := run(*command):
        raise SystemExit(status)


def run(*command: object, **environment: str) -> int:
    words = [str(word) for word in command]
    print("+", " ".join(words), flush=True)
    # Compiled once: tests begin this package in processes of their own.
    kept = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", **environment}
    return subprocess.run(words, cwd=ROOT, env=kept, check=False).returncode


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
