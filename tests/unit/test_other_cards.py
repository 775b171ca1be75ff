"""Cards of other tools' files: what their headers tell, and no more is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.layers import FAMILIES
from custom_diffusion.formats.exporting import export_concept
from custom_diffusion.inspection.any_card import read_any_card
from safetensors.torch import save_file
from support.made_concepts import made_concept

BLOCK = "input_blocks.4.1.transformer_blocks.0.attn2"


def concept_of(family: str, rank: int | None) -> Concept:
    width = FAMILIES[family].context_width
    shapes = {f"{BLOCK}.to_k": (640, width), f"{BLOCK}.to_q": (640, 640)}
    if rank is None:
        del shapes[f"{BLOCK}.to_q"]
    return made_concept(shapes, family=family, rank=rank)


@pytest.mark.parametrize("family", ["sd15", "sd2", "sdxl"])
@pytest.mark.parametrize(
    ("kind", "rank", "told"),
    [
        ("comfyui-lora", None, "lora"),
        ("kohya-lora", 4, "lora"),
        ("kohya-lora", 128, "lora"),
        ("diffusers-lora", 4, "lora"),
        ("embeddings", 4, "embedding"),
        ("a1111-delta", None, "delta"),
    ],
)
def test_what_the_header_of_an_export_tells(
    kind: str, rank: int | None, told: str, family: str, tmp_path: Path
) -> None:
    (path,) = export_concept(concept_of(family, rank), tmp_path / "cat.safetensors", kind)
    card = read_any_card(path)
    assert (card.other, card.base, card.family) == (told, family, FAMILIES[family].title)
    assert card.megabytes == round(path.stat().st_size / 1e6, 2)
    assert (card.method, card.steps, card.thumbnail) == ("", None, False)


def test_whole_weights_as_diffusers_writes_them(tmp_path: Path) -> None:
    """A word that lies beside is not read."""
    path = tmp_path / "pytorch_custom_diffusion_weights.safetensors"
    block = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor"
    shapes = {"to_k_custom_diffusion": (640, 768), "to_q_custom_diffusion": (640, 640)}
    save_file({f"{block}.{name}.weight": torch.ones(s) for name, s in shapes.items()}, path)
    (tmp_path / "<new1>.bin").write_bytes(b"damaged")
    card = read_any_card(path)
    assert (card.other, card.base, card.prompts) == ("delta", "sd15", ())


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 768)}, "lora"),
        ({"lora_unet_double_blocks_0_img_attn_proj.hada_w1_a": (3072, 4)}, "lora"),
        ({f"{BLOCK}.to_k.lora_down.weight": (4, 768)}, "lora"),  # one half: damaged
        ({"conditioner.weight": (10, 10), "model.weight": (3, 3)}, "unknown"),
        ({"emb_params": (2, 4096)}, "embedding"),
    ],
)
def test_a_base_that_is_not_told_is_empty(
    tensors: dict[str, tuple[int, ...]], told: str, tmp_path: Path
) -> None:
    path = tmp_path / "theirs.safetensors"
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, path)
    card = read_any_card(path)
    assert (card.other, card.base, card.family, card.prompts) == (told, "", "", ())


def test_no_tensor_is_needed(tmp_path: Path) -> None:
    """Only the header is looked at, so damage behind it is not seen."""
    (path,) = export_concept(concept_of("sdxl", 4), tmp_path / "cat.safetensors", "kohya-lora")
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little")
    content[8 + header :] = b"\xff" * (len(content) - 8 - header)
    path.write_bytes(content)
    assert read_any_card(path).base == "sdxl"
