"""Layer names of ComfyUI and of diffusers, held against diffusers' own checkpoint converter."""

from __future__ import annotations

import random

import pytest
import torch
from custom_diffusion.concept.errors import IncompatibleModelError
from custom_diffusion.concept.layers import (
    FAMILIES,
    family_of_width,
    is_projection,
    layer_from_diffusers,
    layer_to_diffusers,
    sort_layers,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

# Blocks with a transformer and how many transformer blocks it has, as in the original checkpoints.
SD15 = {
    **{f"input_blocks.{i}.1": 1 for i in (1, 2, 4, 5, 7, 8)},
    "middle_block.1": 1,
    **{f"output_blocks.{i}.1": 1 for i in range(3, 12)},
}
TWO_LEVELS = {
    **{f"input_blocks.{i}.1": 1 for i in (1, 2, 4, 5)},
    "middle_block.1": 1,
    **{f"output_blocks.{i}.1": 1 for i in range(6)},
}
SDXL = {
    **{f"input_blocks.{i}.1": 2 for i in (4, 5)},
    **{f"input_blocks.{i}.1": 10 for i in (7, 8)},
    "middle_block.1": 10,
    **{f"output_blocks.{i}.1": 10 for i in (0, 1, 2)},
    **{f"output_blocks.{i}.1": 2 for i in (3, 4, 5)},
}
MODELS = {
    "sd15": (SD15, 12, 12, 32),
    "two levels": (TWO_LEVELS, 6, 6, 22),
    "sdxl": (SDXL, 9, 9, 140),
}


def _projections(blocks: dict[str, int]) -> list[str]:
    return [
        f"{block}.transformer_blocks.{depth}.attn2.{projection}"
        for block, depths in blocks.items()
        for depth in range(depths)
        for projection in ("to_k", "to_v")
    ]


def _converted_by_diffusers(layers: list[str], inputs: int, outputs: int) -> dict[str, str]:
    """diffusers' name → original name, found by following numbered tensors through its converter.

    It counts blocks, so blocks without a transformer are given too.
    """
    names = [f"{layer}.weight" for layer in layers]
    names += [f"input_blocks.{i}.0.in_layers.0.weight" for i in range(inputs)]
    names += [f"output_blocks.{i}.0.in_layers.0.weight" for i in range(outputs)]
    names += [f"middle_block.{i}.in_layers.0.weight" for i in (0, 2)]
    checkpoint = {f"model.diffusion_model.{name}": torch.tensor(i) for i, name in enumerate(names)}
    converted = convert_ldm_unet_checkpoint(checkpoint, {"layers_per_block": 2})
    return {
        name.removesuffix(".weight"): names[int(number)].removesuffix(".weight")
        for name, number in converted.items()
        if number is not None and "attn2" in name
    }


@pytest.mark.parametrize("model", MODELS)
def test_names_translate_as_diffusers_translates_checkpoints(model: str) -> None:
    blocks, inputs, outputs, count = MODELS[model]
    expected = _converted_by_diffusers(_projections(blocks), inputs, outputs)
    assert len(expected) == count
    assert {name: layer_from_diffusers(name) for name in expected} == expected
    assert {name: layer_to_diffusers(layer) for name, layer in expected.items()} == {
        name: name for name in expected
    }


@pytest.mark.parametrize(
    "path",
    [
        "",
        "mid_block.attentions.1.transformer_blocks.0.attn2.to_k",
        "down_blocks.0.resnets.0.conv1",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k",
    ],
)
def test_other_diffusers_paths_are_refused_by_name(path: str) -> None:
    with pytest.raises(ValueError, match="no|not") as caught:
        layer_from_diffusers(path)
    assert repr(path) in str(caught.value)


@pytest.mark.parametrize(
    "path", ["", "input_blocks.1.0.in_layers.0", "middle_block.0.in_layers.0", "out.0"]
)
def test_other_original_paths_are_refused_by_name(path: str) -> None:
    with pytest.raises(ValueError, match="not") as caught:
        layer_to_diffusers(path)
    assert repr(path) in str(caught.value)


@pytest.mark.parametrize("model", MODELS)
def test_layers_have_one_order_with_numbers_compared_as_numbers(model: str) -> None:
    """Brute force: with every number written with three digits, plain text order is the order."""
    layers = _projections(MODELS[model][0])
    expected = sorted(
        layers, key=lambda name: [p.zfill(3) if p.isdigit() else p for p in name.split(".")]
    )
    shuffled = layers.copy()
    random.Random(1).shuffle(shuffled)
    assert sort_layers(shuffled) == expected


def test_block_ten_comes_after_block_two() -> None:
    assert sort_layers(["input_blocks.10.1.a", "input_blocks.2.1.a"]) == [
        "input_blocks.2.1.a",
        "input_blocks.10.1.a",
    ]


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("input_blocks.1.1.transformer_blocks.0.attn2.to_k", True),
        ("input_blocks.1.1.transformer_blocks.0.attn2.to_v", True),
        ("input_blocks.1.1.transformer_blocks.0.attn2.to_q", False),
        ("input_blocks.1.1.transformer_blocks.0.attn2.to_out.0", False),
        ("input_blocks.1.1.transformer_blocks.0.attn1.to_k", False),
    ],
)
def test_only_keys_and_values_of_cross_attention_are_projections(
    layer: str, expected: bool
) -> None:
    assert is_projection(layer) is expected


@pytest.mark.parametrize(
    ("width", "name"), [(768, "sd15"), (1024, "sd2"), (2048, "sdxl"), (128, "miniature")]
)
def test_the_text_width_tells_the_family(width: int, name: str) -> None:
    assert family_of_width(width) is FAMILIES[name]


@pytest.mark.parametrize(
    ("name", "encoders"),
    [
        ("sd15", {"clip_l": 768}),
        ("sd2", {"clip_h": 1024}),
        ("sdxl", {"clip_l": 768, "clip_g": 1280}),
        ("miniature", {"clip_l": 128}),
    ],
)
def test_the_text_encoders_of_a_family_fill_its_text_width(
    name: str, encoders: dict[str, int]
) -> None:
    assert FAMILIES[name].text_encoders == encoders
    assert FAMILIES[name].context_width == sum(encoders.values())


def test_an_unknown_text_width_is_refused_with_the_known_ones() -> None:
    with pytest.raises(IncompatibleModelError) as caught:
        family_of_width(4096)
    message = str(caught.value)
    assert "4096" in message
    assert all(str(f.context_width) in message for f in FAMILIES.values())
    assert "Load a checkpoint" in message
