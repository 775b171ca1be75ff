"""Evaluate Concept in a real ComfyUI: its pictures are KSampler's, its features CLIP Vision's."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from custom_diffusion.composition.routing import Route
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.errors import (
    ConfigError,
    DataError,
    IncompatibleModelError,
)
from custom_diffusion.concept.file import write_concept
from custom_diffusion.pictures.tensors import to_picture, to_tensor
from custom_diffusion.trainer.data.captioned import CaptionedImage
from custom_diffusion.trainer.data.training_concept import TrainingConcept
from PIL import Image
from safetensors.torch import load_file, save_file
from support.comfy_server import ComfyPromptError, ComfyServer
from support.graphs import Graph, draw, draw_pictures, node, teach
from support.made_concepts import made_concept

LAYER = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
CHECKPOINT = {"model": ["checkpoint", 0], "clip": ["checkpoint", 1], "vae": ["checkpoint", 2]}


def cat() -> Concept:
    return made_concept({LAYER: (320, 768)})


def dog() -> Concept:
    return made_concept({LAYER: (320, 768)}, "<new2>", "dog", seed=1)


@pytest.fixture(scope="module")
def bench(
    comfyui_path: Path, checkpoint_file: Callable[[str], Path], base: Path
) -> Iterator[ComfyServer]:
    """A server that forgets results, with a concept and pictures to compare with."""
    draw_pictures(base / "input" / "mine")
    captions = [f"a cat and {number} dogs" for number in range(20)]
    (base / "input" / "captions.txt").write_text("\n".join(captions))
    concepts = base / "models" / "custom_diffusion"
    write_concept(cat(), concepts / "cat.safetensors")
    write_concept(dog(), concepts / "dog.safetensors")
    with ComfyServer(
        comfyui_path, base, checkpoints=[checkpoint_file("sd15")], arguments=["--cache-none"]
    ) as running:
        yield running


def evaluated(**changes: Any) -> Graph:
    settings = {
        "reference_folder": "mine",
        "class_folder": "none",
        "prompts": "photo of a {}",
        "strengths": "1",
        "seed": 7,
        "pictures_per_prompt": 1,
        "steps": 2,
        "cfg": 5.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "resolution": 64,
        "batch_size": 2,
        **changes,
    }
    return {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name="sd15.safetensors"),
        "concept": node("LoadConcept", concept_name="cat.safetensors", rename_token=""),
        "evaluated": node("EvaluateConcept", **CHECKPOINT, concept=["concept", 0], **settings),
    }


def drawn(server: ComfyServer, strength: str = "*") -> dict[Path, int]:
    """Pictures, and when each was written."""
    root = server.output / "custom_diffusion" / "evaluation"
    return {path: path.stat().st_mtime_ns for path in root.glob(f"*/strength-{strength}/*.png")}


def test_its_pictures_are_those_of_ksampler_and_it_says_which_judge_to_get(
    bench: ComfyServer,
) -> None:
    graph = evaluated()
    graph["image"] = node("SaveImage", images=["evaluated", 2], filename_prefix="sheet")
    history = bench.run(graph)
    (text,) = history["outputs"]["evaluated"]["text"]
    assert "models/clip_vision" in text and "Nothing is downloaded" in text
    (shown,) = bench.images(history, "image")
    assert shown.shape[1] == 190 + 3 * 166  # three references

    ((with_concept, _),) = drawn(bench, "1").items()
    ((without, _),) = drawn(bench, "0").items()
    assert with_concept.parents[1].name.startswith("new1--cat-")
    stock = draw("photo of a <new1> cat", ["concept", 0]) | {"concept": graph["concept"]}
    for path, wanted in ((with_concept, stock), (without, draw("photo of a cat"))):
        (image,) = bench.images(bench.run(wanted), "image")
        own = np.asarray(Image.open(path)).astype(int)
        assert np.abs(own - image.astype(int)).max() <= 1


def test_concepts_that_are_routed_together_and_their_references_are_sockets(
    bench: ComfyServer,
) -> None:
    graph = evaluated(reference_folder="none", use="routed")
    graph["dog"] = node("LoadConcept", concept_name="dog.safetensors", rename_token="")
    for number, (key, noun, token) in enumerate((("a", "cat", "<new1>"), ("b", "dog", "<new2>"))):
        graph[key] = teach(key, "mine", noun, token)[f"{key}-data"]
        graph["evaluated"]["inputs"][f"subjects.subject{number}"] = [key, 0]
    graph["evaluated"]["inputs"]["more_concepts.more_concept0"] = ["dog", 0]
    bench.run(graph)
    (folder,) = {path.parents[1].name for path in drawn(bench, "1") if "dog" in str(path)}
    assert folder.startswith("new1--cat-and--new2--dog-")


def test_interrupted_it_keeps_what_is_drawn_and_goes_on(bench: ComfyServer) -> None:
    before = set(drawn(bench))
    prompt = bench.queue(evaluated(cfg=4.0, pictures_per_prompt=30, batch_size=1))
    end = time.monotonic() + 240
    while len(set(drawn(bench)) - before) < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    bench.interrupt(prompt)
    with pytest.raises(ComfyPromptError):
        bench.wait(prompt)
    kept = {path: time for path, time in drawn(bench).items() if path not in before}
    assert 2 <= len(kept) < 60
    bench.run(evaluated(cfg=4.0, pictures_per_prompt=1))
    after = drawn(bench)
    assert kept.items() <= after.items()
    assert len(set(after) - set(kept) - before) <= 1  # that of the concept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference_folder": "none"}, "There are no reference pictures to compare with"),
        ({"strengths": "one"}, "The strengths 'one' are no numbers"),
        ({"strengths": "0, 1"}, "Leave out 0"),
    ],
)
def test_what_is_wrong_is_said_on_the_node(
    bench: ComfyServer, changes: dict[str, str], message: str
) -> None:
    before = drawn(bench)
    with pytest.raises(ComfyPromptError, match=message):
        bench.run(evaluated(**changes))
    assert drawn(bench) == before


def test_the_distance_of_two_concepts_is_told(bench: ComfyServer) -> None:
    concepts = {
        name: node("LoadConcept", concept_name=f"{name}.safetensors", rename_token="")
        for name in ("cat", "dog")
    }
    distance = node("ConceptDistance", clip=["checkpoint", 1], concept=["cat", 0], other=["dog", 0])
    distance["inputs"]["regularization_captions"] = "captions.txt"
    checkpoint = {"checkpoint": evaluated()["checkpoint"]}
    history = bench.run({**checkpoint, **concepts, "distance": distance})
    (text,) = history["outputs"]["distance"]["text"]
    _, row = text.splitlines()
    names, words, overlap, verdict = row.split("\t")
    assert "<new1> cat" in names and "<new2> dog" in names
    assert -1 <= float(words) <= 1 and 0 <= float(overlap) <= 1 and verdict


@pytest.fixture(scope="module")
def vision(comfy: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Any]:
    """ComfyUI's own CLIP_VISION, small and with random weights, of a projection of this width."""
    import comfy.clip_vision

    def make(width: int) -> Any:
        config = {
            **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
            **{"num_attention_heads": 2, "num_channels": 3, "image_size": 32, "patch_size": 8},
            **{"hidden_act": "quick_gelu", "projection_dim": width, "layer_norm_eps": 1e-5},
            "model_type": "clip_vision_model",
        }
        file = tmp_path_factory.mktemp("vision") / "config.json"
        file.write_text(json.dumps(config))
        model = comfy.clip_vision.ClipVisionModel(str(file))
        draw = torch.Generator().manual_seed(0)
        shapes = model.get_sd().items()
        model.load_sd({k: 0.1 * torch.randn(v.shape, generator=draw) for k, v in shapes})
        return model

    return make


