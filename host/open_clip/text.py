"""CLIP's text space through open_clip: how near captions are to each other.

A graph or a command names one of the models listed here and a file of its weights, never a
repository or a folder: open_clip's own look-up would download those and run the code in them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from ...concept.errors import ConceptFileError, ConfigError, IncompatibleModelError
from ...concept.tensors import read_tensors

_NETWORKS = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "ViT-g-14")
MODELS = tuple(
    f"{network}{activation}"
    for network in (*_NETWORKS, "ViT-bigG-14", "RN50", "RN101")
    for activation in ("-quickgelu", "")
    if f"{network}{activation}" != "ViT-g-14-quickgelu"
)
"""All of them read text with CLIP's own vocabulary, which comes with open_clip."""
MODEL = MODELS[0]
_BATCH_SIZE = 256
_SMALL_VISION = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 32}
_UNUSED = {"logit_scale", "logit_bias"}
"""Compares pictures with text; captions are only compared with each other."""


class OpenClipText:
    """The text half of a CLIP model; fulfils `trainer.regularization.caption_index.Embed`."""

    def __init__(self, model: str, weights: Path, device: str = "cpu") -> None:
        """`model` is one of `MODELS`; `weights` a .safetensors with open_clip's names.

        Raises ConfigError where open_clip is not installed and IncompatibleModelError where the
        model is unknown or the weights are not those of its text half.
        """
        try:
            from open_clip import CLIP, SimpleTokenizer, get_model_config
        except ImportError as error:
            raise ConfigError(
                "Searching a collection needs the package open_clip_torch. Install it with "
                "`pip install open_clip_torch` into the same Python."
            ) from error
        check_clip_model(model)
        config = get_model_config(model)
        with torch.random.fork_rng(devices=[]):  # weights are drawn, and then replaced
            clip = CLIP(**{**config, "vision_cfg": _SMALL_VISION})  # pictures are not looked at
        del clip.visual
        _load_text_half(clip, model, weights)
        self._tokenize = SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
        self._clip, self._device = clip.to(device).eval().requires_grad_(False), device
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self._clip.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        self.name = f"{model} {digest.hexdigest()}"
        """What captions are embedded by, weights and all"""

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Features (n, d) of length 1, on the CPU."""
        tokens = self._tokenize(list(captions))
        lengths = tokens.argmax(dim=1) + 1  # the token that ends a caption has the highest number
        order = lengths.argsort()  # captions of about equal length share a batch
        parts = [
            self._encode(tokens[rows, : int(lengths[rows[-1]])]).float().cpu()
            for rows in order.split(_BATCH_SIZE)
        ]
        return torch.cat(parts)[order.argsort()]

    def _encode(self, tokens: Tensor) -> Tensor:
        """Of captions without the padding that all of them have. A causal model does not look at
        what follows a word, and reads a caption at its end.
        """
        length = tokens.shape[1]
        cut = {
            "positional_embedding": self._clip.positional_embedding[:length],
            "attn_mask": self._clip.attn_mask[:length, :length],
        }
        features: Tensor = functional_call(self._clip, cut, (), {"text": tokens.to(self._device)})[
            1
        ]
        return features


def check_clip_model(model: str) -> None:
    """Raises IncompatibleModelError for a name that is not in `MODELS`."""
    if model not in MODELS:
        raise IncompatibleModelError(
            f"The CLIP model {model[:100]!r} is not known, and nothing is looked up elsewhere. "
            f"Give one of {', '.join(MODELS)}."
        )


def _load_text_half(clip: Any, model: str, weights: Path) -> None:
    try:
        text, _ = read_tensors(weights, lambda name: not name.startswith("visual."))
    except ConceptFileError as error:
        raise IncompatibleModelError(
            f"The CLIP weights {weights.name} cannot be read. Give the .safetensors of an "
            f"open_clip model, open_clip_model.safetensors as a rule. ({error})"
        ) from error
    wrong = _difference(clip.state_dict(), text)
    if wrong:
        raise IncompatibleModelError(
            f"{weights.name} does not hold the text half of {model}: {wrong}. Choose the model "
            f"that the file belongs to, or the file of this model as open_clip writes it."
        )
    clip.load_state_dict({name: tensor.float() for name, tensor in text.items()}, strict=False)


def _difference(needed: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> str:
    """What keeps tensors from being loaded; empty where they fit."""
    missing = sorted(needed.keys() - present.keys() - _UNUSED)
    unknown = sorted(present.keys() - needed.keys() - _UNUSED)
    if missing:
        return f"{len(missing)} tensors are missing, {missing[0]} for one"
    if unknown:
        return f"{len(unknown)} tensors are unknown, {unknown[0][:100]} for one"
    for name in sorted(needed.keys() & present.keys()):
        if needed[name].shape != present[name].shape:
            shapes = [tuple(tensors[name].shape) for tensors in (present, needed)]
            return f"{name} is {shapes[0]}, needed {shapes[1]}"
    return ""
