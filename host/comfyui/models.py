"""ComfyUI's MODEL, CLIP and VAE as the trainer's protocols: private copies, made outside inference
mode.

Nodes run in inference mode, and tensors made there cannot be trained through; and another prompt
may move or patch the loaded model at any time. So a job gets copies of its own, with the model's
patches in them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import comfy.latent_formats
import comfy.ldm.modules.attention
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.sd1_clip
import comfy.sdxl_clip
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.modules.diffusionmodules.util import timestep_embedding
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ...concept.errors import CustomDiffusionError, IncompatibleModelError
from ...concept.layers import Family, family_of_width, is_cross_attention, is_projection
from ...formats.base import BaseModel
from ...trainer.protocols import Prediction
from ..clip_pair import ClipTextEncoderPair
from ..clip_text import ClipTextEncoder, text_transformer
from .tokenizer import known_tokens

_UNET_PREFIX = "diffusion_model."
_BLOCK = re.compile(r"(input_blocks\.\d+|middle_block|output_blocks\.\d+)\.\d+$")
_HEAD_WIDTH = 64  # of every CLIP text model
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_TIMESTEPS = 1000  # of every Stable Diffusion
_SIZES, _SIZE_WIDTH = 6, 256  # SDXL reads six sizes of a picture, each as so many waves


def cross_attention_unet(model: Any) -> UNetModel:
    """The UNet of a MODEL; raises IncompatibleModelError when it has no cross-attention."""
    network = model.model.diffusion_model
    if not isinstance(network, UNetModel) or not _projections(network):
        raise IncompatibleModelError(
            f"This model is a {type(network).__name__} ({type(model.model).__name__}), which has "
            "no cross-attention with key and value projections. Custom Diffusion needs a Stable "
            "Diffusion UNet: load a checkpoint of SD 1.x, SD 2.x or SDXL."
        )
    return network


def unet_family(network: UNetModel) -> Family:
    """The family of a UNet, from the width of the text features it reads."""
    path = next(iter(_projections(network).values()))
    return family_of_width(network.get_submodule(path).weight.shape[1])


class ComfyDenoiser:
    """A private, frozen copy of a MODEL's UNet; fulfils `trainer.protocols.Denoiser`.

    It computes in `dtype`. With `keep_float8` matrices that are loaded in 8 bits stay so; a
    training can use them as long as nothing of the network itself learns.
    """

    def __init__(self, model: Any, dtype: torch.dtype, keep_float8: bool = False) -> None:
        network = cross_attention_unet(model)
        self.family = unet_family(network)
        pooled = self.family.pooled_width
        beside = 0 if network.num_classes is None else model.model.adm_channels
        needed = pooled + _SIZES * _SIZE_WIDTH if pooled else 0
        if beside != needed or network.in_channels != 4:
            raise IncompatibleModelError(
                f"Training needs an ordinary text-to-image model; this one is "
                f"{type(model.model).__name__} ({self.family.title}, {network.in_channels} input "
                f"channels, {beside} numbers beside the text instead of {needed}). Load a "
                f"checkpoint of SD 1.x, SD 2.x or SDXL that is not for inpainting."
            )
        sampling = model.get_model_object("model_sampling")
        self.prediction = _prediction(sampling)
        self.device, self.dtype = torch.device("cpu"), dtype
        colours = model.model.latent_format
        self._rgb = torch.tensor(colours.latent_rgb_factors)
        self._rgb_bias = torch.tensor(colours.latent_rgb_factors_bias or [0.0, 0.0, 0.0])
        with torch.inference_mode(False), torch.no_grad():
            self.alphas_cumprod = 1 / (1 + sampling.sigmas.float().cpu().clone().square())
            self.network: nn.Module = _empty_unet(model, dtype)
            self.projections = _projections(self.network)
            self.blocks: Sequence[str] = [
                path for path, _ in self.network.named_modules() if _BLOCK.match(path)
            ]
            # The projections are trained from their own precision, everything else is cast.
            exact = {f"{path}.weight" for path in self.projections.values()}

            def dtype_of(name: str, weight: Tensor) -> torch.dtype:
                small = keep_float8 and weight.dtype in _FLOAT8 and weight.ndim > 1
                return weight.dtype if small or name in exact else dtype

            weights = patched_weights(model, _UNET_PREFIX, dtype_of)
            self.network.load_state_dict(weights, assign=True)
            self.network.requires_grad_(False).train(False)

    def to(self, device: torch.device) -> None:
        """Moves the copy to the device that trains it."""
        self.network.to(device)
        self.device = device

    def predict(
        self,
        noisy_latents_bchw: Tensor,
        timesteps: Tensor,
        context: Tensor,
        pooled: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> Tensor:
        beside = None
        if self.family.pooled_width:
            assert pooled is not None and sizes is not None, "this UNet reads both"
            waves = timestep_embedding(sizes.flatten(), _SIZE_WIDTH).view(len(sizes), -1)
            beside = torch.cat([pooled.to(waves), waves], 1).to(self.dtype)
        output = self.network(
            noisy_latents_bchw.to(self.dtype),
            timesteps.float(),
            context=context.to(self.dtype),
            y=beside,
            transformer_options={"optimized_attention_override": _pytorch_attention},
        )
        return output.float()  # type: ignore[no-any-return]

    def preview(self, latents_bchw: Tensor) -> Tensor:
        rgb, bias = self._rgb.to(latents_bchw.device), self._rgb_bias.to(latents_bchw.device)
        images = latents_bchw.float().permute(0, 2, 3, 1) @ rgb + bias
        return (images / 2 + 0.5).clamp(0, 1)


class ComfyLatentEncoder:
    """A VAE's encoder as `trainer.protocols.LatentEncoder`; for the prompt thread only."""

    def __init__(self, vae: Any, scale_factor: float) -> None:
        if vae is None or not hasattr(vae.first_stage_model, "encoder"):
            raise IncompatibleModelError(
                "No VAE that can encode pictures was given. Connect the VAE of the checkpoint, or "
                "a VAE Loader."
            )
        self._vae, self._scale = vae, scale_factor

    def moments(self, image_chw: Tensor) -> tuple[Tensor, Tensor]:
        vae, model = self._vae, self._vae.first_stage_model
        comfy.model_management.load_models_gpu([vae.patcher])
        with torch.inference_mode(False), torch.no_grad():
            moments = model.encoder(image_chw[None].to(vae.device, vae.vae_dtype))
            if hasattr(model, "quant_conv"):
                moments = model.quant_conv(moments)
            mean, log_variance = moments[0].float().cpu().chunk(2)
            deviation = (0.5 * log_variance.clamp(-30, 20)).exp()
            return mean * self._scale, deviation * self._scale


