"""What goes into a training, as one short text: equal for two that take the same steps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from ...concept.errors import DataError
from ...concept.file import concept_tensors
from ...concept.regular_files import read_regular
from ...concept.text import TextEncoder
from ...pictures.opening import MOST_BYTES
from ..config import SETTINGS
from ..request import TrainingRequest

_SAMPLED = 4096  # entries of each weight that are looked at
Network = nn.Module | Iterable[tuple[str, Tensor]]
"""Or its weights one after the other, in the order of its state"""
_ENDS = {"steps", "early_stopping", "patience_steps"}
_LATER_COUNT_WHERE_CHOSEN = {
    name: one.default for name, one in SETTINGS.items() if one.group == "options"
}
"""Settings that came later, and what they were before: jobs from then are found"""
_KEEPING_BACK = {"validation_pictures", "validation_every_steps"}
_PROBE = "photo of a cat on the left of a red mug"


def training_fingerprint(
    request: TrainingRequest, encoder: TextEncoder, networks: Iterable[Network]
) -> str:
    """Of settings, pictures, words and models. Raises DataError for a picture that is not there.

    The number of steps does not count, nor what may end them early: a longer training begins as a
    shorter one does. What is kept back counts where something is.
    Of every weight of the networks some thousand entries count, of the text encoder what it says of
    one prompt: another checkpoint, or a LoRA, changes them.
    """
    uncounted = _ENDS if request.config.validation_pictures else _ENDS | _KEEPING_BACK
    if request.config.schedule != "constant":  # every step's rate follows from how many there are
        uncounted = uncounted - {"steps"}
    settings = {
        name: value
        for name, value in request.config.as_json().items()
        if name not in uncounted
        and value != ""  # jobs from before there were texts are found
        and (name not in _LATER_COUNT_WHERE_CHOSEN or value != _LATER_COUNT_WHERE_CHOSEN[name])
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for concept in request.concepts:
        words = (concept.token, concept.class_noun, concept.initializer, concept.template)
        digest.update(repr(words).encode())
        if concept.weight != 1:  # nothing for 1, here and below: jobs from before are found
            digest.update(f"weighs {concept.weight}".encode())
        for images in (concept.images, concept.regularization):
            digest.update(f"{len(images)} pictures".encode())
            for image in images:
                digest.update(image.caption.encode())
                if request.config.caption_lines == "any":
                    digest.update(repr(image.choices).encode())
                if image.repeats > 1:  # nothing for one: jobs from before it was counted are found
                    digest.update(f"{image.repeats} times".encode())
                if image.weight != 1:
                    digest.update(f"weighs {image.weight}".encode())
                for source in (image.source, image.mask):
                    digest.update(_content(source))
    _update_with_models(digest, encoder, networks)
    earlier = concept_tensors(request.earlier) if request.earlier else {}
    for name, tensor in sorted(earlier.items()):
        _update(digest, name, tensor)
    return digest.hexdigest()


def models_fingerprint(encoder: TextEncoder, networks: Iterable[Network]) -> str:
    """Of models alone: equal for two that nothing of a training can tell apart."""
    digest = hashlib.sha256()
    _update_with_models(digest, encoder, networks)
    return digest.hexdigest()


def _update_with_models(
    digest: hashlib._Hash, encoder: TextEncoder, networks: Iterable[Network]
) -> None:
    ids = encoder.pad([encoder.tokenize(_PROBE)])
    with torch.no_grad():
        _update(digest, "text", encoder.encode_with_pooled(ids).context)
    for network in networks:
        weights = network.state_dict().items() if isinstance(network, nn.Module) else network
        for name, tensor in weights:
            _update(digest, name, tensor)


def _update(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    flat = tensor.detach().reshape(-1)
    some = flat[:: max(1, len(flat) // _SAMPLED)].cpu().contiguous()
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(some.view(torch.uint8).numpy().data)


def _content(source: Image.Image | Path | None) -> bytes:
    if source is None:
        return b"none"
    if isinstance(source, Path):
        try:
            return hashlib.sha256(read_regular(source, MOST_BYTES)).digest()
        except OSError as error:
            raise DataError(
                f"{source} cannot be read ({error.strerror}). Put it back, or leave it out."
            ) from error
    return hashlib.sha256(repr((source.mode, source.size)).encode() + source.tobytes()).digest()
