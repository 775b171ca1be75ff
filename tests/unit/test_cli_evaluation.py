"""`custom-diffusion evaluate` on a small random pipeline, and on what the miniature has learnt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from custom_diffusion.cli import INTERRUPTED, main
from custom_diffusion.composition.routing import Route
from custom_diffusion.concept.file import write_concept
from custom_diffusion.evaluation import trials
from custom_diffusion.evaluation.scores import measure
from custom_diffusion.evaluation.trials import Plan, draw_trials
from custom_diffusion.host.diffusers.sampling import sample
from custom_diffusion.miniature.concepts import concept_pictures
from custom_diffusion.miniature.features import miniature_judge
from custom_diffusion.miniature.laboratory import Laboratory, pair_of_subjects
from custom_diffusion.miniature.model import CONFIG
from custom_diffusion.pictures.tensors import to_hwc, to_picture
from PIL import Image
from safetensors.torch import load_file, save_file
from support.graphs import draw_pictures
from support.judges import write_clip, write_dinov2
from support.made_concepts import concept_for
from support.tiny_models import tiny_pipeline

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a concept, pictures, prompts and two judges."""
    root = tmp_path_factory.mktemp("evaluate")
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(root / "model")
    write_concept(concept_for(pipeline, "<new1>", "cat", 0), root / "cat.safetensors")
    draw_pictures(root / "mine")
    draw_pictures(root / "cats", count=4, seed=1)
    (root / "prompts.txt").write_text("photo of a {}\na {} on snow\n")
    write_clip(root / "clip")
    write_dinov2(root / "dino")
    return root


def evaluate(folder: Path, output: str, *more: str, judge: str = "clip") -> int:
    paths = {
        "model": "model",
        "concept": "cat.safetensors",
        "references": "mine",
        "prompts": "prompts.txt",
        "judge": judge,
        "output": output,
    }
    named = [word for name, path in paths.items() for word in (f"--{name}", str(folder / path))]
    quick = ["--device", "cpu", "--resolution", "64", "--steps", "2", "--seeds", "0", "1"]
    return main(["evaluate", *named, *quick, *more])