def text_encoder(clip: Any) -> ClipTextEncoder | ClipTextEncoderPair:
    """A private copy of a CLIP's text models that can learn words and be differentiated."""
    if clip is None:
        raise IncompatibleModelError(
            "No CLIP was given: the checkpoint has no text encoder. Connect the CLIP of a "
            "checkpoint of SD 1.x, SD 2.x or SDXL, or a CLIP Loader."
        )
    wrapper = clip.cond_stage_model
    if isinstance(wrapper, comfy.sdxl_clip.SDXLClipModel):
        return ClipTextEncoderPair(_one_encoder(clip, "clip_l"), _one_encoder(clip, "clip_g"))
    name = getattr(wrapper, "clip", None)
    source = getattr(wrapper, name, None) if isinstance(name, str) else None
    if not isinstance(source, comfy.sd1_clip.SDClipModel) or name not in ("clip_l", "clip_h"):
        raise IncompatibleModelError(
            f"This CLIP is a {type(wrapper).__name__}; needed is the text encoder of SD 1.x, SD "
            "2.x or SDXL. Connect the CLIP of the same checkpoint as the model."
        )
    return _one_encoder(clip, name)


def _one_encoder(clip: Any, name: str) -> ClipTextEncoder:
    source, tokenizer = getattr(clip.cond_stage_model, name), getattr(clip.tokenizer, name)
    return ClipTextEncoder(
        name,
        _text_model(clip, name),
        tokenizer.tokenizer,
        pad_id=tokenizer.pad_token,
        hidden_layer=_hidden_layer(clip, source),
        normed=source.layer_norm_hidden_state,
        embeddings=known_tokens(tokenizer),
    )


def patched_weights(
    patcher: Any,
    prefix: str,
    dtype_of: Callable[[str, Tensor], torch.dtype] = lambda name, weight: weight.dtype,
) -> dict[str, Tensor]:
    """Copies of the weights below `prefix`, on the CPU, with the patches (LoRAs) applied.

    Numbers that are stored with a scale come as what they stand for. `dtype_of` says what a weight
    is cast to, at once: two copies of a whole model would be the peak of memory.

    ComfyUI's `get_key_patches` gives the same, but not of a model whose state has keys beside its
    parameters, as scales are.
    """
    weights = {}
    for key, _ in patcher.model.named_parameters():
        if not key.startswith(prefix):
            continue
        weight, _, convert = comfy.model_patcher.get_key_weight(patcher.model, key)
        if key in patcher.backup:
            weight = patcher.backup[key].weight
        if key in patcher.hook_backup:
            weight = patcher.hook_backup[key][0]
        copy = weight.detach().to("cpu", copy=True)
        if convert is not None:
            copy = convert(copy, inplace=True)
        if key in patcher.patches:
            changed = comfy.lora.calculate_weight(patcher.patches[key], copy.float(), key)
            copy = changed.to(weight.dtype)
        name = key.removeprefix(prefix)
        weights[name] = copy.to(dtype_of(name, copy))
    return weights


