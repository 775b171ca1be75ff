"""A Stable Diffusion pipeline from a checkpoint in one file, under the names that the authors of
latent diffusion gave.

Such a file holds weights alone. What a folder says in its configurations is read off names and
shapes here, CLIP's vocabulary comes from open_clip, and nothing is downloaded. Names are translated
by diffusers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from torch import Tensor

from ...concept.errors import ConceptFileError, IncompatibleModelError, UnreadableFileError
from ...concept.layers import FAMILIES
from ...concept.tensors import Header, read_header, read_tensors
from ...diffusion.parts import TIMESTEPS, Noise, check_noise
from .assembly import assemble, reading

log = logging.getLogger("custom_diffusion")

FilePrediction = Literal["epsilon", "v", "v-ztsnr"]
"""What a network predicts: the noise; the velocity; that, at noise levels that end in nothing but
noise (zero terminal SNR)
"""
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
"""Endings of files that can run code when opened"""
_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_CLIP = "cond_stage_model.transformer.", "conditioner.embedders.0.transformer."
_OPEN_CLIP = (
    "cond_stage_model.model.",
    *(f"conditioner.embedders.{number}.model." for number in (0, 1)),
)
_NEEDED = (
    "Needed is a whole checkpoint of SD 1.x, SD 2.x or SDXL: UNet, text encoder and VAE in one "
    ".safetensors"
)
_OTHERS = (
    (r"lora_|\.lora\.", "a LoRA", "Give the checkpoint that it belongs to"),
    (r"^diffusion_model\.", "a concept or a LoRA", "Give the checkpoint that it belongs to"),
    (r"joint_blocks\.|double_blocks\.", "SD 3, Flux or the like, which has no UNet", ""),
    (r"^(bundle_emb|emb_params|string_to_param)", "an embedding", ""),
    (r"^(down_blocks|input_blocks|conv_in)\b", "a UNet alone", ""),
    (r"^(encoder|decoder|quant_conv)\b", "a VAE alone", ""),
    (r"^(text_model|transformer|text_projection)\b", "a text encoder alone", ""),
)
"""A name in the file → what the file is then, and what to do"""
VOCABULARY_SIZE = 49408
"""Pieces of words that every CLIP reads; the last two begin and end a text"""
_HEAD_WIDTH = 64
"""Of every attention but the UNet's of SD 1.x, which has 8 heads everywhere"""
_MLP = re.compile(r"\.(\d+)\.mlp\.(fc1|c_fc)\.weight$")
_VELOCITY_BIAS = f"{_UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
_LEAST_DEVIATION = 0.09
"""The only difference between the files of SD 2.x that predict noise and velocity: numbers. Above
this deviation of that bias it is velocity; ComfyUI draws the line there too.
"""


def read_checkpoint(file: Path, prediction: FilePrediction | None = None) -> Any:
    """The pipeline in a file, as `assembly.assemble` makes it.

    `prediction` is what the network predicts; None for what the file says of it.
    """
    return assemble(_Checkpoint(file, _header(file), prediction))


