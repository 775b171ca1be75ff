"""The command line from end to end, on a small random pipeline saved in diffusers' layout."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from shutil import copy, copytree

import pytest
import torch
from custom_diffusion.cli import main, parser
from custom_diffusion.cli.demo import what_next
from custom_diffusion.cli.models import precision, recipe_for
from custom_diffusion.cli.training import training_config
from custom_diffusion.concept.file import read_concept
from custom_diffusion.miniature import demo
from PIL import Image
from safetensors.torch import load_file, save_file
from support.clip_weights import write_text_half
from support.graphs import draw_pictures
from support.tiny_models import tiny_pipeline

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--steps", "2", "--batch-size", "2", "--resolution", "64", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    draw_pictures(folder)
    return folder


def teach(model: Path, photos: Path, noun: str, token: str, output: Path) -> int:
    words = ["--class-noun", noun, "--token", token, "--output", str(output)]
    return main(["train", "--model", str(model), "--images", str(photos), *words, *QUICK])


def test_two_concepts_are_taught_merged_inspected_and_drawn(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cat, dog, both = (tmp_path / f"{name}.safetensors" for name in ("cat", "dog", "both"))
    assert teach(model, photos, "cat", "<new1>", cat) == 0
    assert teach(model, photos, "dog", "<new2>", dog) == 0
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(f"a red house number {n}" for n in range(40)))
    merge = ["merge", str(cat), str(dog), "--model", str(model), "--captions", str(captions)]
    assert main([*merge, "--output", str(both)]) == 0
    assert "constraint rows" in capsys.readouterr().out
    assert [token.name for token in read_concept(both).tokens] == ["<new1>", "<new2>"]

    assert main(["inspect", str(both)]) == 0
    told = capsys.readouterr().out
    assert "<new1> cat" in told and "Stable Diffusion 1.x" in told and "rank 8" in told

    picture = tmp_path / "picture.png"
    sample = ["sample", "--model", str(model), "--concept", str(both), "--resolution", "64"]
    drawn = ["--prompt", "a <new1> cat", "--count", "2", "--output", str(picture)]
    assert main([*sample, *drawn, "--device", "cpu"]) == 0
    assert Image.open(picture).size == (128, 64)


@pytest.mark.any_version
def test_a_training_says_what_the_concept_node_says_of_its_pictures(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for picture in sorted(photos.glob("*.png"))[:2]:
        copy(picture, tmp_path)
    (tmp_path / "a.heic").write_bytes(b"x")
    (next(tmp_path.glob("*.png"))).with_suffix(".caption").write_text("a <new1> cat (red:1.3)")
    assert teach(model, tmp_path, "cat", "<new1>", tmp_path / "cat.safetensors") == 0
    said = capsys.readouterr().err
    assert f"note: {tmp_path}: Not read, because of their kind: 1 .heic." in said
    assert "note: 2 pictures are few" in said
    assert "note: Captions have no weights or choices" in said and "'(red:1.3)'" in said
    refused = ["train", "--model", str(model), "--images", str(photos), "--class-noun", "cat"]
    assert main([*refused, "--regularization", str(photos)]) == 1
    assert "as pictures of the concept and as regularization" in capsys.readouterr().err


def test_a_training_goes_on_from_a_concept(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cat, both = tmp_path / "cat.safetensors", tmp_path / "both.safetensors"
    assert teach(model, photos, "cat", "<new1>", cat) == 0
    dog = ["--class-noun", "dog", "--token", "<new2>", "--output", str(both), *QUICK]
    more = ["train", "--model", str(model), "--images", str(photos), "--start", str(cat), *dog]
    assert main([*more, "--micro-batch-size", "1", "--gradient-checkpointing"]) == 0
    learnt = read_concept(both)
    assert [token.name for token in learnt.tokens] == ["<new1>", "<new2>"]
    settings = learnt.provenance["config"]
    assert settings["micro_batch_size"] == 1 and settings["gradient_checkpointing"]
    capsys.readouterr()

    both.unlink()
    cat.unlink()
    words = ["--class-noun", "cat", "--whole", "--output", str(cat), *QUICK]
    assert main(["train", "--model", str(model), "--images", str(photos), *words]) == 0
    capsys.readouterr()
    assert main([*more, "--method", "low-rank"]) == 1
    told = capsys.readouterr().err
    assert "no low rank" in told and "encoding" not in told


def test_a_regularization_set_is_retrieved_from_a_collection(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the text half of a random CLIP, which finds a caption itself at least."""
    collection = tmp_path / "collection"
    for folder, caption in (("a", "photo of a cat"), ("b", "a dog on the beach")):
        shutil.copytree(photos, collection / folder)
        for picture in (collection / folder).glob("*.png"):
            picture.with_suffix(".txt").write_text(caption)
    weights = write_text_half(tmp_path / "clip" / "weights.safetensors")

    command = ["retrieve", "--collection", str(collection), "--class-noun", "cat"]
    command += ["--clip-weights", str(weights)]
    command += ["--index", str(tmp_path / "index"), "--device", "cpu", "--similarity", "0.999"]
    assert main([*command, "--output", str(tmp_path / "set")]) == 0
    assert "3 of 6 pictures" in capsys.readouterr().out
    assert {p.read_text() for p in (tmp_path / "set").glob("*.txt")} == {"photo of a cat"}
    assert main([*command, "--prompt", "a mug", "--output", str(tmp_path / "other")]) == 1
    assert "as near as 0.999" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--clip", "hf-hub:owner/repo", "--output", str(tmp_path / "none")])
    assert "invalid choice: 'hf-hub:owner/repo'" in capsys.readouterr().err


