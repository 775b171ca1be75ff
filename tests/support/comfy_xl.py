"""Stable Diffusion XL in ComfyUI's own classes, with random weights; small where nothing hangs on
it.

A checkpoint file would have to be of full size: ComfyUI knows SDXL by the depths of its
transformers, and the second text encoder by its layer 30. So the objects are built here as the
loader builds them, with narrower levels and fewer layers. Text widths, vocabulary, paddings, layer
choices and everything that is read beside the text are those of SDXL.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from torch import nn

_CHANNELS = 64
_TEXT = {"num_hidden_layers": 4, "intermediate_size": 64}


def comfy_xl_model(comfy: Any, **changes: Any) -> Any:
    """A MODEL of two levels, the lower one with transformers of two blocks."""
    import comfy.supported_models

    return _model(comfy, comfy.supported_models.SDXL, **changes)


def comfy_refiner(comfy: Any) -> Any:
    """A MODEL like SDXL's refiner: another text width, another number of sizes."""
    import comfy.supported_models

    wide = {"context_dim": 1280, "adm_in_channels": 2560}
    return _model(comfy, comfy.supported_models.SDXLRefiner, **wide)


def comfy_xl_clip(comfy: Any, embedding_directory: list[str]) -> Any:
    import comfy.sdxl_clip

    return _clip(comfy, comfy.sdxl_clip.SDXLClipModel, embedding_directory)


def comfy_refiner_clip(comfy: Any) -> Any:
    import comfy.sdxl_clip

    return _clip(comfy, comfy.sdxl_clip.SDXLRefinerClipModel, [])


def diffusers_xl_unet(model: Any) -> UNet2DConditionModel:
    """The UNet of `comfy_xl_model`, made by diffusers' own converter."""
    unet = UNet2DConditionModel(
        block_out_channels=(_CHANNELS, 2 * _CHANNELS),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=2048,
        attention_head_dim=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    weights = {
        f"model.diffusion_model.{name}": weight.clone()
        for name, weight in model.model.diffusion_model.state_dict().items()
    }
    unet.load_state_dict(convert_ldm_unet_checkpoint(weights, dict(unet.config)))
    return unet.eval()


def _model(comfy: Any, family: Any, **changes: Any) -> Any:
    import comfy.model_patcher

    config = {
        "use_checkpoint": False, "image_size": 32, "use_spatial_transformer": True,
        "legacy": False, "use_temporal_attention": False, "use_temporal_resblock": False,
        "use_linear_in_transformer": True, "num_classes": "sequential", "dtype": torch.float32,
        "in_channels": 4, "out_channels": 4, "model_channels": _CHANNELS,
        "num_res_blocks": [2, 2], "channel_mult": [1, 2], "transformer_depth": [0, 0, 2, 2],
        "transformer_depth_middle": 2, "transformer_depth_output": [0, 0, 0, 2, 2, 2],
        "num_head_channels": 64, "context_dim": 2048, "adm_in_channels": 2816, **changes,
    }  # fmt: skip
    with torch.inference_mode():
        known = family(config)
        known.set_inference_dtype(torch.float32, None)
        model = known.get_model({}, "", device="cpu")
        _fill(model.diffusion_model)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def _clip(comfy: Any, model: Any, embedding_directory: list[str]) -> Any:
    import comfy.sd
    import comfy.sdxl_clip
    import comfy.supported_models_base

    target = comfy.supported_models_base.ClipTarget(comfy.sdxl_clip.SDXLTokenizer, model)
    options = {"dtype": torch.float32, "clip_l_model_config": _TEXT, "clip_g_model_config": _TEXT}
    with torch.inference_mode():
        clip = comfy.sd.CLIP(target, embedding_directory=embedding_directory, model_options=options)
        _fill(clip.cond_stage_model)
    return clip


def _fill(module: nn.Module) -> None:
    """Random weights, so that no output is constant; ComfyUI leaves them to the checkpoint."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in sorted(module.named_parameters()):
        if weight.ndim < 2:
            weight.data = torch.full_like(weight, float(name.endswith("weight")))
            continue
        deviation = 0.02 if "embedding" in name else weight[0].numel() ** -0.5
        weight.data = deviation * torch.randn(weight.shape, generator=generator)
