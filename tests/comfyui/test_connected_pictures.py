"""Pictures from other nodes: ComfyUI's loader of folders gives those of `10_cat` ten times."""

from __future__ import annotations

from typing import Any

import torch


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
