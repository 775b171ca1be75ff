"""The captions' factor on disk: encoding a thousand captions takes longer than everything else."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..concept.atomic import write_atomically
from ..concept.errors import MergeError, UnreadableFileError
from ..concept.tensors import read_tensors
from ..concept.text import TextEncoder, encode_unpadded
from .projector import CaptionFactor, caption_factor

_FACTOR_VERSION = "caption factor 1"  # raise it when the factor is computed in another way


def cached_caption_factor(
    encoder: TextEncoder,
    captions: Sequence[str],
    relative_ridge: float,
    cache_folder: Path | None,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> CaptionFactor:
    """The factor of the captions' features; from disk when this encoder met these captions before.

    Encoding them can be stopped by an exception out of `on_progress`.
    """
    if cache_folder is None:
        return _compute_factor(encoder, captions, relative_ridge, on_progress)
    text = "\0".join([_FACTOR_VERSION, encoder.fingerprint(), repr(relative_ridge), *captions])
    path = (
        cache_folder
        / f"captions-{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}.safetensors"
    )
    if path.is_file():
        try:
            upper = read_tensors(path)[0]["upper"]
            if upper.shape != (encoder.context_width, encoder.context_width):
                raise ValueError(f"its shape is {tuple(upper.shape)}")
            return CaptionFactor(upper, len(captions))
        except (UnreadableFileError, KeyError, ValueError) as error:
            reason = error.reason if isinstance(error, UnreadableFileError) else error
            raise MergeError(
                f"The cached caption factor {path} is damaged ({reason}). Delete this file and "
                "merge again; it is computed anew."
            ) from error
    factor = _compute_factor(encoder, captions, relative_ridge, on_progress)
    write_atomically(
        path, lambda temporary: save_file({"upper": factor.upper}, temporary), factor.upper.nbytes
    )
    return factor


def _compute_factor(
    encoder: TextEncoder,
    captions: Sequence[str],
    relative_ridge: float,
    on_progress: Callable[[float], None],
) -> CaptionFactor:
    token_ids = [encoder.tokenize(caption) for caption in captions]
    # The start token is the same in every caption and no concept changes it: it is left out, as in
    # the reference.
    encoded = encode_unpadded(encoder, token_ids, on_progress=on_progress)
    features = torch.cat([rows[1:].cpu() for rows in encoded])
    return caption_factor(features, len(captions), relative_ridge)