@pytest.fixture(scope="module")
def whole_text_half(
    comfy: Any,
    checkpoint_file: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """The checkpoint's own text encoder with a projection, from a file as clip_l.safetensors is."""
    start = "cond_stage_model.transformer."
    weights = load_file(checkpoint_file("sd15"))
    text = {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
    draw = torch.Generator().manual_seed(0)
    text["text_projection.weight"] = torch.randn(768, 768, generator=draw) / 768**0.5
    file = tmp_path_factory.mktemp("clip") / "clip_l.safetensors"
    save_file({k: v.contiguous() for k, v in text.items()}, file)
    with torch.inference_mode():
        return comfy.sd.load_clip([str(file)], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)


@pytest.fixture
def evaluate(sd15: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`host.comfyui.evaluation.evaluate` with a folder of its own."""
    from custom_diffusion.host.comfyui import evaluation
    from custom_diffusion.host.comfyui.drawing import Sampling

    monkeypatch.setattr(evaluation, "evaluation_folder", lambda: tmp_path)

    def run(concepts: Sequence[Concept] = (cat(),), **changes: Any) -> Any:
        settings = {
            "routed": False,
            "subjects": (),
            "references": torch.rand(2, 48, 40, 3, generator=torch.Generator().manual_seed(0)),
            "reference_folder": "none",
            "class_folder": "none",
            "prompts": "photo of a {}",
            "strengths": "1",
            "seed": 0,
            "pictures_per_prompt": 1,
            "batch_size": 1,
            **changes,
        }
        sampling = Sampling(1, 1.0, "euler", "normal", 64)
        with torch.inference_mode():
            models = (sd15.model, sd15.clip, sd15.vae)
            return evaluation.evaluate(*models, concepts, sampling, **settings)

    return run


def unit(features: torch.Tensor) -> torch.Tensor:
    return features / features.norm(dim=-1, keepdim=True)


def test_likeness_and_text_are_cosines_of_comfyuis_own_features(
    evaluate: Callable[..., Any], vision: Callable[[int], Any], whole_text_half: Any
) -> None:
    eyes, references = vision(768), torch.rand(2, 48, 40, 3).mul(255).round().div(255)
    found = evaluate(references=references, clip_vision=eyes, judge_clip=whole_text_half)
    head, _, row = found.table
    assert head == ("strength", "text alignment", "image alignment", "looks like it")
    scores = json.loads((found.folder / "scores.json").read_text())["strengths"][1]
    (path,) = found.folder.glob("strength-1/*.png")
    picture = torch.from_numpy(np.array(Image.open(path))).float()[None] / 255
    with torch.inference_mode():
        seen, known = (unit(eyes.encode_image(x)["image_embeds"]) for x in (picture, references))
        tokens = whole_text_half.tokenize("photo of a cat")
        text = unit(whole_text_half.encode_from_tokens(tokens, return_pooled=True)[1])
    assert scores["image_alignment"]["<new1> cat"] == pytest.approx(
        float((seen @ known.T).mean()), abs=1e-4
    )
    assert scores["text_alignment"] == pytest.approx(2.5 * max(0.0, float(seen @ text.T)), abs=1e-4)
    assert any("text encoder of the model that it judges" in one for one in found.warnings)
    assert found.plot.shape == (1, 800, 1360, 3) and found.sheet.shape[0] == 1
    assert found.lines[0].startswith("Strength 1. Follows prompts")


def test_a_checkpoints_clip_without_a_projection_measures_no_text(
    evaluate: Callable[..., Any], vision: Callable[[int], Any], sd15: Any
) -> None:
    weight = sd15.clip.cond_stage_model.clip_l.transformer.text_projection.weight
    with torch.inference_mode():
        weight.zero_()  # as memory is that nothing was written to
    found = evaluate(clip_vision=vision(768))
    assert found.table[0] == ("strength", "image alignment", "looks like it")
    assert any("clip_l.safetensors" in one for one in found.warnings)
    with pytest.raises(IncompatibleModelError, match="judge_clip cannot be compared"):
        evaluate(clip_vision=vision(768), judge_clip=sd15.clip)


def test_halves_of_two_models_are_refused(
    evaluate: Callable[..., Any], vision: Callable[[int], Any], whole_text_half: Any
) -> None:
    with pytest.raises(IncompatibleModelError, match="768 numbers and those of pictures 512"):
        evaluate(clip_vision=vision(512), judge_clip=whole_text_half)


def test_a_broken_judge_and_one_reference_are_told(
    evaluate: Callable[..., Any], vision: Callable[[int], Any]
) -> None:
    found = evaluate(clip_vision=vision(64), references=torch.rand(1, 40, 40, 3))
    assert any("one picture of <new1> cat" in one for one in found.warnings)
    broken = vision(64)
    broken.model.visual_projection.weight.data.fill_(float("nan"))
    with pytest.raises(DataError, match="no finite numbers"):
        evaluate(clip_vision=broken)
    with pytest.raises(DataError, match="Both reference pictures and the folder"):
        evaluate(reference_folder="mine")
    with pytest.raises(DataError, match="There are no reference pictures to compare with"):
        evaluate(references=torch.zeros(0, 8, 8, 3))
    with pytest.raises(ConfigError, match="no numbers"):
        evaluate(strengths="a")


def with_references(noun: str, token: str, *images: torch.Tensor) -> TrainingConcept:
    """Each picture counts in its left upper quarter."""
    masked = []
    for image in images:
        mask = Image.new("L", (image.shape[1], image.shape[0]))
        mask.paste(255, (0, 0, mask.width // 2, mask.height // 2))
        masked.append(CaptionedImage(to_picture(image), f"a {token} {noun}", mask))
    return TrainingConcept(tuple(masked), noun, token)


def test_routed_concepts_are_drawn_as_routed_and_each_subject_is_compared(
    evaluate: Callable[..., Any], vision: Callable[[int], Any], sd15: Any
) -> None:
    from custom_diffusion.host.comfyui.drawing import Sampling, conditioning
    from custom_diffusion.host.comfyui.routing import route_concepts

    draw = torch.Generator().manual_seed(3)
    cats, dogs = (torch.rand(2, 40, 48, 3, generator=draw).mul(255).round().div(255) for _ in "ab")
    subjects = (
        with_references("dog", "<new2>", *dogs),
        with_references("cat", "<new1>", *cats),
    )
    eyes = vision(64)
    settings = {"references": None, "subjects": subjects, "routed": True, "clip_vision": eyes}
    found = evaluate((cat(), dog()), **settings, prompts="a {}", pictures_per_prompt=2)
    scores = json.loads((found.folder / "scores.json").read_text())
    assert list(scores["references"]) == ["<new1> cat", "<new2> dog"]
    ours = scores["strengths"][1]["subjects"]
    (first, _) = paths = sorted(found.folder.glob("strength-1/*.png"))

    prompt = "a <new1> cat and a <new2> dog"
    routes = [Route(cat()), Route(dog())]
    with torch.inference_mode():
        model, clip, _ = route_concepts(sd15.model, sd15.clip, routes)
        positive, negative = (conditioning(clip, text) for text in (prompt, ""))
        sampling = Sampling(1, 1.0, "euler", "normal", 64)
        noise = comfy_noise(sampling, 0)
        image = sampling.draw(model, sd15.vae, positive, negative, noise, 0)[0]
    drawn = np.asarray(Image.open(first)).astype(int)
    assert np.abs(drawn - np.asarray(to_picture(image)).astype(int)).max() <= 1

    def look(pictures: Sequence[Image.Image]) -> torch.Tensor:
        with torch.inference_mode():
            seen = [eyes.encode_image(to_tensor(one)[None])["image_embeds"] for one in pictures]
        return unit(torch.cat(seen))

    sets = {"<new1> cat": cats, "<new2> dog": dogs}
    known = {name: look([quarter(one) for one in images]) for name, images in sets.items()}
    for name in known:
        crops = []
        for path in paths:
            picture = Image.open(path).convert("RGB")
            left, top, right, bottom = json.loads(path.with_suffix(".json").read_text())[name]
            corner = (int(left * 64), int(top * 64))
            crops.append(picture.crop((*corner, math.ceil(right * 64), math.ceil(bottom * 64))))
        wanted = float((look(crops) @ known[name].T).mean())
        assert ours[name]["resemblance"] == pytest.approx(wanted, abs=1e-3)
    assert any("bleeds into <new1> cat" in cell for cell in found.table[0])
    assert "By itself <new1> cat is nearest to" in found.lines[0]

    with pytest.raises(ConfigError, match="Set use to 'routed'"):
        evaluate((cat(), dog()), **{**settings, "routed": False})
    with pytest.raises(DataError, match="belong to no trigger word"):
        evaluate((cat(),), **settings)
    with pytest.raises(DataError, match="References were given twice"):
        evaluate((cat(), dog()), **{**settings, "reference_folder": "mine"})
    with pytest.raises(DataError, match="Two sets of references"):
        evaluate((cat(), dog()), **{**settings, "subjects": subjects[:1] * 2})
    one = evaluate((cat(), dog()), **{**settings, "subjects": subjects[:1]}, prompts="a {}")
    assert any("Without references, so not compared: <new1> cat" in word for word in one.warnings)


def quarter(image: torch.Tensor) -> Image.Image:
    return to_picture(image[: image.shape[0] // 2, : image.shape[1] // 2])


def comfy_noise(sampling: Any, seed: int) -> torch.Tensor:
    import comfy.sample

    return comfy.sample.prepare_noise(sampling.empty(1), seed)
