"""Method, resolution and steps that nobody chose follow the connected checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.comfy_server import ComfyServer
from support.comfy_xl import comfy_refiner, comfy_xl_model
from support.graphs import draw_pictures, node, teach

OPEN = {"method": "automatic", "steps": 0, "resolution": 0}
VIEWS = {"resolution": 128, "seed": 0, "augment": True, "flip": True, "fit": "crop"}


@pytest.mark.parametrize(
    ("name", "method", "resolution"),
    [
        ("sd15", "custom diffusion", 512),
        ("sd2_eps", "custom diffusion", 512),
        ("sd2_v", "custom diffusion", 768),
    ],
)
def test_a_checkpoint_says_what_suits_it(
    load: Callable[[str], Any], name: str, method: str, resolution: int
) -> None:
    from custom_diffusion.host.comfyui.settings import follow_comfy_model

    config, said = follow_comfy_model(load(name).model, OPEN)
    assert (config.method, config.resolution, config.steps) == (method, resolution, 250)
    assert f"resolution {resolution}" in said


def test_a_card_is_fitted_to_by_the_weights_that_are_loaded(load: Callable[[str], Any]) -> None:
    """This UNet is tiny; what else a Stable Diffusion 1.x holds is counted at full size."""
    from custom_diffusion.host.comfyui.settings import follow_comfy_model

    config, said = follow_comfy_model(load("sd15").model, {**OPEN, "card_gb": 4})
    assert (config.micro_batch_size, config.batch_size) == (4, 8)
    assert "For a card of 4 GB: 4 of 8 pictures at once; 3." in said


def test_sdxl_is_taught_by_low_rank_factors_at_1024(comfy: Any) -> None:
    from custom_diffusion.host.comfyui.settings import follow_comfy_model

    config, said = follow_comfy_model(comfy_xl_model(comfy), OPEN)
    assert (config.method, config.resolution, config.rank) == ("low-rank", 1024, 16)
    assert said.endswith("the checkpoint is Stable Diffusion XL.")


@pytest.mark.parametrize("make", ["dit", "refiner"])
def test_a_model_of_no_known_family_is_refused(
    comfy: Any, load: Callable[[str], Any], make: str
) -> None:
    from custom_diffusion.concept.errors import IncompatibleModelError
    from custom_diffusion.host.comfyui.settings import follow_comfy_model

    model = comfy_refiner(comfy) if make == "refiner" else load("dit").model
    with pytest.raises(IncompatibleModelError, match=r"SD 1|Stable Diffusion"):
        follow_comfy_model(model, OPEN)


@pytest.fixture(scope="module")
def bench(comfyui_path: Path, checkpoints: Path, base: Path) -> Iterator[ComfyServer]:
    draw_pictures(base / "input" / "cat")
    draw_pictures(base / "input" / "cats", seed=1)
    for name, seed in (("masked-cat", 2), ("masked-dog", 3)):
        draw_pictures(base / "input" / name, count=1, seed=seed)
        mask = Image.new("L", (80, 96))
        mask.paste(255, (20, 20, 60, 80))
        mask.save(base / "input" / name / "0.mask.png")
    server = ComfyServer(comfyui_path, base, checkpoints=[checkpoints / "sd15.safetensors"])
    with server:
        yield server


def test_what_was_found_is_in_the_node_the_job_the_file_and_the_card(bench: ComfyServer) -> None:
    graph = teach("mine", "cat", "cat", "<new1>", method="automatic", steps=2)
    del graph["mine"]["inputs"]["method.learning_rate"]
    entry = bench.run(graph)
    (text,) = entry["outputs"]["mine"]["text"]
    assert text == "Method custom diffusion: the checkpoint is Stable Diffusion 1.x."
    (job,) = bench.get("/custom_diffusion/jobs")["jobs"]
    config = bench.get(f"/custom_diffusion/jobs/{job['id']}")["config"]
    assert (config["method"], config["steps"], config["resolution"]) == ("custom diffusion", 2, 64)
    assert config["learning_rate"] == 8e-5
    card = bench.get("/custom_diffusion/concepts/mine.safetensors")
    assert (card["method"], card["steps"], card["resolution"]) == ("custom diffusion", 2, 64)
    path = "/custom_diffusion/concepts/mine.safetensors/inspection"
    assert bench.get(path)["provenance"]["config"] == config


def test_steps_left_open_are_those_of_the_method_for_each_concept(bench: ComfyServer) -> None:
    graph = teach("both", "cat", "cat", "<new1>", method="automatic", steps=0, wait=False)
    del graph["both"]["inputs"]["method.learning_rate"]
    other = {**graph["both-data"]["inputs"], "folder": "cats", "modifier_token": "<new2>"}
    graph["other"] = node("CustomDiffusionConcept", **other)
    graph["both"]["inputs"]["concepts.concept1"] = ["other", 0]
    entry = bench.run(graph)
    assert "500 steps, 250 a concept" in entry["outputs"]["both"]["text"][0]
    job = bench.get("/custom_diffusion/jobs")["jobs"][-1]
    assert job["steps"] == 500
    bench.post(f"/custom_diffusion/jobs/{job['id']}/stop")


def shown(bench: ComfyServer, **train: Any) -> tuple[Any, str]:
    """What Views shows, and says, of a concept that a training has too."""
    graph = teach("seen", "cat", "cat", "<new1>", regularization="cats", steps=1, **train)
    graph["views"] = node("CustomDiffusionViews", concept=["seen-data", 0], **VIEWS)
    entry = bench.run(graph)
    (sheet,) = bench.images(entry, "views")
    return sheet, entry["outputs"]["views"]["text"][0]


def test_views_are_those_of_the_training_and_follow_its_changes(bench: ComfyServer) -> None:
    """Its own settings say augmented views; the training that has the concept has none."""
    plain, said = shown(bench, augment=False)
    assert said == "As set on Custom Diffusion Train (seen)."
    augmented, _ = shown(bench, augment=True)
    without, _ = shown(bench, augment=True, gradient_cut="own words")
    # Rows hold 2 views, then 8; the training at own words alone has no use for the regularization.
    assert plain.shape[1] < augmented.shape[1]
    assert without.shape[0] < augmented.shape[0]


def test_views_without_a_training_are_as_they_are_set(bench: ComfyServer) -> None:
    graph = teach("alone", "cat", "cat", "<new1>")
    del graph["alone"], graph["checkpoint"]
    graph["views"] = node("CustomDiffusionViews", concept=["alone-data", 0], **VIEWS)
    outputs = bench.run(graph)["outputs"]["views"]
    assert outputs["text"] == [""]
    graph["views"]["inputs"]["resolution"] = 0
    outputs = bench.run(graph)["outputs"]["views"]
    assert outputs["text"][0].startswith("Resolution 512: connect the model")
    graph["checkpoint"] = node("CheckpointLoaderSimple", ckpt_name="sd15.safetensors")
    graph["views"]["inputs"]["model"] = ["checkpoint", 0]
    outputs = bench.run(graph)["outputs"]["views"]
    assert outputs["text"] == ["Resolution 512."]


def test_options_count_in_the_training_and_in_its_views(bench: ComfyServer) -> None:
    graph = teach("mixed", "masked-cat", "cat", "<new1>", batch_size=2)
    data = {**graph["mixed-data"]["inputs"], "folder": "masked-dog", "modifier_token": "<new2>"}
    graph["dog"] = node("CustomDiffusionConcept", **{**data, "class_noun": "dog"})
    graph["mixed"]["inputs"]["concepts.concept1"] = ["dog", 0]
    graph["views"] = node("CustomDiffusionViews", concept=["mixed-data", 0], **VIEWS)
    (plain,) = bench.images(bench.run(graph), "views")
    assert job_config(bench)["seg_mix"] == 0

    graph["options"] = node(
        "CustomDiffusionOptions",
        seg_mix=0.5,
        attention_weight=0.01,
        schedule="cosine",
        warmup_steps=1,
        word_learning_rate=1e-4,
        loss_weighting="min-snr",
        noise_offset=0.05,
    )
    graph["mixed"]["inputs"]["options"] = ["options", 0]
    graph["views"]["inputs"]["together"] = ["dog", 0]
    (sheet,) = bench.images(bench.run(graph), "views")
    assert sheet.shape[0] > plain.shape[0], "a row more"
    assert job_config(bench)["seg_mix"] == 0.5


def job_config(bench: ComfyServer) -> Any:
    """Of the newest training."""
    newest = bench.get("/custom_diffusion/jobs")["jobs"][-1]
    return bench.get(f"/custom_diffusion/jobs/{newest['id']}")["config"]
