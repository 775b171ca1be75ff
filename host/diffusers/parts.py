"""What the parts of a pipeline say of themselves, for `diffusion.parts`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...concept.errors import IncompatibleModelError
from ...diffusion.parts import Autoencoder, Network, Noise

_BESIDE = ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
"""Settings of a UNet that reads more than latents, time and text"""


def network_of(unet: Any) -> Network:
    """Raises IncompatibleModelError for a network without cross-attention as SD has it."""
    settings, kind = unet.config, type(unet).__name__
    width = settings.get("cross_attention_dim")
    if isinstance(width, list | tuple) and len(set(width)) == 1:
        width = width[0]
    if not isinstance(width, int):
        raise IncompatibleModelError(
            f"{kind} has no cross-attention with key and value projections. "
            f"Custom Diffusion needs the UNet of Stable Diffusion 1.x, 2.x or XL."
        )
    if settings.get("layers_per_block", 2) != 2:
        raise IncompatibleModelError(
            f"This UNet has {settings['layers_per_block']} layers a block; every Stable Diffusion "
            f"has 2, and concepts are named after those. Load the UNet of SD 1.x, SD 2.x or SDXL."
        )
    beside: int | str = 0
    present = [name for name in _BESIDE if settings.get(name) is not None]
    if present == ["addition_embed_type"] and settings[present[0]] == "text_time":
        beside = settings.get("projection_class_embeddings_input_dim") or 0
    elif present:
        beside = f"{settings[present[0]]!r} ({present[0]})"
    return Network(kind, width, settings["in_channels"], settings["out_channels"], beside)


def noise_of(kind: str, settings: Mapping[str, Any], final_alpha: float = 0.0) -> Noise:
    """Of a scheduler's class and settings; `final_alpha` where it has a table of noise levels."""
    return Noise(
        kind,
        str(settings.get("prediction_type", "epsilon")),
        _other_schedule(kind, settings),
        settings.get("num_train_timesteps", 1000),
        final_alpha,
    )


def scheduler_noise(scheduler: Any) -> Noise:
    kind, settings = type(scheduler).__name__, scheduler.config
    if _other_schedule(kind, settings):
        return noise_of(kind, settings)
    return noise_of(kind, settings, float(scheduler.alphas_cumprod[-1]))


def autoencoder_of(vae: Any) -> Autoencoder:
    settings = vae.config
    return Autoencoder(
        type(vae).__name__,
        getattr(settings, "latent_channels", 4),
        2 ** (len(settings.block_out_channels) - 1),
    )


def _other_schedule(kind: str, settings: Mapping[str, Any]) -> str:
    flow = settings.get("use_flow_sigmas") or settings.get("prediction_type") == "flow_prediction"
    if flow or "Flow" in kind:
        return "flow matching, as SD 3 and Flux do"
    continuous = settings.get("timestep_type") == "continuous"
    if continuous or kind.startswith("EDM") or "sigma_data" in settings:
        return "EDM, at continuous noise levels, as CosXL and Playground 2.5 do"
    return ""
