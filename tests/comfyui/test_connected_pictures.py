"""Pictures from other nodes: ComfyUI's loader of folders gives those of `10_cat` ten times, Compose
Pictures those that it has made.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from support.comfy_server import ComfyServer
from support.graphs import draw_pictures, node, teach


def test_copies_are_one_picture_with_repeats(comfy: Any) -> None:
    from custom_diffusion.host.comfyui.inputs import training_concept

    one, other = torch.rand(2, 1, 8, 8, 3)
    concept = training_concept(
        images=[one, other, one.clone(), one.clone(), one.clone()],
        masks=[],
        captions=["a <new1> cat", "a <new1> cat", "a <new1> cat", "a <new1> cat", "<new1> asleep"],
        folder="none",
        class_noun="cat",
        token="<new1>",
        regularization_folder="none",
        regularization_set=(),
        initializer="",
        kind="thing",
    )
    found = [(image.caption, image.repeats) for image in concept.images]
    assert found == [("a <new1> cat", 3), ("a <new1> cat", 1), ("<new1> asleep", 1)]


def test_subjects_with_masks_are_composed_for_a_training(server: ComfyServer) -> None:
    rng = np.random.default_rng(5)
    for noun, box in (("fox", (20, 20, 60, 70)), ("owl", (5, 30, 40, 80))):
        folder = server.input / f"composed-{noun}"
        draw_pictures(folder, count=2)
        for number in range(2):
            mask = Image.new("L", (80, 96))
            mask.paste(255, box)
            mask.save(folder / f"{number}.mask.png")
    places = server.input / "composed-places"
    places.mkdir()
    Image.fromarray(rng.integers(0, 9, (90, 90, 3), np.uint8)).save(places / "night.png")
    (places / "night.txt").write_text("at night")
    graph = {
        **teach("composed", "composed-fox", "fox", "<fox>", steps=1),
        "owl": teach("owl", "composed-owl", "owl", "<owl>")["owl-data"],
        "made": node(
            "ComposePictures",
            count=3,
            resolution=64,
            seed=1,
            keep_own=False,
            background_folder="composed-places",
            places="",
            **{"concepts.concept0": ["composed-data", 0], "concepts.concept1": ["owl", 0]},
        ),
        "save": node("SaveImage", images=["made", 1], filename_prefix="composed"),
        "masks": node("MaskToImage", mask=["made", 2]),
        "save-masks": node("SaveImage", images=["masks", 0], filename_prefix="composed-mask"),
    }
    inputs = graph["composed"]["inputs"]
    inputs["concepts.concept0"], inputs["concepts.concept1"] = ["made", 0], ["owl", 0]
    result = server.run(graph)
    told = result["outputs"]["made"]["text"][0]
    assert "3 pictures of 2 cut-outs of <fox> fox, 2 cut-outs of <owl> owl" in told
    assert "connect them to the same Custom Diffusion Train" in told
    pictures, masks = (server.images(result, key) for key in ("save", "save-masks"))
    assert len(pictures) == len(masks) == 3
    for picture, mask in zip(pictures, masks, strict=True):
        dark = picture.max(-1) < 16
        assert dark[mask[..., 0] == 0].mean() > 0.95  # the night, where no subject is
        assert not dark[mask[..., 0] > 250].all()
    (job,) = (j for j in server.get("/custom_diffusion/jobs")["jobs"] if j["name"] == "composed")
    assert job["state"] == "finished" and job["loss"] > 0
