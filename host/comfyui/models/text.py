"""A CLIP's text models as ones that can learn words and be differentiated."""

from __future__ import annotations

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
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ....concept.errors import CustomDiffusionError, IncompatibleModelError
from ...clip.pair import ClipTextEncoderPair
from ...clip.text_encoder import ClipTextEncoder, text_transformer
from ..tokenizer import known_tokens
from .weights import patched_weights

_HEAD_WIDTH = 64  # of every CLIP text model


def text_encoder(clip: Any) -> ClipTextEncoder | ClipTextEncoderPair:
    """A private copy of a CLIP's text models that can learn words and be differentiated."""
    encoders = [_one_encoder(clip, name) for name in encoder_names(clip)]
    return ClipTextEncoderPair(*encoders) if len(encoders) == 2 else encoders[0]


def encoder_names(clip: Any) -> tuple[str, ...]:
    """`clip_l`, `clip_h`, or `clip_l` and `clip_g`; raises IncompatibleModelError for other CLIPs.

    The rows of their features are the tokens of a prompt, chunk after chunk.
    """
    if clip is None:
        raise IncompatibleModelError(
            "No CLIP was given: the checkpoint has no text encoder. Connect the CLIP of a "
            "checkpoint of SD 1.x, SD 2.x or SDXL, or a CLIP Loader."
        )
    wrapper = clip.cond_stage_model
    if isinstance(wrapper, comfy.sdxl_clip.SDXLClipModel):
        return "clip_l", "clip_g"
    name = getattr(wrapper, "clip", None)
    source = getattr(wrapper, name, None) if isinstance(name, str) else None
    if not isinstance(source, comfy.sd1_clip.SDClipModel) or name not in ("clip_l", "clip_h"):
        raise IncompatibleModelError(
            f"This CLIP is a {type(wrapper).__name__}; needed is the text encoder of SD 1.x, SD "
            "2.x or SDXL. Connect the CLIP of the same checkpoint as the model."
        )
    return (name,)


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
