"""CLIP's text space through open_clip: how near captions are to each other."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pickle import UnpicklingError

import torch
from torch import Tensor
from torch.func import functional_call

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
        # A causal model does not look at what follows a word, and reads a caption at its end.
        self._causal = (
            isinstance(clip, open_clip.CLIP)
            and clip.attn_mask is not None
            and clip.text_pool_type == "argmax"
        )
        self._clip, self._device = clip.eval().requires_grad_(False), device
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self._clip.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        self.name = f"{model} {digest.hexdigest()}"
        """What captions are embedded by, weights and all"""

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Features (n, d) of length 1, on the CPU."""
        tokens = self._tokenize(list(captions))
        count, longest = tokens.shape
        # The token that ends a caption has the highest number.
        lengths = tokens.argmax(dim=1) + 1 if self._causal else torch.full((count,), longest)
        order = lengths.argsort()  # captions of about equal length share a batch
        parts = [
            self._encode(tokens[rows, : int(lengths[rows[-1]])]).float().cpu()
            for rows in order.split(_BATCH_SIZE)
        ]
        return torch.cat(parts)[order.argsort()]

    def _encode(self, tokens: Tensor) -> Tensor:
        """Of captions without the padding that all of them have, if the model is causal."""
        tokens, length = tokens.to(self._device), tokens.shape[1]
        if not self._causal:
            return self._clip.encode_text(tokens, normalize=True)  # type: ignore[no-any-return]
        cut = {
            "positional_embedding": self._clip.positional_embedding[:length],
            "attn_mask": self._clip.attn_mask[:length, :length],
        }
        features: Tensor = functional_call(self._clip, cut, (), {"text": tokens})[1]
        return features
