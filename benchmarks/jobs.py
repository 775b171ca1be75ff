"""What training jobs cost those who use ComfyUI meanwhile, and what they leave behind.

A real ComfyUI is started on the CPU with a random two-level Stable Diffusion 1.5, and asked over
HTTP as a browser does: how much longer a picture takes while a job waits for it or shares the
processor, how long pausing, stopping and going on take, what 50 jobs in a row leave of memory and
threads, and what ten that are queued take.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _measure import options, write_json
from _pack import ROOT

sys.path.append(str(ROOT / "tests"))  # the server and the graphs of the tests

from support.checkpoints import write_sd15
from support.comfy_server import ComfyServer, find_comfyui
from support.graphs import draw, draw_pictures, teach

JOBS = "/custom_diffusion/jobs"
SAMPLING_STEPS = 20
ROWS = 50
STEPS_IN_A_ROW = 3
QUEUED = 10
ENDED = ("finished", "stopped", "failed")
_POLL_S = 0.01
SETTINGS = {"batch_size": 2, "flip": True}
"""Of every training"""


class Bench:
    """One server, on which at most one job is at work."""

    def __init__(self, server: ComfyServer) -> None:
        self._server = server
        self._pictures = 0
        self._trained = 0

    def picture(self) -> float:
        """Seconds of one picture that ComfyUI has not drawn before."""
        graph = draw("photo of a cat")
        self._pictures += 1
        graph["sampler"]["inputs"].update(seed=self._pictures, steps=SAMPLING_STEPS)
        return _seconds(lambda: self._server.run(graph))

    def begin(self, steps: int = 100_000, wait: bool = False, **settings: Any) -> None:
        """Starts a job, and leaves when it has made three steps; or waits for its end."""
        self._trained += 1
        settings = {**SETTINGS, "seed": self._trained, "steps": steps, **settings}
        self._server.run(teach("cat", "cat", "cat", "<new1>", wait=wait, **settings))
        if not wait:
            self._until(lambda job: job["step"] >= 3)

    def queue(self) -> None:
        """Adds a job that waits for its turn."""
        self._trained += 1
        settings = {**SETTINGS, "seed": self._trained, "steps": 100_000}
        self._server.run(teach("cat", "cat", "cat", "<new1>", wait=False, **settings))

    def drop_all(self) -> None:
        """Stops those that wait, and then the one at work."""
        for job in reversed(self._server.get(JOBS)["jobs"]):
            self._server.post(f"{JOBS}/{job['id']}/stop")
        self._until(lambda _: all(j["state"] in ENDED for j in self._server.get(JOBS)["jobs"]))

    def pause(self) -> float:
        return _seconds(lambda: (self._ask("pause"), self._until_state("paused")))

    def resume(self) -> float:
        """Seconds until the first step after it."""
        step = self._job()["step"]
        return _seconds(lambda: (self._ask("resume"), self._until(lambda j: j["step"] > step)))

    def stop(self) -> float:
        """Seconds until what was learnt is saved."""
        return _seconds(lambda: (self._ask("stop"), self._until_state("stopped")))

    def step_s(self) -> float:
        return float(self._job()["seconds_per_step"])

    def left_behind(self) -> dict[str, float]:
        """Resident memory in MB, and threads of the server's process."""
        assert self._server.process is not None
        status = Path(f"/proc/{self._server.process.pid}/status").read_text()
        values = dict(line.split(":", 1) for line in status.splitlines())
        return {
            "memory_mb": int(values["VmRSS"].split()[0]) / 1024,
            "threads": int(values["Threads"]),
        }

    def _job(self) -> dict[str, Any]:
        return self._server.get(JOBS)["jobs"][-1]  # type: ignore[no-any-return]

    def _ask(self, action: str) -> None:
        self._server.post(f"{JOBS}/{self._job()['id']}/{action}")

    def _until_state(self, state: str) -> None:
        self._until(lambda job: job["state"] == state)

    def _until(self, reached: Callable[[dict[str, Any]], bool]) -> None:
        while not reached(job := self._job()):
            if job["state"] == "failed":
                raise RuntimeError(job["error"])
            time.sleep(_POLL_S)


def prompts(bench: Bench, rounds: int) -> dict[str, float]:
    """Times of a picture without a job, beside one that waits for it, and beside one that shares;
    they take turns.
    """
    seconds: dict[str, list[float]] = {"alone": [], "waiting": [], "sharing": []}
    bench.picture()
    for _ in range(rounds):
        seconds["alone"].append(bench.picture())
        for mode in ("waiting", "sharing"):
            bench.begin(share_device=mode == "sharing")
            seconds[mode].append(bench.picture())
            bench.stop()
    ratios = {
        f"{mode}_{name}": choose(
            b / a for a, b in zip(seconds["alone"], seconds[mode], strict=True)
        )
        for mode in ("waiting", "sharing")
        for name, choose in (("median", statistics.median), ("largest", max))
    }
    return {"alone_s": statistics.median(seconds["alone"]), **ratios}


def life(bench: Bench, rounds: int) -> dict[str, float]:
    """Medians of pausing, going on and stopping, beside one step."""
    bench.begin()
    pauses, resumes = [], []
    for _ in range(rounds):
        pauses.append(bench.pause())
        resumes.append(bench.resume())
    step_s = bench.step_s()
    stop_s = bench.stop()
    return {
        "step_s": step_s,
        "pause_s": statistics.median(pauses),
        "resume_s": statistics.median(resumes),
        "stop_s": stop_s,
    }


def in_a_row(bench: Bench) -> dict[str, float]:
    """What the process holds after five jobs, and after 50 more."""
    results = {}
    for name, count in (("before", 5), ("after", ROWS)):
        for _ in range(count):
            bench.begin(steps=STEPS_IN_A_ROW, wait=True)
        results |= {f"{key}_{name}": value for key, value in bench.left_behind().items()}
    return results


def queued(bench: Bench) -> dict[str, float]:
    """Memory of the process beside one job at work, and with ten more of the same model queued."""
    bench.begin()
    results = {"alone_mb": bench.left_behind()["memory_mb"]}
    for _ in range(QUEUED):
        bench.queue()
    results["queued_mb"] = bench.left_behind()["memory_mb"]
    bench.drop_all()
    return results


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = options(__doc__ or "", threads=2, rounds=5)
    parser.add_argument("--only", nargs="*", help="of prompts, life, 'in a row', queued")
    given = parser.parse_args()
    comfyui = find_comfyui()
    if comfyui is None:
        raise SystemExit("Set COMFYUI_PATH to a ComfyUI work tree.")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        draw_pictures(base / "input" / "cat")
        checkpoint = write_sd15(base / "sd15.safetensors", channel_mult=(1, 2), vae="kl")
        with ComfyServer(
            comfyui, base, checkpoints=[checkpoint], threads=given.threads, preloaded=False
        ) as server:
            bench = Bench(server)
            results = {}
            for name, measure in (
                ("prompts", lambda: prompts(bench, given.rounds)),
                ("life", lambda: life(bench, given.rounds)),
                ("in a row", lambda: in_a_row(bench)),
                ("queued", lambda: queued(bench)),
            ):
                if given.only and name not in given.only:
                    continue
                results[name] = measure()
                told = ", ".join(f"{key} {value:.2f}" for key, value in results[name].items())
                print(f"{name}: {told}", flush=True)
                write_json(given.json, results)


if __name__ == "__main__":
    main()