def test_figures_pictures_and_a_verdict(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class_pictures = ["--class-pictures", str(folder / "cats"), "--class-count", "3"]
    assert evaluate(folder, "whole", "--strengths", "0.5", "1", *class_pictures) == 0
    said = capsys.readouterr().out
    assert "strength    text alignment" in said and "base model" in said
    assert "Follows prompts" in said and "<new1> cat" in said
    whole = folder / "whole"
    scores = json.loads((whole / "scores.json").read_text())
    assert [one["strength"] for one in scores["strengths"]] == [0, 0.5, 1]
    assert all(isinstance(one["class_kid_x1000"], float) for one in scores["strengths"])
    assert len(list(whole.glob("strength-*/*.png"))) == 4 + 2 * 4 + 3 * 3 - 2
    for name in ("sheet.png", "plot.png"):
        Image.open(whole / name).verify()


def test_concepts_are_routed_and_each_subject_is_compared(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = tiny_pipeline()
    concepts = [
        concept_for(pipeline, "<new1>", "cat", 0),
        concept_for(pipeline, "<new2>", "dog", 1),
    ]
    write_concept(concepts[1], folder / "dog.safetensors")
    both = ["--concept", str(folder / "cat.safetensors"), str(folder / "dog.safetensors")]
    sets = ["--references", str(folder / "mine"), str(folder / "cats")]
    assert evaluate(folder, "together", *both, *sets) == 1
    assert "Add --routed" in capsys.readouterr().err
    assert evaluate(folder, "together", *both, *sets, "--routed") == 0
    said = capsys.readouterr().out
    assert "<new1> cat is itself" in said and "By itself <new2> dog is nearest to your" in said
    scores = json.loads((folder / "together" / "scores.json").read_text())
    base, taught = scores["strengths"]
    assert base["subjects"] is None
    assert set(taught["subjects"]["<new1> cat"]["bleed"]) == {"<new2> dog"}
    prompt = "photo of a <new1> cat and a <new2> dog"
    routes = [Route(one) for one in concepts]
    drawn = sample(pipeline, [prompt], routes=routes, resolution=64, seeds=[1], steps=2)
    (shot,) = (one for one in taught["pictures"] if (one["prompt"], one["seed"]) == (prompt, 1))
    assert shot
    trial = trials.Trial(prompt, 1, 1.0)
    kept = np.asarray(Image.open(trial.path(folder / "together"))).astype(int)
    assert np.abs(kept - np.asarray(to_picture(drawn[0])).astype(int)).max() <= 1


def test_interrupted_it_resumes_and_the_scores_are_those_of_one_go(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save, saved = trials.save_picture, 0

    def interrupted(path: Path, image_hwc: torch.Tensor) -> None:
        nonlocal saved
        if saved == 3:
            raise KeyboardInterrupt
        saved += 1
        save(path, image_hwc)

    monkeypatch.setattr(trials, "save_picture", interrupted)
    assert evaluate(folder, "interrupted") == INTERRUPTED
    kept = {p: p.stat().st_mtime_ns for p in (folder / "interrupted").glob("strength-*/*.png")}
    assert len(kept) == 3
    monkeypatch.setattr(trials, "save_picture", save)
    assert evaluate(folder, "interrupted") == 0
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert evaluate(folder, "straight") == 0
    first, second = (
        json.loads((folder / name / "scores.json").read_text())
        for name in ("interrupted", "straight")
    )
    for one, other in zip(first["strengths"], second["strengths"], strict=True):
        assert one["text_alignment"] == pytest.approx(other["text_alignment"], abs=2e-3)


def test_dinov2_measures_likeness_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(folder, "straight", judge="dino") == 0
    scores = json.loads((folder / "straight" / "scores.json").read_text())
    assert scores["strengths"][0]["text_alignment"] is None
    assert isinstance(scores["strengths"][0]["image_alignment"]["<new1> cat"], float)


def test_a_judge_whose_features_are_no_numbers_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dinov2(folder / "broken")
    file = folder / "broken" / "model.safetensors"
    weights = load_file(file)
    save_file({name: torch.full_like(w, torch.nan) for name, w in weights.items()}, file)
    assert evaluate(folder, "straight", judge="broken") == 1
    assert "DINOv2 broken makes features of pictures 1 and following" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--judge", "nowhere"), "There is no folder nowhere of a feature model"),
        (("--references", "nowhere"), "There is no folder nowhere"),
        (("--references", "{}/mine", "{}/cats"), "2 folders of references were given for 1"),
        (("--strengths", "0"), "Leave out 0"),
        (("--prompts", "nowhere"), "The prompts nowhere cannot be read"),
        (("--output", "{}/mine"), "holds files that were not made here"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_drawn(
    folder: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(folder, "none", *(word.format(folder) for word in words)) == 1
    assert message in capsys.readouterr().err
    assert not (folder / "none").exists()


def test_the_encoder_of_the_model_as_a_judge_is_warned_of(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import CLIPConfig, CLIPModel

    text = tiny_pipeline().text_encoder
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text.config.to_dict(), vision_config=vision, projection_dim=16)
    model = CLIPModel(config)
    rows = text.get_input_embeddings().weight
    model.get_parameter("text_model.embeddings.token_embedding.weight").data.copy_(rows.data)
    model.save_pretrained(folder / "own")
    tiny_pipeline().tokenizer.save_pretrained(folder / "own")
    assert evaluate(folder, "straight", judge="own") == 0
    assert "warning: The judge reads prompts with the text encoder" in capsys.readouterr().out


@pytest.mark.any_version
def test_what_the_miniature_has_learnt_scores_higher_than_the_base_model(tmp_path: Path) -> None:
    laboratory = Laboratory()
    subject, _ = pair_of_subjects(0, 0)
    concept = laboratory.teach([subject], replace(CONFIG, steps=150))
    plan = Plan(concept, ("photo of a {}", "a {} on snow", "photo of a {} at night"), (0, 1))

    def draw(shots: Sequence[trials.Trial]) -> trials.Drawn:
        taught = concept if shots[0].strength else None
        drawn = laboratory.draw([shot.prompt for shot in shots], taught, shots[0].seed)
        return trials.Drawn(drawn.permute(0, 2, 3, 1))

    draw_trials(tmp_path, {}, plan.everything(), draw)
    pictures = [to_picture(one) for one in to_hwc(concept_pictures(subject.look, 6, seed=99))]
    found = measure(plan, tmp_path, miniature_judge(), {subject.words: pictures})
    base, taught = found.scores
    assert base.text is not None and taught.text is not None
    print(base, taught)
    assert taught.image[subject.words].mean() > base.image[subject.words].mean() + 0.08
    assert taught.text.mean() > 0.9 * base.text.mean()
    assert (found.looks_like(taught, subject.words) or 0) > found.looks_like(base, subject.words)


def test_the_distance_of_concepts_is_a_table(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dog = write_concept(
        concept_for(tiny_pipeline(), "<new2>", "dog", 1), tmp_path / "dog.safetensors"
    )
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(f"a cat and {n} dogs in the snow" for n in range(20)))
    words = ["--model", str(folder / "model"), "--captions", str(captions)]
    assert main(["distance", str(folder / "cat.safetensors"), str(dog), *words]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["concepts", "trigger", "words", "overlap", "verdict"]
    assert row.startswith("cat and dog")
    assert main(["distance", str(dog), *words]) == 1
    assert "Give two or more" in capsys.readouterr().err
