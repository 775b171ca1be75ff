"""What the panel costs the page: how soon it is painted with 100 jobs, and what goes over the wire
while a training makes 20 steps a second.

A real ComfyUI on the CPU and a real Chromium. The 100 jobs are folders such as trainings leave; the
quick training is a job of the pack's own service whose steps do nothing but sleep.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _measure import options, write_json
from _pack import ROOT
from custom_diffusion.trainer.jobs.folder import JobFolder

sys.path.append(str(ROOT / "tests"))  # the server and the browser of the tests

from support.browser import TAB, open_panel, page_of
from support.comfy_server import ComfyServer, find_comfyui
from support.graphs import node

JOBS = 100
STEPS_PER_JOB = 250
STEPS_PER_S = 20
WATCHED_S = 20.0
METRONOME = '''
import sys, time

class Metronome:
    """A job of the pack's service that makes so many steps a second."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"steps_per_s": ("INT",)}})
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "run", True, "benchmark"

    def run(self, steps_per_s):
        def part(path):
            names = [name for name in sys.modules if name.endswith(path)]
            return sys.modules[names[0]]

        jobs, events = part(".trainer.jobs.work"), part(".trainer.events")

        def train(checkpoint, should_stop, on_event):
            step = 0
            while not should_stop():
                step += 1
                on_event(events.StepDone(step, 1.0 / step))
                time.sleep(1 / steps_per_s)

        work = jobs.Work(train, lambda concept, own_files: None)
        part(".host.comfyui.jobs.service").training_service().submit("metronome", 10**6, {}, work)
        return ()

NODE_CLASS_MAPPINGS = {"Metronome": Metronome}
'''


def write_jobs(folder: Path) -> None:
    """Finished trainings with their losses."""
    for number in range(JOBS):
        made = JobFolder.create(folder, f"concept {number}", {"steps": STEPS_PER_JOB})
        losses = [1 / (step + 1) for step in range(STEPS_PER_JOB)]
        with made.metrics.after(losses):
            pass
        made.write_outcome({"state": "finished", "step": STEPS_PER_JOB, "concept_file": ""})


PAINTED = f"""async () => {{
    const began = performance.now();
    app.extensionManager.command.execute("Workspace.ToggleSidebarTab.{TAB}");
    while (document.querySelectorAll(".cd-job").length < {JOBS})
        await new Promise(requestAnimationFrame);
    await new Promise(requestAnimationFrame);  // the frame after which it is on the screen
    return performance.now() - began;
}}"""


def first_paint(server: ComfyServer, rounds: int) -> dict[str, float]:
    """From the click on the tab to its picture, in a page that was just loaded."""
    seconds, listing = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        server.get("/custom_diffusion/jobs")
        listing.append(time.perf_counter() - start)
        with page_of(server) as page:
            seconds.append(page.evaluate(PAINTED) / 1000)
    return {
        "paint_s": statistics.median(seconds),
        "slowest_s": max(seconds),
        "listing_s": statistics.median(listing),
    }


def traffic(server: ComfyServer) -> dict[str, float]:
    """Messages and requests a second of a page with the panel open, while the metronome runs."""
    with page_of(server) as page:
        open_panel(page)
        server.run({"1": node("Metronome", steps_per_s=STEPS_PER_S)})
        page.wait_for_timeout(2000)
        messages: list[str] = []
        requests: list[str] = []

        def hear(frame: dict[str, Any]) -> None:
            messages.append(frame["response"]["payloadData"])

        network = page.context.new_cdp_session(page)
        network.on("Network.webSocketFrameReceived", hear)
        network.on("Network.requestWillBeSent", lambda sent: requests.append(str(sent)))
        network.send("Network.enable")
        before = _step(server)
        began = time.perf_counter()
        page.wait_for_timeout(1000 * WATCHED_S)
        seconds = time.perf_counter() - began
        steps = _step(server) - before
        ours = [text for text in messages if "custom_diffusion.job" in text]
        asked = [text for text in requests if "/custom_diffusion/" in text]
        return {
            "steps_per_s": steps / seconds,
            "messages_per_s": len(ours) / seconds,
            "message_bytes": statistics.mean(map(len, ours)),
            "requests_per_s": len(asked) / seconds,
        }


def _step(server: ComfyServer) -> int:
    (job,) = (j for j in server.get("/custom_diffusion/jobs")["jobs"] if j["name"] == "metronome")
    return int(job["step"])


def main() -> None:
    given = options(__doc__ or "", threads=1, rounds=5).parse_args()
    comfyui = find_comfyui()
    if comfyui is None:
        raise SystemExit("Set COMFYUI_PATH to a ComfyUI work tree.")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        write_jobs(base / "output" / "custom_diffusion" / "jobs")
        (base / "custom_nodes").mkdir()
        (base / "custom_nodes" / "metronome.py").write_text(METRONOME)
        with ComfyServer(comfyui, base, threads=given.threads, preloaded=False) as server:
            for name, measure in (
                ("first paint", lambda: first_paint(server, given.rounds)),
                ("traffic", lambda: traffic(server)),
            ):
                results[name] = measure()
                told = ", ".join(f"{key} {value:.2f}" for key, value in results[name].items())
                print(f"{name}: {told}", flush=True)
                write_json(given.json, results)


if __name__ == "__main__":
    main()
