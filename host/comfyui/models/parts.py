"""What a MODEL, a CLIP and a VAE say of themselves, for `diffusion.parts`; nothing is copied."""

from __future__ import annotations

from typing import Any

import comfy.model_sampling

from ....concept.errors import IncompatibleModelError
from ....diffusion.parts import Autoencoder, Network, Noise, check_parts
from .text import encoder_names
from .weights import cross_attention_unet, unet_family

_kinds = comfy.model_sampling


def check_models(model: Any, clip: Any, vae: Any) -> None:
    """Raises IncompatibleModelError unless a training can use the three together."""
    network = network_of(model)
    encoders = [getattr(clip.cond_stage_model, name) for name in encoder_names(clip)]
    width = sum(one.transformer.get_input_embeddings().weight.shape[1] for one in encoders)
    check_parts(network, noise_of(model), autoencoder_of(vae), width)


def network_of(model: Any) -> Network:
    """Raises IncompatibleModelError where there is no UNet with cross-attention."""
    network = cross_attention_unet(model)
    return Network(
        type(model.model).__name__,
        unet_family(network).context_width,
        network.in_channels,
        network.out_channels,
        0 if network.num_classes is None else model.model.adm_channels,
    )


def noise_of(model: Any) -> Noise:
    sampling = model.get_model_object("model_sampling")
    name = " ".join(kind.__name__ for kind in type(sampling).__mro__[1:-1])
    sigmas = getattr(sampling, "sigmas", None)
    return Noise(
        name,
        _prediction(sampling),
        _other_schedule(sampling),
        0 if sigmas is None else len(sigmas),
        0.0 if sigmas is None else 1 / (1 + float(sigmas[-1]) ** 2),
    )


def autoencoder_of(vae: Any) -> Autoencoder:
    """Raises IncompatibleModelError where there is none that encodes pictures."""
    if vae is None or not hasattr(vae.first_stage_model, "encoder"):
        raise IncompatibleModelError(
            "No VAE that can encode pictures was given. Connect the VAE of the checkpoint, or "
            "a VAE Loader."
        )
    return Autoencoder(
        type(vae.first_stage_model).__name__, vae.latent_channels, vae.spacial_compression_encode()
    )


def _prediction(sampling: Any) -> str:
    if isinstance(sampling, _kinds.X0):
        return "sample"
    if isinstance(sampling, _kinds.V_PREDICTION):
        return "v_prediction"
    return "epsilon" if isinstance(sampling, _kinds.EPS) else type(sampling).__mro__[1].__name__


def _other_schedule(sampling: Any) -> str:
    if isinstance(sampling, _kinds.CONST):
        return "flow matching, as SD 3 and Flux do"
    edm = _kinds.EDM, _kinds.ModelSamplingContinuousEDM, _kinds.ModelSamplingDiscreteEDM
    if isinstance(sampling, edm):
        return "EDM, at continuous noise levels, as CosXL and Playground 2.5 do"
    discrete = isinstance(sampling, _kinds.ModelSamplingDiscrete)
    return "" if discrete else "a schedule without fixed noise levels"
