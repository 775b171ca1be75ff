"""Looks for requests that the routes do not answer as docs/openapi.json says:

    python tests/fuzz/routes.py [MINUTES]

Starts the ComfyUI at COMFYUI_PATH with a few jobs and concepts and lets schemathesis ask it. That
is looked for on the PATH: `pip install schemathesis`, into an environment of its own. Jobs that it
deletes are put back, so that there is always something to find; that they are gone is not checked.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))
import conftest  # noqa: E402, F401  makes the package importable
from custom_diffusion.host.http import openapi  # noqa: E402
from custom_diffusion.trainer.jobs.folder import DESCRIPTION  # noqa: E402
from support import pack_content  # noqa: E402
from support.comfy_server import ComfyServer, find_comfyui  # noqa: E402

PUT_BACK_EVERY_S = 0.2


def main(minutes: float) -> int:
    comfyui, tool = find_comfyui(), shutil.which("schemathesis")
    if comfyui is None or tool is None:
        print("Needed: a ComfyUI at COMFYUI_PATH, and schemathesis on the PATH.")
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        jobs = base / "output" / "custom_diffusion" / "jobs"
        ids = pack_content.write_jobs(jobs)
        names = pack_content.write_concepts(base / "models" / "custom_diffusion")
        description = base / "openapi.json"
        description.write_text(json.dumps(_with_what_is_there(ids, names)), encoding="utf-8")
        over = threading.Event()
        keeper = threading.Thread(target=_put_back, args=(jobs, over))
        with ComfyServer(comfyui, base) as server:
            keeper.start()
            try:
                limits = ["--url", server.url, "--max-time", str(int(minutes * 60))]
                checks = ["--continue-on-failure", "--exclude-checks", "use_after_free"]
                command = [tool, "run", str(description), *limits, *checks]
                status = subprocess.run(command, cwd=base, check=False).returncode
            finally:
                over.set()
                keeper.join()
            log = server.log()
    faults = re.findall(r"\S+ \S+ failed\s+Traceback.*?\n(?=\S+Error)[^\n]*", log, re.DOTALL)
    print(f"{len(faults)} faults of ours in the server's log", *faults[:3], sep="\n")
    return status or int(bool(faults))


def _with_what_is_there(ids: list[str], names: list[str]) -> object:
    """The description, with ids, names and steps that lead somewhere among those to choose from."""
    description = openapi.description()
    found = {"id": ids, "name": names, "step": [pack_content.SAMPLE_STEP, pack_content.PAGE_STEP]}
    for operations in description["paths"].values():
        for operation in operations.values():
            for parameter in operation["parameters"]:
                if values := found.get(parameter["name"]):
                    parameter["schema"] = {"anyOf": [{"enum": values}, parameter["schema"]]}
    return description


def _put_back(jobs: Path, over: threading.Event) -> None:
    """Whatever was deleted of the job folders, the description last: it is what makes one a job."""
    kept = {
        path.relative_to(jobs): path.read_bytes() if path.is_file() else None
        for path in sorted(jobs.rglob("*"), key=lambda path: path.name == DESCRIPTION)
        if path.is_file() or path.is_dir()
    }
    while not over.wait(PUT_BACK_EVERY_S):
        gone = {path.parts[0] for path in kept if not (jobs / path.parts[0]).exists()}
        for path, content in kept.items():
            if path.parts[0] in gone:
                if content is None:
                    (jobs / path).mkdir(parents=True, exist_ok=True)
                else:
                    (jobs / path).write_bytes(content)


if __name__ == "__main__":
    raise SystemExit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 15.0))
