"""A checkpoint in one file means the same to the command as to ComfyUI's own loader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_diffusion.host.diffusers.checkpoint import _unet_settings
from custom_diffusion.host.diffusers.lending import borrowed_models
from custom_diffusion.host.diffusers.loading import load_pipeline
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

PROMPTS = ["a dog in the snow", "", "Photo of a naïve cat, don't  LOOK"]
UNET = "model.diffusion_model."


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd15", "sd2_v", "sd2_eps"])
def test_a_file_is_read_as_comfyui_reads_it(
    name: str, load: Any, checkpoint_file: Callable[[str], Path]
) -> None:
    from custom_diffusion.host.comfyui.models.unet import ComfyDenoiser, ComfyLatentEncoder

    loaded = load(name)
    scale = loaded.model.model.latent_format.scale_factor
    with torch.inference_mode():  # as in a node
        theirs = ComfyDenoiser(loaded.model, torch.float32)
        their_latents = ComfyLatentEncoder(loaded.vae, scale)
    with borrowed_models(load_pipeline(checkpoint_file(name))) as ours:
        encoder = ours.text_encoder
        contexts = [encoder.encode(encoder.pad([encoder.tokenize(one)])) for one in PROMPTS]
        for prompt, context in zip(PROMPTS, contexts, strict=True):
            own = loaded.clip.encode_from_tokens(loaded.clip.tokenize(prompt))
            assert difference(context, own) < 1e-5

        assert (
            ours.denoiser.prediction_type
            == theirs.prediction_type
            == ("v" if name == "sd2_v" else "epsilon")
        )
        assert difference(ours.denoiser.alphas_cumprod, theirs.alphas_cumprod) < 1e-5
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(1, 4, 8, 8, generator=generator)
        step = latents, torch.tensor([400]), contexts[0]
        assert difference(ours.denoiser.predict(*step), theirs.predict(*step)) < 1e-4

        image = torch.rand(3, 64, 64, generator=generator) * 2 - 1
        moments = zip(ours.latent_encoder.moments(image), their_latents.moments(image), strict=True)
        assert all(difference(one, other) < 1e-4 for one, other in moments)


@pytest.mark.parametrize("family", ["SD15", "SD20", "SDXL"])
def test_settings_are_read_off_the_shapes_of_the_full_size(comfy: Any, family: str) -> None:
    """Of ComfyUI's own UNet, whose names a file has; nothing may be left over or lacking."""
    import comfy.supported_models
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    known = getattr(comfy.supported_models, family)
    is_xl = family == "SDXL"
    network = UNetModel(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=320,
        num_res_blocks=[2] * (3 if is_xl else 4),
        channel_mult=[1, 2, 4] if is_xl else [1, 2, 4, 4],
        transformer_depth=[0, 0, 2, 2, 10, 10] if is_xl else [1, 1, 1, 1, 1, 1, 0, 0],
        transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10] if is_xl else [1] * 9 + [0] * 3,
        transformer_depth_middle=10 if is_xl else 1,
        use_spatial_transformer=True,
        use_linear_in_transformer=family != "SD15",
        context_dim=known.unet_config["context_dim"],
        num_classes="sequential" if is_xl else None,
        adm_in_channels=2816 if is_xl else None,
        num_heads=8 if family == "SD15" else -1,
        num_head_channels=-1 if family == "SD15" else 64,
        legacy=False,
        device="meta",
        operations=_operations(comfy),
    )
    state = network.state_dict()
    settings = _unet_settings({name: tuple(weight.shape) for name, weight in state.items()})
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(settings)
    converted = convert_ldm_unet_checkpoint(
        {f"{UNET}{name}": weight for name, weight in state.items()}, settings
    )
    unet.load_state_dict(converted, assign=True)
    heads = {block.attn2.heads for block in unet.modules() if hasattr(block, "attn2")}
    assert heads == {"SD15": {8}, "SD20": {5, 10, 20}, "SDXL": {10, 20}}[family]


def _operations(comfy: Any) -> Any:
    import comfy.ops

    return comfy.ops.disable_weight_init