class _Checkpoint:
    """A file as `assembly.Source`."""

    def __init__(self, place: Path, header: Header, prediction: FilePrediction | None) -> None:
        self.place, self.metadata, self._prediction = place, header.metadata, prediction
        self._shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
        self._text = [prefix for prefix in (*_CLIP, *_OPEN_CLIP) if self._has(prefix)]
        self._check_parts()
        with reading(place):
            self._unet = _unet_settings(self._below(_UNET))
        self.is_xl = self._unet["cross_attention_dim"] == FAMILIES["sdxl"].context_width
        self._is_sd2 = not self.is_xl and self._text[0] in _OPEN_CLIP

    def settings(self, part: str) -> Mapping[str, Any]:
        if part == "unet":
            return self._unet
        if part == "vae":
            return _vae_settings(self._below(_VAE), 0.13025 if self.is_xl else 0.18215)
        if part == "scheduler":
            return _scheduler_settings(self._predicts)
        prefix = self._prefix(part)
        left_out = 1 if self._is_sd2 else 0  # what SD 2.x reads is the last layer but one
        return _text_settings(self._below(prefix), prefix in _OPEN_CLIP, left_out)

    def weights(self, part: str) -> dict[str, Tensor]:
        from diffusers.loaders import single_file_utils as convert

        if part == "unet":
            return dict(convert.convert_ldm_unet_checkpoint(self._read(_UNET), self._unet))
        if part == "vae":
            return dict(convert.convert_ldm_vae_checkpoint(self._read(_VAE), self.settings("vae")))
        prefix = self._prefix(part)
        weights = self._read(prefix)
        if prefix in _CLIP:
            return {name.removeprefix(prefix): weight for name, weight in weights.items()}
        if self._is_sd2:
            last = f"{prefix}transformer.resblocks.{self.settings(part)['num_hidden_layers']}."
            unread = last, f"{prefix}text_projection"
            weights = {name: w for name, w in weights.items() if not name.startswith(unread)}
        width = SimpleNamespace(config=SimpleNamespace(**self.settings(part)))
        return dict(convert.convert_open_clip_checkpoint(width, weights, prefix))

    def tokenizer(self, part: str, rows: int) -> Any:
        from ..open_clip.vocabulary import clip_tokenizer

        if rows < VOCABULARY_SIZE:
            raise IncompatibleModelError(
                f"its text encoder has {rows} words; CLIP's vocabulary has {VOCABULARY_SIZE}"
            )
        tokenizer = clip_tokenizer()
        if part == "tokenizer_2" or self._is_sd2:
            tokenizer.pad_token = "!"
        return tokenizer

    def _check_parts(self) -> None:
        """Raises IncompatibleModelError unless there is a UNet, a text encoder and a VAE."""
        parts = {
            "UNet": self._has(f"{_UNET}input_blocks."),
            "text encoder": bool(self._text),
            "VAE that encodes pictures": self._has(f"{_VAE}encoder.down."),
        }
        lacking = [part for part, there in parts.items() if not there]
        if not lacking:
            return
        for pattern, kind, remedy in _OTHERS:
            if "UNet" in lacking and any(re.search(pattern, name) for name in self._shapes):
                raise IncompatibleModelError(
                    f"{self.place} is {kind}. {_NEEDED}. {remedy or 'Give such a file'}."
                )
        raise IncompatibleModelError(
            f"{self.place} holds no {' and no '.join(lacking)}. {_NEEDED}. Download the full "
            f"checkpoint, or give a folder in diffusers' layout."
        )

    def _prefix(self, part: str) -> str:
        """Of the names of a text encoder."""
        number = 1 if part.endswith("_2") else 0
        if number >= len(self._text):
            raise IncompatibleModelError(f"it has no second text encoder ({_OPEN_CLIP[2]})")
        return self._text[number]

    @cached_property
    def _predicts(self) -> FilePrediction:
        """What was said; else what the file says, by the marks that ComfyUI reads too."""
        if self._has("edm_mean") or self._has("edm_vpred."):
            kind = "EDM, at continuous noise levels, as CosXL and Playground 2.5 do"
            check_noise(Noise("edm", "v_prediction", kind, TIMESTEPS, 0.0))
        if self._prediction:
            return self._prediction
        if "v_pred" in self._shapes:
            return "v-ztsnr" if "ztsnr" in self._shapes else "v"
        said = self.metadata.get("modelspec.prediction_type", "")
        if said in ("epsilon", "v"):
            return "epsilon" if said == "epsilon" else "v"
        if not self._is_sd2:
            return "epsilon"
        bias = self._read(_VELOCITY_BIAS).get(_VELOCITY_BIAS)
        velocity = bias is not None and float(bias.std(correction=0)) > _LEAST_DEVIATION
        other = "epsilon" if velocity else "v"
        log.info(
            "note: %s does not say what it predicts. Its weights look like an SD 2.x model for %s "
            "pixels, so %s is assumed, as ComfyUI does. If pictures come out as noise, give "
            "--prediction %s.",
            self.place.name,
            768 if velocity else 512,
            "velocity (v)" if velocity else "noise (epsilon)",
            other,
        )
        return "v" if velocity else "epsilon"

    def _has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self._shapes)

    def _below(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """Shapes by what is behind the prefix of their names."""
        return {
            name.removeprefix(prefix): shape
            for name, shape in self._shapes.items()
            if name.startswith(prefix)
        }

    def _read(self, prefix: str) -> dict[str, Tensor]:
        """By whole names, in float32. Raises IncompatibleModelError for numbers with scales."""
        weights, _ = read_tensors(self.place, lambda name: name.startswith(prefix))
        if any(name.endswith(("scale_weight", "scaled_fp8", "weight_scale")) for name in weights):
            raise IncompatibleModelError(
                "its weights are in 8 bits with scales, which ComfyUI alone computes with. Give "
                "the same model in half precision"
            )
        return {n: w.float() if w.is_floating_point() else w for n, w in weights.items()}


def _header(file: Path) -> Header:
    if file.suffix.lower() in PICKLES:
        raise IncompatibleModelError(
            f"{file} is a pickle, which can run code when opened, so it was not. Give the same "
            f"model as .safetensors: most are offered so too, and ComfyUI saves what it has loaded "
            f"with the node Save Checkpoint."
        )
    try:
        return read_header(file)
    except UnreadableFileError as error:
        raise IncompatibleModelError(
            f"{file} cannot be read as a checkpoint: {error.reason}. {_NEEDED}. Copy or download "
            f"it again."
        ) from error
    except ConceptFileError as error:
        raise IncompatibleModelError(
            f"There is no model {file}. Give a checkpoint as .safetensors, or a folder in "
            f"diffusers' layout."
        ) from error


def _unet_settings(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The configuration of a `UNet2DConditionModel`."""
    levels = (1 + max(_numbers(shapes, r"input_blocks\.(\d+)\."))) // 3
    first = [f"input_blocks.{1 + 3 * level}" for level in range(levels)]
    depths = [len(_numbers(shapes, rf"{name}\.1\.transformer_blocks\.(\d+)\.")) for name in first]
    channels = [shapes[f"{name}.0.out_layers.3.weight"][0] for name in first]
    width = next(s[1] for name, s in shapes.items() if name.endswith("attn2.to_k.weight"))
    settings = {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": 2,
        "down_block_types": [f"{'CrossAttn' if n else ''}DownBlock2D" for n in depths],
        "up_block_types": [f"{'CrossAttn' if n else ''}UpBlock2D" for n in reversed(depths)],
        "transformer_layers_per_block": [n or 1 for n in depths],
        "cross_attention_dim": width,
        "attention_head_dim": 8  # which means: heads
        if width == FAMILIES["sd15"].context_width
        else [size // _HEAD_WIDTH for size in channels],
        "use_linear_projection": len(shapes["middle_block.1.proj_in.weight"]) == 2,
    }
    if "label_emb.0.0.weight" in shapes:
        settings["addition_embed_type"] = "text_time"
        settings["addition_time_embed_dim"] = 256
        settings["projection_class_embeddings_input_dim"] = shapes["label_emb.0.0.weight"][1]
    return settings


def _vae_settings(shapes: Mapping[str, tuple[int, ...]], scaling_factor: float) -> dict[str, Any]:
    """The configuration of an `AutoencoderKL`."""
    levels = 1 + max(_numbers(shapes, r"encoder\.down\.(\d+)\."))
    return {
        "block_out_channels": [
            shapes[f"encoder.down.{level}.block.0.conv2.weight"][0] for level in range(levels)
        ],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": len(_numbers(shapes, r"encoder\.down\.0\.block\.(\d+)\.")),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "scaling_factor": scaling_factor,
    }


def _text_settings(
    shapes: Mapping[str, tuple[int, ...]], open_clip: bool, left_out: int
) -> dict[str, Any]:
    """The configuration of a `CLIPTextModel` without its last layers."""
    rows, width = next(s for n, s in shapes.items() if n.endswith("token_embedding.weight"))
    inner = {int(match[1]): s[0] for name, s in shapes.items() if (match := _MLP.search(name))}
    return {
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": inner[0],
        "projection_dim": width,
        "num_hidden_layers": len(inner) - left_out,
        "num_attention_heads": width // _HEAD_WIDTH,
        "hidden_act": "gelu" if open_clip else "quick_gelu",
        "bos_token_id": VOCABULARY_SIZE - 2,
        "eos_token_id": VOCABULARY_SIZE - 1,
    }


def _scheduler_settings(prediction: FilePrediction) -> dict[str, Any]:
    """The noise levels of every Stable Diffusion."""
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": TIMESTEPS,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "steps_offset": 1,
        "prediction_type": "epsilon" if prediction == "epsilon" else "v_prediction",
        "rescale_betas_zero_snr": prediction == "v-ztsnr",
    }


def _numbers(names: Mapping[str, Any], pattern: str) -> set[int]:
    """Of the blocks whose names begin like this."""
    return {int(match[1]) for name in names if (match := re.match(pattern, name))}
