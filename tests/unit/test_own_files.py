"""What a job has saved outside its folder: its own is replaced, nothing of anybody else ever is."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from custom_diffusion.concept.atomic import BeforeNaming, nothing, write_atomically
from custom_diffusion.trainer.jobs.own_files import OwnFiles


def write(content: str, path: Path, *, replace: bool, before_naming: BeforeNaming) -> None:
    write_atomically(
        path,
        lambda temporary: temporary.write_text(content),
        replace=replace,
        before_naming=before_naming,
    )


class Saving:
    """A job that saves texts as `cat`."""

    def __init__(self, base: Path, job: str = "job") -> None:
        self.record = base / f"{job}.json"
        self.folder = base / "models"

    def __call__(self, content: str) -> Path:
        own_files = OwnFiles(self.record)  # as after a restart
        return own_files.write_named(self.folder, "cat", partial(write, content))

    def files(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in self.folder.iterdir()}


@pytest.fixture
def save(tmp_path: Path) -> Saving:
    return Saving(tmp_path)


def test_a_job_that_goes_on_replaces_what_it_had_saved(save: Saving) -> None:
    for steps in ("12 steps", "20 steps", "25 steps"):
        assert save(steps).name == "cat.safetensors"
        assert save.files() == {"cat.safetensors": steps}


def test_of_two_jobs_of_one_name_each_has_its_file(save: Saving, tmp_path: Path) -> None:
    other = Saving(tmp_path, "other")
    assert save("12 steps").name == "cat.safetensors"
    assert other("of other pictures").name == "cat-2.safetensors"
    assert save("20 steps").name == "cat.safetensors"
    assert other("of other pictures, more").name == "cat-2.safetensors"
    assert len(save.files()) == 2


@pytest.mark.parametrize("change", ["edited", "replaced", "renamed", "renamed and replaced"])
def test_what_somebody_has_changed_since_is_left_alone(save: Saving, change: str) -> None:
    file = save("12 steps")
    if "renamed" in change:
        file.rename(file.with_name("mine.safetensors"))
    if "replaced" in change:
        file.write_text("of somebody else")
    if change == "edited":
        file.write_text("12 steps, and a note")
    before = save.files()
    path = save("20 steps")
    after = save.files()
    assert after.pop(path.name) == "20 steps"
    assert after == before
    assert path.name == ("cat.safetensors" if change == "renamed" else "cat-2.safetensors")
    # From then on that is the job's file.
    assert save("25 steps") == path


def test_a_file_under_its_name_is_known_as_lost_only_where_it_is_another(save: Saving) -> None:
    own_files = OwnFiles(save.record)
    somewhere = save.folder / "cat.safetensors"
    assert not own_files.has_lost(somewhere) and not own_files.holds(somewhere)
    file = save("12 steps")
    assert own_files.holds(file) and not own_files.has_lost(file)
    file.write_text("other")
    assert own_files.has_lost(file) and not own_files.holds(file)


def test_exactly_there_or_not_at_all(save: Saving) -> None:
    own_files, path = OwnFiles(save.record), save.folder / "cat.safetensors"
    own_files.write(path, partial(write, "12 steps"))
    own_files.write(path, partial(write, "20 steps"))
    path.write_text("of somebody else")
    with pytest.raises(FileExistsError):
        own_files.write(path, partial(write, "25 steps"))
    assert save.files() == {"cat.safetensors": "of somebody else"}


_DIES = """
import os, sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {unit!r}]
import conftest
from test_own_files import Saving
calls = 0
real = os.replace
def replace(*paths):
    global calls
    calls += 1
    if calls == {dies_at}:
        if {after}:
            real(*paths)
        os._exit(9)
    return real(*paths)
os.replace = replace
Saving(Path({base!r}))("20 steps")
"""


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("dies_at", [1, 2])
def test_a_process_that_dies_half_way_through_leaves_one_file_to_go_on_with(
    save: Saving, tmp_path: Path, dies_at: int, after: bool
) -> None:
    """Before and after each of the two renamings: that of the record, and that of the file."""
    save("12 steps")
    unit, tests = Path(__file__).parents[:2]
    script = _DIES.format(
        unit=str(unit), tests=str(tests), dies_at=dies_at, after=after, base=str(tmp_path)
    )
    died = subprocess.run([sys.executable, "-c", script], check=False)
    assert died.returncode == 9
    assert save("25 steps").name == "cat.safetensors"
    named = {name: text for name, text in save.files().items() if not name.endswith(".tmp")}
    assert named == {"cat.safetensors": "25 steps"}


@pytest.mark.parametrize("record", ["", "[]", "{", '{"cat": 5}', "[" * 100_000])
def test_with_a_damaged_record_nothing_is_taken_for_the_jobs(save: Saving, record: str) -> None:
    save("12 steps")
    save.record.write_text(record)
    assert save("20 steps").name == "cat-2.safetensors"


def test_the_record_does_not_grow(save: Saving) -> None:
    for number in range(20):
        save(f"{number} steps")
    (digests,) = json.loads(save.record.read_text()).values()
    assert len(digests) == 2


def test_nothing_is_done_before_naming_unless_asked(tmp_path: Path) -> None:
    write("text", tmp_path / "a", replace=True, before_naming=nothing)
    assert (tmp_path / "a").read_text() == "text"
