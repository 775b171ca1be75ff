"""CLIP's text space through open_clip: how near captions are to each other."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pickle import UnpicklingError

import torch
from torch import Tensor

from ..concept.errors import ConfigError, IncompatibleModelError

MODEL, WEIGHTS = "ViT-B-32-quickgelu", "openai"
_BATCH_SIZE = 256


class OpenClipText:
    """The text half of a CLIP model; fulfils `trainer.retrieval.index.Embed`."""

    def __init__(self, model: str = MODEL, weights: str = WEIGHTS, device: str = "cpu") -> None:
        """`weights` is a file, or a name that open_clip knows and downloads once.

        Raises ConfigError where open_clip is not installed and IncompatibleModelError where model
        and weights cannot be had.
        """
        try:
            import open_clip
        except ImportError as error:
            raise ConfigError(
                "Searching a collection needs the package open_clip_torch. Install it with "
                "`pip install open_clip_torch` into the same Python."
            ) from error
        try:
            with warnings.catch_warnings():
                # Weights with another activation than the model's load, and mean nothing.
                warnings.filterwarnings("error", "QuickGELU mismatch")
                clip = open_clip.create_model(
                    model, pretrained=weights, device=device, require_pretrained=True
                )
            self._tokenize = open_clip.get_tokenizer(model)
        except (RuntimeError, OSError, ValueError, KeyError, UnpicklingError, UserWarning) as error:
            raise IncompatibleModelError(
                f"open_clip has no model {model!r} with the weights {weights!r} "
                f"({str(error).splitlines()[0][:200]}). Give a model and weights that "
                f"open_clip.list_pretrained() names, or a file of the model's weights."
            ) from error
        clip.visual = None  # pictures are not looked at
        self._clip, self._device = clip.eval().requires_grad_(False), device
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self._clip.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        self.name = f"{model} {digest.hexdigest()}"
        """What captions are embedded by, weights and all"""

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Features (n, d) of length 1, on the CPU."""
        parts = []
        for start in range(0, len(captions), _BATCH_SIZE):
            tokens = self._tokenize(list(captions[start : start + _BATCH_SIZE])).to(self._device)
            parts.append(self._clip.encode_text(tokens, normalize=True).float().cpu())
        return torch.cat(parts)