def patched_projections(model: Any) -> dict[str, Tensor]:
    """Copies of the key and value projections of a MODEL's UNet, by layer, patches applied."""
    return {
        layer: patched_weights(model, f"{_UNET_PREFIX}{layer}.")["weight"]
        for layer in _projections(model.model.diffusion_model)
    }


def base_model(model: Any) -> BaseModel:
    """Copies of the cross-attention of a MODEL's UNet, patches applied."""
    network = cross_attention_unet(model)
    layers = [path for path, _ in network.named_modules() if is_cross_attention(path)]
    return BaseModel({k: patched_weights(model, f"{_UNET_PREFIX}{k}.")["weight"] for k in layers})


def training_dtype(device: torch.device) -> torch.dtype:
    """What frozen weights compute in: bfloat16 on a GPU that has it, else float32."""
    has_bf16 = device.type == "cuda" and comfy.model_management.should_use_bf16(device)
    return torch.bfloat16 if has_bf16 else torch.float32


def _projections(network: nn.Module) -> dict[str, str]:
    return {path: path for path, _ in network.named_modules() if is_projection(path)}


def _prediction(sampling: Any) -> Prediction:
    kinds = comfy.model_sampling
    discrete = isinstance(sampling, kinds.ModelSamplingDiscrete)
    known = isinstance(sampling, kinds.EPS) and not isinstance(sampling, (kinds.EDM, kinds.X0))
    if not discrete or not known or len(sampling.sigmas) != _TIMESTEPS:
        names = " ".join(kind.__name__ for kind in type(sampling).__mro__[1:-1])
        raise IncompatibleModelError(
            f"The model samples by {names}; training needs one that predicts noise (epsilon) or "
            f"velocity (v) at {_TIMESTEPS} discrete steps. Remove the sampling node before it."
        )
    return "v" if isinstance(sampling, kinds.V_PREDICTION) else "epsilon"


class _Layers:
    """torch's own layers. ComfyUI's ask at every call whether the prompt is to be interrupted: on
    the trainer thread they would end a job for it, and keep it from the prompt that is meant.
    """

    Linear, Conv2d, Conv3d = nn.Linear, nn.Conv2d, nn.Conv3d
    GroupNorm, LayerNorm = nn.GroupNorm, nn.LayerNorm

    @classmethod
    def conv_nd(cls, dims: int, *args: Any, **kwargs: Any) -> nn.Module:
        return {2: cls.Conv2d, 3: cls.Conv3d}[dims](*args, **kwargs)


def _empty_unet(model: Any, dtype: torch.dtype) -> nn.Module:
    config = {**model.model.model_config.unet_config, "dtype": dtype}
    config.pop("disable_unet_model_creation", None)
    return UNetModel(**config, device="meta", operations=_Layers)


def _pytorch_attention(_chosen: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Attention that is the same in forward and backward, whatever ComfyUI chose for sampling."""
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)  # type: ignore[no-any-return]


def _text_model(clip: Any, name: str) -> Any:
    with torch.inference_mode(False), torch.no_grad():
        prefix = f"{name}.transformer.text_model."
        weights = patched_weights(clip.patcher, prefix, lambda name, weight: torch.float32)
        vocabulary, width = weights["embeddings.token_embedding.weight"].shape
        config = CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=len(weights["encoder.layers.0.mlp.fc1.weight"]),
            num_hidden_layers=sum(k.endswith("mlp.fc1.weight") for k in weights),
            num_attention_heads=width // _HEAD_WIDTH,
            max_position_embeddings=len(weights["embeddings.position_embedding.weight"]),
            hidden_act="quick_gelu" if name == "clip_l" else "gelu",
            projection_dim=width,
        )
        projected = name == "clip_g"
        with torch.device("meta"):
            model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
        inner = text_transformer(model)
        missing, unexpected = inner.load_state_dict(weights, strict=False, assign=True)
        if missing or unexpected:
            raise CustomDiffusionError(
                f"The CLIP's weights do not fit a CLIP text model: {len(missing)} are missing "
                f"({missing[:2]}), {len(unexpected)} are unknown ({unexpected[:2]})."
            )
        positions = torch.arange(config.max_position_embeddings)[None]
        inner.embeddings.register_buffer("position_ids", positions, persistent=False)
        if projected:
            projection = patched_weights(clip.patcher, f"{name}.transformer.text_projection.")
            model.text_projection.weight = nn.Parameter(projection["weight"].float())
        return model.requires_grad_(False).train(False)


def _hidden_layer(clip: Any, source: Any) -> int | None:
    """The layer whose features ComfyUI reads: the model's own, or that of CLIP Set Last Layer."""
    layer, index = source.options_default[:2]
    if clip.layer_idx is not None:
        layer, index = "hidden", clip.layer_idx
    if layer == "last" or abs(index) > source.num_layers:
        return None
    return int(index)