def test_methods_keep_their_proportions_on_the_miniature() -> None:
    """DreamBooth's rate is a sixteenth of that at which all of cross-attention learns, wherever it
    is used.
    """
    ours, dreambooth = (recipe_for("miniature", m) for m in ("cross-attention", "dreambooth"))
    assert dreambooth.learning_rate == pytest.approx(ours.learning_rate / 16)
    assert recipe_for("miniature", "low-rank").gradient_cut == "own words"


def test_a_whole_unet_is_saved_loaded_and_drawn_with(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, unet = tmp_path / "cat.safetensors", tmp_path / "cat-unet.safetensors"
    train = ["train", "--model", str(model), "--images", str(photos), "--class-noun", "cat"]
    train += ["--method", "fine-tune all", "--output", str(words), *QUICK]
    assert main([*train, "--learning-rate", "1e-3"]) == 0
    assert "the whole UNet" in capsys.readouterr().out
    learnt = read_concept(words)
    assert not learnt.deltas and learnt.provenance["method"] == "fine-tune all"
    own = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    taught = load_file(unet)
    assert own.keys() == taught.keys()
    assert {tensor.dtype for tensor in taught.values()} == {torch.float16}
    assert all(not torch.equal(own[name], taught[name].float()) for name in own)

    assert main([*train]) == 1
    assert "exists already" in capsys.readouterr().err
    pictures = []
    for extra in ([], ["--unet", str(unet)]):
        path = tmp_path / f"{len(pictures)}.png"
        draw = ["sample", "--model", str(model), "--concept", str(words), "--resolution", "64"]
        draw += ["--prompt", "a <new1> cat", "--device", "cpu", "--output", str(path)]
        assert main([*draw, *extra]) == 0
        pictures.append(path.read_bytes())
    assert pictures[0] != pictures[1]
    path.unlink()
    assert main([*draw, "--unet", str(words)]) == 1
    assert "holds no UNet" in capsys.readouterr().err


@pytest.mark.any_version
def test_a_regularization_set_is_drawn_gone_on_with_and_used(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = tmp_path / "others"
    command = ["regularize", "--model", str(model), "--class-noun", "cat", "--steps", "2"]
    command += ["--resolution", "64", "--device", "cpu", "--output", str(others)]
    assert main([*command, "--count", "3"]) == 0
    before = {path: path.read_bytes() for path in others.iterdir()}
    assert main([*command, "--count", "6"]) == 0
    assert "6 pictures" in capsys.readouterr().out
    after = {path: path.read_bytes() for path in others.iterdir()}
    assert before.items() <= after.items()
    assert len({content for path, content in after.items() if path.suffix == ".png"}) == 6

    train = ["train", "--model", str(model), "--images", str(photos), "--class-noun", "cat"]
    train += ["--regularization", str(others), "--output", str(tmp_path / "cat.safetensors")]
    assert main([*train, *QUICK, "--gradient-cut", "start"]) == 0
    learnt = read_concept(tmp_path / "cat.safetensors")
    assert learnt.provenance["regularization_images"] == 6

    assert main([*command, "--count", "6", "--seed", "9"]) == 1
    assert "other settings" in capsys.readouterr().err
    for part, name in (("vae", "decoder.conv_out.bias"), ("text_encoder", "final_layer_norm.bias")):
        other = tmp_path / part
        copytree(model, other)
        (file,) = (other / part).glob("*.safetensors")
        weights = load_file(file)
        weights[next(key for key in weights if key.endswith(name))] += 0.1
        save_file(weights, file, {"format": "pt"})
        changed = [str(other) if word == str(model) else word for word in command]
        assert main([*changed, "--count", "6"]) == 1
        assert "other settings" in capsys.readouterr().err


@pytest.mark.any_version
def test_concepts_are_taught_together_and_a_category_without_a_token(
    model: Path, photos: Path, tmp_path: Path
) -> None:
    path = tmp_path / "both.safetensors"
    command = ["train", "--model", str(model), "--images", str(photos), str(photos)]
    command += ["--class-noun", "art", "moongate", "--token", "<ink>", "", "--style"]
    assert main([*command, "--output", str(path), *QUICK]) == 0
    both = read_concept(path)
    assert [token.name for token in both.tokens] == ["<ink>"]
    assert both.constraint_prompts == (
        "<ink> art",
        "painting in the style of <ink> art",
        "moongate",
        "painting in the style of moongate",
    )


@pytest.mark.any_version
def test_equal_tokens_can_be_renamed_in_a_merge(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, both = (tmp_path / f"{name}.safetensors" for name in ("one", "two", "both"))
    assert teach(model, photos, "cat", "<new1>", one) == 0
    copy(one, two)
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(f"a red house number {n}" for n in range(40)))
    merge = ["merge", str(one), str(two), "--model", str(model), "--output", str(both)]
    merge += ["--captions", str(captions)]
    unloaded = ["merge", str(one), str(two), "--model", "nowhere", "--output", str(both)]
    capsys.readouterr()
    assert main(unloaded) == 1
    assert "--tokens" in capsys.readouterr().err, "said before the model is looked for"
    assert main(merge) == 1
    assert not both.exists()
    assert main([*merge, "--tokens", "<tom>"]) == 1
    assert main([*merge, "--tokens", "<tom>", "<jerry>"]) == 0
    assert [token.name for token in read_concept(both).tokens] == ["<tom>", "<jerry>"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "missing.safetensors"], "There is no concept file"),
        (["jobs", "list", "missing"], "There is no folder missing. Give a folder of jobs"),
        (["merge", "missing.safetensors", "--model", "x"], "There is no concept file"),
        (["train", "--model", "x", "--images", "none", "--class-noun", "cat"], "no folder none"),
        (
            ["train", "--model", "x", "--images", "a", "b", "--class-noun", "cat"],
            "1 class nouns were given for 2 folders of pictures. Give one for each.",
        ),
    ],
)
def test_errors_are_one_message_and_exit_status_one(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "given", "augment", "flip"),
    [
        ("sd15", [], True, True),
        ("sd15", ["--no-augment"], False, True),
        ("sd15", ["--no-flip"], True, False),
        ("miniature", [], False, False),
    ],
)
def test_augmentation_is_the_models_recipe_unless_it_is_switched_off(
    model: str, given: list[str], augment: bool, flip: bool
) -> None:
    command = ["train", "--model", model, "--images", "cat", "--class-noun", "cat", *given]
    config = training_config(parser().parse_args(command))
    assert (config.augment, config.flip) == (augment, flip)


