"""MODEL, CLIP and VAE that do not go together are refused by their true names, before anything of
them is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from custom_diffusion.concept.errors import CustomDiffusionError


@pytest.fixture
def training(sd15: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What starts a training, with parts of its own; its copies are counted as a failure."""
    from custom_diffusion.host.comfyui.jobs import training as module
    from custom_diffusion.trainer.config import TrainConfig
    from custom_diffusion.trainer.request import TrainingRequest

    def copied(*_: Any) -> Any:
        raise AssertionError("models were copied before they were judged")

    for copies in ("copy_unet", "unet_weights", "text_encoder"):
        monkeypatch.setattr(module, copies, copied)
    own = {"model": sd15.model, "clip": sd15.clip, "vae": sd15.vae}

    def start(**parts: Any) -> Any:
        return module.start_training(
            "x",
            TrainingRequest(TrainConfig(), []),
            module.Origin(**{**own, **parts}, prompt={}, node_id="1"),
            checkpoint_every_steps=50,
            share_device=False,
            keep_best=1,
        )

    return start


def sampled_by(model: Any, *kinds: str, **settings: Any) -> Any:
    """A clone that samples otherwise, as the nodes of ComfyUI make it."""
    import comfy.model_sampling

    bases = tuple(getattr(comfy.model_sampling, kind) for kind in kinds)
    other = type("ModelSamplingAdvanced", bases, {})(model.model.model_config, **settings)
    clone = model.clone()
    clone.add_object_patch("model_sampling", other)
    return clone


@pytest.mark.parametrize(
    ("kinds", "settings", "message"),
    [
        (("ModelSamplingContinuousEDM", "V_PREDICTION"), {}, "samples by EDM.*CosXL"),
        (("ModelSamplingContinuousEDM", "EDM"), {}, "samples by EDM"),
        (("ModelSamplingDiscreteFlow", "CONST"), {}, "samples by flow matching"),
        (("ModelSamplingDiscrete", "X0"), {}, "predicts 'sample'"),
        (("ModelSamplingDiscrete", "EPS"), {"zsnr": True}, "zero terminal SNR.*drawn black"),
    ],
)
def test_schedules_are_refused_by_name(
    training: Callable[..., Any],
    sd15: Any,
    kinds: tuple[str, ...],
    settings: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(CustomDiffusionError, match=message):
        training(model=sampled_by(sd15.model, *kinds, **settings))


def test_what_fits_is_copied(training: Callable[..., Any], sd15: Any) -> None:
    """Zero terminal SNR is right where velocity is predicted."""
    for parts in (
        {},
        {"model": sampled_by(sd15.model, "ModelSamplingDiscrete", "V_PREDICTION", zsnr=True)},
    ):
        with pytest.raises(AssertionError, match="models were copied"):
            training(**parts)


def test_text_encoders_and_autoencoders_of_other_models(
    training: Callable[..., Any], load: Callable[[str], Any], sd15: Any
) -> None:
    with pytest.raises(CustomDiffusionError, match="width 1024; this model is .* 1.x and reads"):
        training(clip=load("sd2_eps").clip)
    deep = SimpleNamespace(
        first_stage_model=sd15.vae.first_stage_model,
        latent_channels=16,
        spacial_compression_encode=sd15.vae.spacial_compression_encode,
    )
    with pytest.raises(CustomDiffusionError, match="makes latents of 16 channels"):
        training(vae=deep)
    with pytest.raises(CustomDiffusionError, match="No VAE"):
        training(vae=None)
    with pytest.raises(CustomDiffusionError, match="No CLIP"):
        training(clip=None)


def test_an_autoencoder_that_overflows_is_named(sd15: Any) -> None:
    from custom_diffusion.host.comfyui.models.unet import ComfyLatentEncoder

    weight = sd15.vae.first_stage_model.encoder.conv_in.weight
    with torch.inference_mode(False), torch.no_grad():
        before = weight.data
        weight.data = torch.full_like(before, torch.nan)
        try:
            encoder = ComfyLatentEncoder(sd15.vae, 0.18215)
            with pytest.raises(CustomDiffusionError, match="VAE is broken: its weight encoder"):
                encoder.moments(torch.zeros(3, 64, 64))
        finally:
            weight.data = before
