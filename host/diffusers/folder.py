"""A Stable Diffusion pipeline from a folder in diffusers' layout, read as data.

`from_pretrained` obeys what a folder says of itself: which classes to build, from which modules,
with which adapters, quantizers or kernels, and some of that can run code that came with the folder
or is downloaded. Here the classes are fixed, of each configuration only known plain settings are
read, weights are .safetensors alone, and nothing is looked up anywhere else.
"""

from __future__ import annotations

import inspect
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...concept.errors import ConceptFileError, ConfigError, IncompatibleModelError
from ...concept.plain import read_json
from ...concept.regular_files import read_regular
from ...concept.tensors import read_tensors
from ...diffusion.parts import check_noise, check_parts
from ...formats.base import weight_files
from .parts import autoencoder_of, network_of, noise_of, scheduler_noise
from .tokenizer import MOST_JSON_BYTES, read_tokenizer

_SD, _SDXL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
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
_MOST = {
    **{"num_hidden_layers": 64, "layers_per_block": 8, "block_out_channels": 1 << 16},
    **{"transformer_layers_per_block": 16, "reverse_transformer_layers_per_block": 16},
    "num_train_timesteps": 10_000,
}
"""What a few digits would make large, before any weight is compared with it: at least twice what
SD and SDXL have
"""
_MOST_BLOCKS = 8
_OLD_ATTENTION = re.compile(r"(\.attentions\.\d+)\.(query|key|value|proj_attn)\.")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Autoencoders written before diffusers 0.15 name the parts of their attention otherwise."""


def read_pipeline(folder: Path) -> Any:
    """A `StableDiffusionPipeline` or `StableDiffusionXLPipeline` on the CPU in float32, without a
    safety checker.

    Every weight is in memory of its own; the files may change or vanish afterwards. Raises
    IncompatibleModelError that names the folder and what is wrong with it, and ConfigError where
    diffusers is not installed.
    """
    if not os.path.isfile(folder / "model_index.json"):
        raise IncompatibleModelError(
            f"{folder} is no Stable Diffusion pipeline in diffusers' layout: it has no "
            f"model_index.json. Give the folder of a downloaded pipeline."
        )
    with _reading(folder):
        kind = _settings(folder / "model_index.json").get("_class_name")
        if kind not in (_SD, _SDXL):
            raise IncompatibleModelError(
                f"it is a {kind}; needed is a {_SD} or a {_SDXL}, not a refiner"
            )
        settings = _settings(folder / "scheduler" / "scheduler_config.json")
        noise = noise_of(str(settings.get("_class_name")), settings)
    with _naming(folder):
        if noise.other_schedule:
            check_noise(noise)
    with _reading(folder):
        frame = _frame(folder, ("", "_2") if kind == _SDXL else ("",))
    with _naming(folder):  # before gigabytes of weights are read
        check_parts(
            network_of(frame["unet"]),
            scheduler_noise(frame["scheduler"]),
            autoencoder_of(frame["vae"]),
            sum(part.hidden_size for name, part in frame.items() if "text_encoder" in name),
        )
    with _reading(folder):
        return _filled(folder, frame)


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """What does not fit, as a message that names the folder."""
    try:
        yield
    except IncompatibleModelError as error:
        raise IncompatibleModelError(f"{folder}: {error}") from error


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Whatever an odd folder makes the libraries raise, as a message that names it."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            f"{folder} cannot be loaded without diffusers and transformers ({error}). Install "
            f"what is missing into the same Python: `pip install diffusers transformers`."
        ) from error
    except Exception as error:
        reason = str(error) if str(error) else type(error).__name__
        raise IncompatibleModelError(
            f"{folder} could not be loaded as a pipeline of Stable Diffusion 1.x, 2.x or XL "
            f"({reason}). Download it again, or give another one."
        ) from error


def _frame(folder: Path, text_numbers: Iterable[str]) -> dict[str, Any]:
    """All of a pipeline but its weights, by name: networks without numbers, configurations of text
    encoders, scheduler and tokenizers.
    """
    import diffusers

    frame = {
        "unet": _network(diffusers.UNet2DConditionModel, folder / "unet"),
        "vae": _network(diffusers.AutoencoderKL, folder / "vae"),
        "scheduler": _scheduler(folder / "scheduler"),
    }
    for number in text_numbers:
        config = _text_config(folder / f"text_encoder{number}")
        frame[f"text_encoder{number}"] = config
        frame[f"tokenizer{number}"] = read_tokenizer(
            folder / f"tokenizer{number}", config.vocab_size
        )
    return frame


def _filled(folder: Path, frame: Mapping[str, Any]) -> Any:
    """The pipeline, with its weights."""
    import diffusers
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    parts = dict(frame)
    for name in ("unet", "vae"):
        _load_network(parts[name], folder / name)
    parts["text_encoder"] = _text_model(
        CLIPTextModel, frame["text_encoder"], folder / "text_encoder"
    )
    if "text_encoder_2" not in frame:
        return diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    parts["text_encoder_2"] = _text_model(
        CLIPTextModelWithProjection, frame["text_encoder_2"], folder / "text_encoder_2"
    )
    index = _settings(folder / "model_index.json")
    return diffusers.StableDiffusionXLPipeline(
        **parts,
        force_zeros_for_empty_prompt=bool(index.get("force_zeros_for_empty_prompt", True)),
        add_watermarker=False,
    )


def _network(kind: Any, folder: Path) -> Any:
    """A model of diffusers, which must be of this kind, without its weights."""
    settings = _settings(folder / "config.json")
    if settings.get("_class_name", kind.__name__) != kind.__name__:
        raise IncompatibleModelError(
            f"its {folder.name} is a {settings['_class_name']}; needed is a {kind.__name__}"
        )
    with torch.device("meta"):  # weights that are replaced at once need not be drawn
        return kind.from_config(_known(settings, inspect.signature(kind.__init__).parameters))


def _load_network(network: Any, folder: Path) -> None:
    weights = _weights(folder, "diffusion_pytorch_model")
    renamed = {_OLD_ATTENTION.sub(_attention_name, name): w for name, w in weights.items()}
    network.load_state_dict(renamed, assign=True)
    network.train(False)


def _attention_name(match: re.Match[str]) -> str:
    return f"{match[1]}.{_NEW_ATTENTION[match[2]]}."


def _text_config(folder: Path) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(**_known(_settings(folder / "config.json"), _TEXT_SETTINGS))


def _text_model(kind: Any, config: Any, folder: Path) -> Any:
    weights = {
        # transformers 5 writes names without the prefix, and reads both; 4 reads them with it
        name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": w
        for name, w in _weights(folder, "model").items()
    }
    # Without a name nothing is looked up: no configuration, no adapter.
    model, loaded = kind.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        output_loading_info=True,
        local_files_only=True,
    )
    missing = sorted(loaded["missing_keys"])
    if missing or loaded["mismatched_keys"]:
        odd = missing or [str(key) for key in loaded["mismatched_keys"]]
        raise IncompatibleModelError(
            f"its {folder.name} lacks {len(odd)} of the weights that its config.json asks for, "
            f"{odd[0]} for one"
        )
    return model


def _scheduler(folder: Path) -> Any:
    import diffusers

    settings = _settings(folder / "scheduler_config.json")
    name = settings.get("_class_name")
    if not isinstance(name, str) or name not in _SCHEDULERS:
        raise IncompatibleModelError(
            f"its scheduler is a {name}; known are {', '.join(sorted(_SCHEDULERS))}"
        )
    kind = getattr(diffusers, name)
    return kind.from_config(_known(settings, inspect.signature(kind.__init__).parameters))


def _settings(file: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    if not file.is_file():
        raise IncompatibleModelError(f"it has no {file.parent.name}/{file.name}")
    settings = read_json(read_regular(file, MOST_JSON_BYTES).decode())
    if not isinstance(settings, dict):
        raise IncompatibleModelError(f"its {file.parent.name}/{file.name} is no JSON object")
    for name, most in _MOST.items():
        numbers = _flat(settings.get(name))
        few = len(numbers) <= _MOST_BLOCKS
        if not few or not all(type(number) is int and 0 < number <= most for number in numbers):
            raise IncompatibleModelError(
                f"the {name} in its {file.parent.name}/{file.name} is "
                f"{reprlib.repr(settings[name])}; needed are whole numbers from 1 to {most}, for "
                f"at most {_MOST_BLOCKS} blocks"
            )
    return settings


def _flat(value: Any) -> list[Any]:
    """A number, or those in a list of lists; none of null."""
    if isinstance(value, list):
        return [number for part in value for number in _flat(part)]
    return [] if value is None else [value]


def _known(settings: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: settings[name] for name in names if name in settings}


def _weights(folder: Path, stem: str) -> dict[str, Tensor]:
    """The weights of a part, floating point as float32, in memory of their own."""
    weights: dict[str, Tensor] = {}
    for file in weight_files(folder, stem):
        try:
            tensors, _ = read_tensors(file)
        except ConceptFileError as error:
            raise IncompatibleModelError(
                f"its {folder.name}/{file.name} is no readable .safetensors: {error}"
            ) from error
        for name, tensor in tensors.items():
            weights[name] = tensor.float() if tensor.is_floating_point() else tensor
    weights.pop("text_model.embeddings.position_ids", None)  # numbers 0, 1, 2 in older files
    return weights