@pytest.mark.parametrize(
    "given, device, has_bf16, wanted",
    [
        (None, "cpu", True, torch.float32),
        (None, "cuda:1", True, torch.bfloat16),
        (None, "cuda", False, torch.float32),
        ("float32", "cuda", True, torch.float32),
        ("bfloat16", "cpu", False, torch.bfloat16),
    ],
)
def test_precision_suits_the_device_unless_it_is_given(
    given: str | None,
    device: str,
    has_bf16: bool,
    wanted: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bf16)
    assert precision(given, device) == wanted


def test_an_existing_file_is_not_replaced(model: Path, photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "cat.safetensors"
    path.write_bytes(b"precious")
    assert teach(model, photos, "cat", "<new1>", path) == 1
    assert path.read_bytes() == b"precious"


@pytest.mark.any_version
def test_ctrl_c_saves_what_was_learnt(model: Path, photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "cat.safetensors"
    command = ["train", "--model", str(model), "--images", str(photos), "--class-noun", "cat"]
    command += ["--output", str(path), "--steps", "100000", "--batch-size", "1"]
    command += ["--resolution", "64", "--device", "cpu"]
    assert interrupted(command, b"loss=", tmp_path) == 0  # at the bar of the first steps
    assert 1 <= read_concept(path).provenance["steps"] < 100_000


@pytest.mark.any_version
def test_a_training_that_is_a_job_goes_on_where_it_was_interrupted(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs, paused, whole = tmp_path / "jobs", tmp_path / "cat.safetensors", tmp_path / "whole"
    command = ["train", "--model", str(model), "--images", str(photos), "--class-noun", "cat"]
    command += ["--steps", "60", "--batch-size", "2", "--resolution", "64", "--device", "cpu"]
    as_job = [*command, "--jobs", str(jobs), "--output", str(paused)]
    assert interrupted(as_job, b"training:", tmp_path) == 0
    assert not paused.exists()
    (folder,) = jobs.iterdir()
    assert main(["jobs", "list", str(jobs)]) == 0
    line = capsys.readouterr().out
    assert line.startswith(f"{folder.name}  paused") and "of     60 steps" in line
    assert main(as_job) == 0
    assert "finished" in capsys.readouterr().out
    assert list(jobs.iterdir()) == [folder]
    assert main([*command, "--output", str(whole)]) == 0
    ours, theirs = load_file(paused), load_file(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    capsys.readouterr()
    assert main(["jobs", "losses", str(jobs), folder.name]) == 0
    assert len(capsys.readouterr().out.split()) == 60
    assert main(["jobs", "show", str(jobs), folder.name]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["state"], shown["config"]["steps"]) == ("finished", 60)
    for action in (["pause"], ["resume"], ["start"], ["move", "0"]):  # nobody works on it
        assert main(["jobs", action[0], str(jobs), folder.name, *action[1:]]) == 1
        assert folder.name in capsys.readouterr().err
    assert main(["jobs", "delete", str(jobs), folder.name]) == 0
    assert list(jobs.iterdir()) == []
    assert main(["jobs", "show", str(jobs), folder.name]) == 1
    assert "There is no training job" in capsys.readouterr().err


@pytest.mark.any_version
def test_a_job_that_is_run_again_replaces_its_own_file_and_no_other(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs, path = tmp_path / "jobs", tmp_path / "cat.safetensors"
    command = ["train", "--model", str(model), "--images", str(photos), "--class-noun", "cat"]
    command += ["--batch-size", "1", "--resolution", "64", "--device", "cpu"]
    command += ["--jobs", str(jobs), "--output", str(path), "--steps"]
    assert main([*command, "2"]) == 0
    (folder,) = jobs.iterdir()
    first = path.read_bytes()

    assert main([*command, "2"]) == 0  # there is nothing to do
    assert path.read_bytes() == first
    # As if the process had died between saving and saying so.
    (folder / "outcome.json").unlink()
    assert main([*command, "2"]) == 0
    assert list(jobs.iterdir()) == [folder]
    capsys.readouterr()

    assert main([*command, "3"]) == 1  # another job
    assert "exists already" in capsys.readouterr().err
    path.write_bytes(path.read_bytes() + b" ")
    edited = path.read_bytes()
    for outcome in (True, False):
        if not outcome:
            (folder / "outcome.json").unlink()
        assert main([*command, "2"]) == 1
        assert "exists already" in capsys.readouterr().err
        assert path.read_bytes() == edited


def interrupted(command: list[str], when_seen: bytes, folder: Path) -> int:
    """Exit status of a command that is sent Ctrl-C shortly after it has written these words."""
    package = folder / "package"
    package.mkdir()
    (package / "custom_diffusion").symlink_to(ROOT, target_is_directory=True)
    with subprocess.Popen(
        [sys.executable, "-m", "custom_diffusion", *command],
        cwd=folder,
        # On one thread as the tests: with another number of them sums round differently.
        env={
            **os.environ,
            "PYTHONPATH": str(package),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        },
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stderr is not None
        seen = b""
        while when_seen not in seen:
            seen += process.stderr.read1(4096)
            assert process.poll() is None, seen.decode()
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        process.stderr.read()
        return process.wait(60)


def test_an_interrupted_command_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("custom_diffusion.miniature.demo.run_demo", interrupt)
    assert main(["demo", "--output", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.any_version
def test_the_demo_leaves_concepts_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they show is for test_fidelity.py; here two steps are enough."""
    monkeypatch.setattr(demo, "CONFIG", replace(demo.CONFIG, steps=2))
    monkeypatch.setattr(demo, "SAMPLING_STEPS", 2)
    picture = demo.run_demo(tmp_path)
    assert Image.open(picture).width > 500
    files = {path.stem: path for path in tmp_path.glob("*.safetensors")}
    both = read_concept(files.pop("both"))
    assert [token.class_noun for token in both.tokens] == [
        read_concept(file).tokens[0].class_noun
        for file in sorted(files.values(), key=lambda file: file.stat().st_mtime_ns)
    ]
    for shape in files:
        assert len(list((tmp_path / shape).glob("*.png"))) == 8

    said = what_next(picture, tmp_path / "both.safetensors")
    assert str(picture) in said
    examples = [shlex.split(line) for line in said.splitlines() if " --model " in line]
    draw, train = (
        line[line.index(command) :]
        for command, line in zip(("sample", "train"), examples, strict=True)
    )
    assert callable(parser().parse_args(train).command)
    monkeypatch.chdir(tmp_path)
    assert main(draw) == 0
    assert (tmp_path / "sample.png").is_file()


@pytest.mark.any_version
def test_ctrl_c_in_the_demo_leaves_only_whole_files(tmp_path: Path) -> None:
    assert interrupted(["demo", "--output", "demo"], b"2/", tmp_path) == 130
    left = [path for path in (tmp_path / "demo").rglob("*") if path.is_file()]
    assert left and {path.suffix for path in left} <= {".png", ".safetensors"}
    for path in left:
        if path.suffix == ".png":
            Image.open(path).load()
        else:
            read_concept(path)  # the first shape may have been learnt by then


def test_the_miniature_is_a_model_like_any_other(tmp_path: Path) -> None:
    folder = tmp_path / "crosses"
    draw_pictures(folder)
    concept, picture = tmp_path / "cross.safetensors", tmp_path / "cross.png"
    words = ["--class-noun", "cross", "--output", str(concept), "--steps", "2"]
    assert main(["train", "--model", "miniature", "--images", str(folder), *words]) == 0
    assert read_concept(concept).family.name == "miniature"
    both = tmp_path / "both.safetensors"
    alike = [str(concept), str(concept), "--tokens", "<a>", "<b>"]
    assert main(["merge", *alike, "--model", "miniature", "--output", str(both)]) == 0
    prompt = ["--prompt", "photo of a <a> cross", "--output", str(picture)]
    assert main(["sample", "--model", "miniature", "--concept", str(both), *prompt]) == 0
    assert Image.open(picture).size == (192, 192)
    locked = tmp_path / "locked.safetensors"
    assert main(["lock-keys", str(both), "--model", "miniature", "--output", str(locked)]) == 0
    assert read_concept(locked).provenance["keys"] == "locked"


def test_words_of_a_model_are_edited_and_restored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, none = (tmp_path / f"{name}.safetensors" for name in ("one", "two", "none"))
    edit = ["edit", "--model", "miniature"]
    asked = ["--erase", "square", "--replace", "cross=circle", "--preserve", "triangle"]
    assert main([*edit, *asked, "--output", str(one)]) == 0
    said = capsys.readouterr().out
    assert "'square' erased" in said and "'cross' replaced by 'circle'" in said
    assert read_concept(one).describe().startswith("edit of cross, square")
    more = ["--earlier", str(one), "--restore", "square=1", "--debias", "circle=red:0.3,blue:-0.3"]
    assert main([*edit, *more, "--output", str(two)]) == 0
    assert read_concept(two).describe().startswith("edit of circle, cross")
    back = ["--earlier", str(one), "--restore", "square=1", "--restore", "cross=1"]
    assert main([*edit, *back, "--output", str(none)]) == 0
    assert all(delta.is_zero() for delta in read_concept(none).deltas.values())
    capsys.readouterr()
    assert main([*edit, "--restore", "square=1", "--output", str(tmp_path / "x")]) == 1
    assert "no earlier edit" in capsys.readouterr().err
    assert main([*edit, "--moderate", "square", "--output", str(tmp_path / "x")]) == 1
    assert "has no '='" in capsys.readouterr().err
