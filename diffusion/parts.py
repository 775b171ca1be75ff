"""Whether the parts of a model go together, by what they say of themselves: asked once, by every
host, before anything is loaded or copied.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..concept.errors import IncompatibleModelError
from ..concept.fit import check_text_width
from ..concept.layers import family_of_width
from .latents import LATENT_PIXELS
from .protocols import PredictionType

LATENT_CHANNELS = 4
"""Of every Stable Diffusion 1.x, 2.x and XL"""
TIMESTEPS = 1000
SIZES, SIZE_WIDTH = 6, 256
"""SDXL reads six sizes of a picture, each as so many waves"""
LEAST_SIGNAL = 1e-6
"""The ᾱ that has to be left at the end of a schedule for a network that predicts noise: a picture
is noise minus prediction, divided by √ᾱ. Stable Diffusion's is 5e-3.
"""
_PREDICTIONS: dict[str, PredictionType] = {"epsilon": "epsilon", "v_prediction": "v"}


@dataclass(frozen=True)
class Network:
    """What a UNet reads and puts out."""

    kind: str
    """Its class, for messages"""
    context_width: int
    channels_in: int
    channels_out: int
    beside: int | str
    """Numbers that it reads beside latents, time and text, or what they are called; 0 for none"""


@dataclass(frozen=True)
class Noise:
    """How a model is noised and sampled."""

    kind: str
    """Its class or classes, for messages"""
    prediction: str
    """`epsilon`, `v_prediction`, or another's name"""
    other_schedule: str
    """What it is called where it is not a table of noise levels; else empty"""
    timesteps: int
    final_alpha: float
    """ᾱ after the last of them"""


@dataclass(frozen=True)
class Autoencoder:
    kind: str
    channels: int
    pixels: int
    """Edge of the square that one latent stands for"""


def check_network(network: Network) -> None:
    """Raises IncompatibleModelError unless it is the UNet of a text-to-image model of a family."""
    family = family_of_width(network.context_width)
    if (network.channels_in, network.channels_out) != (LATENT_CHANNELS, LATENT_CHANNELS):
        purpose = {9: "inpainting", 8: "editing pictures by instruction", 5: "depth maps"}
        use = purpose.get(network.channels_in)
        raise IncompatibleModelError(
            f"Training needs an ordinary text-to-image model; this {network.kind} "
            f"({family.title}) has {network.channels_in} input channels and "
            f"{network.channels_out} output channels, and {LATENT_CHANNELS} each are needed"
            f"{f': it is a model for {use}' if use else ''}. Load the text-to-image checkpoint it "
            f"was made from; a concept trained there can be applied to it."
        )
    pooled = family.pooled_width
    needed = pooled + SIZES * SIZE_WIDTH if pooled else 0
    if network.beside != needed:
        found = f"{network.beside} numbers beside the text instead of {needed}"
        if not network.beside:
            found = f"beside them nothing instead of {needed} numbers"
        raise IncompatibleModelError(
            f"Training needs an ordinary text-to-image model; this {network.kind} reads text "
            f"features of {family.title}, and {found}. Load a checkpoint of SD 1.x, SD 2.x or SDXL "
            f"that is no refiner, upscaler or image variation."
        )


def check_noise(noise: Noise) -> PredictionType:
    """What the network predicts. Raises IncompatibleModelError for a model that is neither trained
    on noise nor on velocity at a table of noise levels, and for one that cannot be drawn from.
    """
    remedy = (
        f"Stable Diffusion 1.x, 2.x and XL predict noise or velocity at {TIMESTEPS} fixed noise "
        f"levels. Load one of these; where a node or a setting changed how the model samples, take "
        f"that away."
    )
    if noise.other_schedule:
        raise IncompatibleModelError(
            f"This model samples by {noise.other_schedule} ({noise.kind}), which this pack does "
            f"not work with. {remedy}"
        )
    if noise.prediction not in _PREDICTIONS or noise.timesteps != TIMESTEPS:
        raise IncompatibleModelError(
            f"This model predicts {noise.prediction!r}; epsilon or v_prediction is needed, and "
            f"{TIMESTEPS} noise levels where it has {noise.timesteps} ({noise.kind}). {remedy}"
        )
    if noise.prediction == "epsilon" and noise.final_alpha < LEAST_SIGNAL:
        raise IncompatibleModelError(
            f"The model is said to predict noise (epsilon), but its schedule ends in nothing but "
            f"noise ({noise.kind}, zero terminal SNR), where a prediction of noise says nothing of "
            f"a picture: it would be drawn black. If the model predicts velocity, set its "
            f"prediction to v_prediction; else turn zero terminal SNR "
            f"(rescale_betas_zero_snr) off."
        )
    return _PREDICTIONS[noise.prediction]


def check_autoencoder(autoencoder: Autoencoder) -> None:
    """Raises IncompatibleModelError unless it makes the latents that Stable Diffusion reads."""
    if (autoencoder.channels, autoencoder.pixels) != (LATENT_CHANNELS, LATENT_PIXELS):
        raise IncompatibleModelError(
            f"The VAE given ({autoencoder.kind}) makes latents of {autoencoder.channels} channels, "
            f"one for {autoencoder.pixels} x {autoencoder.pixels} pixels; the UNet reads "
            f"{LATENT_CHANNELS} channels and {LATENT_PIXELS} x {LATENT_PIXELS}. It belongs to "
            f"another kind of model: take the VAE of the checkpoint itself."
        )


def check_parts(
    network: Network, noise: Noise, autoencoder: Autoencoder, text_width: int
) -> PredictionType:
    """What the network predicts, of parts that go together.

    `text_width` is that of all text encoders' features side by side. Raises IncompatibleModelError
    with the first part that does not fit.
    """
    check_network(network)
    prediction = check_noise(noise)
    check_text_width(text_width, family_of_width(network.context_width))
    check_autoencoder(autoencoder)
    return prediction
