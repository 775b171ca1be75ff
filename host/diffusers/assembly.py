"""A Stable Diffusion pipeline put together from settings and weights, wherever they come from: a
folder in diffusers' layout, or a checkpoint in one file.

The classes are fixed, of every configuration only known plain settings are read, and nothing is
looked up anywhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ...concept.errors import ConfigError, IncompatibleModelError
from ...diffusion.parts import check_noise, check_parts
from .parts import autoencoder_of, network_of, noise_of, scheduler_noise

_SCHEDULERS = {
    *("DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler"),
    *("DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler"),
    *("HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler"),
    *("LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "TCDScheduler"),
    "UniPCMultistepScheduler",
}
_TEXT_SETTINGS = {
    *("vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers"),
    *("num_attention_heads", "max_position_embeddings", "hidden_act", "layer_norm_eps"),
    *("attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id"),
}


class Source(Protocol):
    """Where the parts of a pipeline come from. A part is called as in diffusers: `unet`, `vae`,
    `scheduler`, `text_encoder`, `tokenizer`, and of SDXL `text_encoder_2`, `tokenizer_2`.
    """

    place: Path
    """For messages"""
    is_xl: bool

    def settings(self, part: str) -> Mapping[str, Any]:
        """Its configuration, in diffusers' and transformers' words."""

    def weights(self, part: str) -> dict[str, Tensor]:
        """By diffusers' and transformers' names; floating point as float32."""

    def tokenizer(self, part: str, rows: int) -> Any:
        """A `CLIPTokenizer` for a text encoder of as many embeddings."""


def assemble(source: Source) -> Any:
    """A `StableDiffusionPipeline` or `StableDiffusionXLPipeline` on the CPU in float32, without a
    safety checker.

    Raises IncompatibleModelError that names the place and what is wrong with it, and ConfigError
    where diffusers is not installed.
    """
    with reading(source.place):
        settings = source.settings("scheduler")
        noise = noise_of(str(settings.get("_class_name")), settings)
    with _naming(source.place):
        if noise.other_schedule:
            check_noise(noise)
    with reading(source.place):
        frame = _frame(source)
    with _naming(source.place):  # before gigabytes of weights are read
        check_parts(
            network_of(frame["unet"]),
            scheduler_noise(frame["scheduler"]),
            autoencoder_of(frame["vae"]),
            sum(part.hidden_size for name, part in frame.items() if "text_encoder" in name),
        )
    with reading(source.place):
        return _filled(source, frame)


@contextmanager
def _naming(place: Path) -> Iterator[None]:
    """What does not fit, as a message that names the place."""
    try:
        yield
    except IncompatibleModelError as error:
        raise IncompatibleModelError(f"{place}: {error}") from error


@contextmanager
def reading(place: Path) -> Iterator[None]:
    """Whatever an odd model makes the libraries raise, as a message that names its place."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            f"{place} cannot be loaded without diffusers, transformers and open_clip ({error}). "
            f"Install what is missing into the same Python: `pip install diffusers transformers "
            f"open_clip_torch`."
        ) from error
    except Exception as error:
        reason = str(error) if str(error) else type(error).__name__
        raise IncompatibleModelError(
            f"{place} could not be loaded as a pipeline of Stable Diffusion 1.x, 2.x or XL "
            f"({reason}). Download it again, or give another one."
        ) from error


def _frame(source: Source) -> dict[str, Any]:
    """All of a pipeline but its weights, by name: networks without numbers, configurations of text
    encoders, scheduler and tokenizers.
    """
    import diffusers

    frame = {
        "unet": _network(diffusers.UNet2DConditionModel, "unet", source),
        "vae": _network(diffusers.AutoencoderKL, "vae", source),
        "scheduler": _scheduler(source.settings("scheduler")),
    }
    for number in ("", "_2") if source.is_xl else ("",):
        config = _text_config(source.settings(f"text_encoder{number}"))
        frame[f"text_encoder{number}"] = config
        frame[f"tokenizer{number}"] = source.tokenizer(f"tokenizer{number}", config.vocab_size)
    return frame


def _filled(source: Source, frame: Mapping[str, Any]) -> Any:
    """The pipeline, with its weights."""
    import diffusers
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    parts = dict(frame)
    for name in ("unet", "vae"):
        parts[name].load_state_dict(source.weights(name), assign=True)
        parts[name].train(False)
    parts["text_encoder"] = _text_model(CLIPTextModel, frame, "text_encoder", source)
    if not source.is_xl:
        return diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    parts["text_encoder_2"] = _text_model(
        CLIPTextModelWithProjection, frame, "text_encoder_2", source
    )
    return diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)


def _network(kind: Any, part: str, source: Source) -> Any:
    """A model of diffusers, which must be of this kind, without its weights."""
    settings = source.settings(part)
    if settings.get("_class_name", kind.__name__) != kind.__name__:
        raise IncompatibleModelError(
            f"its {part} is a {settings['_class_name']}; needed is a {kind.__name__}"
        )
    with torch.device("meta"):  # weights that are replaced at once need not be drawn
        return kind.from_config(_known(settings, inspect.signature(kind.__init__).parameters))


def _text_config(settings: Mapping[str, Any]) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(**_known(settings, _TEXT_SETTINGS))


def _text_model(kind: Any, frame: Mapping[str, Any], part: str, source: Source) -> Any:
    weights = {
        # transformers 5 writes names without the prefix, and reads both; 4 reads them with it
        name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": w
        for name, w in source.weights(part).items()
    }
    weights.pop("text_model.embeddings.position_ids", None)  # numbers 0, 1, 2 in older files
    # Without a name nothing is looked up: no configuration, no adapter.
    model, loaded = kind.from_pretrained(
        None,
        config=frame[part],
        state_dict=weights,
        output_loading_info=True,
        local_files_only=True,
    )
    missing = sorted(loaded["missing_keys"])
    if missing or loaded["mismatched_keys"]:
        odd = missing or [str(key) for key in loaded["mismatched_keys"]]
        raise IncompatibleModelError(
            f"its {part} lacks {len(odd)} of the weights that it needs, {odd[0]} for one"
        )
    return model


def _scheduler(settings: Mapping[str, Any]) -> Any:
    import diffusers

    name = settings.get("_class_name")
    if not isinstance(name, str) or name not in _SCHEDULERS:
        raise IncompatibleModelError(
            f"its scheduler is a {name}; known are {', '.join(sorted(_SCHEDULERS))}"
        )
    kind = getattr(diffusers, name)
    return kind.from_config(_known(settings, inspect.signature(kind.__init__).parameters))


def _known(settings: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: settings[name] for name in names if name in settings}
