"""What the Train and Concept nodes can, `custom-diffusion train` can; and it takes a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from custom_diffusion.cli import main, parser
from custom_diffusion.cli.models import resolution_for
from custom_diffusion.cli.training import training_config
from custom_diffusion.concept.file import read_concept
from custom_diffusion.trainer.config import TrainConfig
from PIL import Image
from support.graphs import draw_pictures
from support.original_names import checkpoint_tensors, small_pipeline, write_checkpoint

pytestmark = pytest.mark.slow

QUICK = ["--steps", "2", "--batch-size", "2", "--resolution", "64", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in one file."""
    tensors = checkpoint_tensors(small_pipeline("sd15"), "sd15")
    return write_checkpoint(tmp_path_factory.mktemp("model") / "sd15.safetensors", tensors)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    draw_pictures(folder)
    return folder


@pytest.fixture
def train(model: Path, photos: Path, tmp_path: Path) -> list[str]:
    words = ["--class-noun", "cat", "--output", str(tmp_path / "cat.safetensors")]
    return ["train", "--model", str(model), "--images", str(photos), *words, *QUICK]


def test_a_checkpoint_is_taught_merged_and_drawn_with(
    train: list[str], model: Path, tmp_path: Path
) -> None:
    cat, dog, both = (tmp_path / f"{name}.safetensors" for name in ("cat", "dog", "both"))
    assert main(train) == 0
    assert main([*train, "--token", "<dog>", "--output", str(dog)]) == 0
    learnt = read_concept(cat)
    assert learnt.family.name == "sd15" and learnt.base_hash
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(f"a red house number {n}" for n in range(40)))
    merge = ["merge", str(cat), str(dog), "--model", str(model), "--captions", str(captions)]
    assert main([*merge, "--output", str(both)]) == 0
    draw = ["sample", "--model", str(model), "--concept", str(both), "--resolution", "64"]
    draw += ["--prompt", "a <new1> cat", "--device", "cpu", "--output", str(tmp_path / "a.png")]
    assert main(draw) == 0
    assert Image.open(tmp_path / "a.png").size == (64, 64)


def test_a_lora_as_a_model_is_one_sentence(
    train: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = write_checkpoint(
        tmp_path / "lora.safetensors", {"lora_unet_x.lora_up.weight": torch.zeros(1)}
    )
    train[train.index("--model") + 1] = str(lora)
    assert main(train) == 1
    said = capsys.readouterr().err
    assert f"{lora} is a LoRA" in said and "Give the checkpoint" in said and "Traceback" not in said


def test_samples_are_drawn_with_prompts_of_ones_own(
    train: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["--preview-every-steps", "1", "--preview-prompts", "a <new1> cat", "a red mug"]
    assert main([*train, *prompts]) == 0
    samples = sorted((tmp_path / "cat-samples").iterdir())
    assert [path.name for path in samples] == ["step-00001.png", "step-00002.png"]
    assert f"saved {samples[0]}" in capsys.readouterr().out
    picture = Image.open(samples[1])
    assert picture.size == (1024, 512)
    left, right = (picture.crop((x, 0, x + 512, 512)).tobytes() for x in (0, 512))
    assert left != right


def test_without_a_word_of_them_no_samples_are_drawn() -> None:
    basic = ["train", "--model", "sd15", "--images", "cat", "--class-noun", "cat"]
    for given, often in (
        ([], 0),
        (["--preview-prompts", "a", "b"], TrainConfig().preview_every_steps),
        (["--preview-every-steps", "7"], 7),
    ):
        config = training_config(parser().parse_args([*basic, *given]))
        assert config.preview_every_steps == often
    assert config.preview_prompts == ""
    config = training_config(parser().parse_args([*basic, "--preview-prompts", "a", "b"]))
    assert config.preview_prompts == "a\nb"


def test_a_thing_and_a_style_are_taught_together(
    train: list[str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = ["--images", str(photos), str(photos), "--class-noun", "cat", "art"]
    assert main([*train, *two, "--kind", "thing", "style"]) == 0
    prompts = read_concept(tmp_path / "cat.safetensors").constraint_prompts
    assert "photo of a <new1> cat" in prompts
    assert "painting in the style of <new2> art" in prompts
    (tmp_path / "cat.safetensors").unlink()
    assert main([*train, *two, "--kind", "thing", "style", "thing"]) == 1
    assert "3 kinds were given for 2 folders" in capsys.readouterr().err


def test_a_job_keeps_what_is_asked_for(
    train: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_the_job = ["--checkpoint-every-steps", "1", "--keep-best", "3"]
    assert main([*train, *of_the_job]) == 1
    assert "--checkpoint-every-steps is a setting of a training that is a job. Give --jobs" in (
        capsys.readouterr().err
    )
    assert main([*train, "--keep-best", "0", "--jobs", str(tmp_path / "jobs")]) == 1
    assert "keep_best=0 is outside 1 to 100" in capsys.readouterr().err
    assert main([*train, *of_the_job, "--jobs", str(tmp_path / "jobs")]) == 0
    (job,) = (tmp_path / "jobs").iterdir()
    assert json.loads((job / "job.json").read_text())["keep_best"] == 3
    assert len(list((job / "concepts").glob("*.safetensors"))) == 2


@pytest.mark.parametrize(
    ("name", "model", "given", "expected"),
    [
        ("pipeline", "sd15.safetensors", [], 512),
        ("xl_pipeline", "sdxl.safetensors", [], 1024),
        ("xl_pipeline", "sdxl.safetensors", ["--resolution", "768"], 768),
        ("pipeline", "miniature", [], 192),
    ],
)
def test_pictures_have_the_resolution_that_suits_the_model(
    request: pytest.FixtureRequest, name: str, model: str, given: list[str], expected: int
) -> None:
    options = parser().parse_args(["sample", "--model", model, "--prompt", "a cat", *given])
    assert resolution_for(options, request.getfixturevalue(name)) == expected
