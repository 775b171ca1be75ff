"""From a request to a concept: every picture is checked and encoded, then the training runs. Hosts
differ in what they do between the two, and in nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..concept.concept import Concept
from ..concept.text import TextEncoder
from ..diffusion.protocols import Denoiser, LatentEncoder
from .data.mixing import check_masks, mixable, with_mixed
from .earlier import check_earlier
from .events import Event
from .loop import train
from .prepare import prepare
from .request import TrainingRequest

Progress = Callable[[int, int], None]
"""Called with how many views are encoded, and of how many"""


def prepared(
    request: TrainingRequest,
    denoiser: Denoiser,
    text_encoder: TextEncoder,
    latent_encoder: LatentEncoder,
    on_progress: Progress = lambda done, total: None,
) -> Callable[..., Concept]:
    """Checks a request, encodes its pictures, and returns its training: `loop.train` of this
    request, to be called with a denoiser and a text encoder when their turn has come.

    Raises ConfigError, DataError, TokenError or IncompatibleModelError before any time is spent.
    """
    if request.earlier:
        check_earlier(request.earlier, denoiser, request.config)
    mixing = request.config.seg_mix > 0
    if mixing:
        mixable(request.concepts, request.config)
    if request.config.attention_weight:
        check_masks(request.concepts)
    count = len(request.concepts) + mixing
    banks = [
        prepare(
            concept,
            request.config,
            latent_encoder,
            text_encoder,
            _part(on_progress, index, count),
            earlier=request.earlier,
        )
        for index, concept in enumerate(request.concepts)
    ]
    if mixing:
        last = _part(on_progress, count - 1, count)
        banks = with_mixed(banks, request.concepts, request.config, latent_encoder, last)
    return partial(train, request.config, request.concepts, banks, earlier=request.earlier)


def _part(on_progress: Progress, before: int, count: int) -> Progress:
    """Progress of one of so many concepts, as progress of all."""
    return lambda done, total: on_progress(before * total + done, count * total)


def teach(
    request: TrainingRequest,
    denoiser: Denoiser,
    text_encoder: TextEncoder,
    latent_encoder: LatentEncoder,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Concept:
    """All of it at once."""
    training = prepared(request, denoiser, text_encoder, latent_encoder)
    return training(denoiser, text_encoder, on_event=on_event)
