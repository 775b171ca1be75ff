"""Before a run: everything that can be wrong is found out, then the pictures are encoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..concept.concept import Concept
from ..concept.errors import ConfigError, DataError
from ..concept.text import TextEncoder
from ..diffusion.protocols import LatentEncoder
from .config import TrainConfig
from .data.augmentation import PREFIXES
from .data.captioned import check_readable
from .data.latents import LatentBank, encode_views
from .data.training_concept import TrainingConcept
from .learning.optimizer import check_optimizer
from .learning.prompt_features import MOST_CHUNKS
from .learning.schedule import check_schedule
from .learning.tokens import initial_embedding
from .learning.weighting import check_timesteps
from .methods import METHODS, gradient_cut


def prepare(
    concept: TrainingConcept,
    config: TrainConfig,
    latent_encoder: LatentEncoder,
    text_encoder: TextEncoder,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    earlier: Concept | None = None,
) -> LatentBank:
    """Checks pictures, words and settings, and returns the latents that the run draws from.

    Regularization images that the run has no use for are left out; `earlier` is the concept that it
    goes on from.
    Raises DataError, TokenError or ConfigError before any time is spent on encoding.
    """
    if concept.token and gradient_cut(config, earlier) == "own words":
        # Nothing learns from a caption without the word.
        concept = replace(concept, regularization=())
    if concept.regularization and config.batch_size < 2:
        raise ConfigError(
            f"batch_size={config.batch_size} leaves no place for regularization images. Use 2 or "
            f"more, or leave the regularization images out."
        )
    if config.validation_pictures >= len(concept.images):
        raise ConfigError(
            f"validation_pictures={config.validation_pictures} leaves nothing to learn from: there "
            f"are {len(concept.images)} pictures of the {concept.class_noun}. Keep back fewer, or "
            f"give more pictures."
        )
    check_optimizer(config)
    check_schedule(config)
    _check_class_prior(config, earlier)
    check_timesteps(config)
    check_readable([*concept.images, *concept.regularization])
    _check_words(concept, config, text_encoder)
    own_words = gradient_cut(config, earlier) == "own words"
    if concept.token and config.caption_dropout and own_words:
        raise ConfigError(
            f"caption_dropout={config.caption_dropout:g} shows pictures without the trigger "
            f"word, from which gradient_cut='own words' learns nothing. Set caption_dropout to "
            f"0, or choose another gradient_cut; plain_captions keeps the trigger word."
        )
    return encode_views(concept, latent_encoder, config, on_progress)


def _check_class_prior(config: TrainConfig, earlier: Concept | None) -> None:
    if not config.class_prior:
        return
    if gradient_cut(config, earlier) == "own words":
        raise ConfigError(
            f"class_prior={config.class_prior:g} holds the class without the trigger word, which "
            f"gradient_cut='own words' does not change. Set class_prior to 0, or choose another "
            f"gradient_cut."
        )
    if not METHODS[config.method].leaves_network_frozen:
        raise ConfigError(
            f"class_prior needs the network as it was, and the method {config.method!r} changes "
            f"more of it than keys and values. Use regularization pictures, or another method."
        )


def _check_words(concept: TrainingConcept, config: TrainConfig, encoder: TextEncoder) -> None:
    words = encoder
    if concept.token:
        embedding = initial_embedding(encoder, concept.initializer)
        words = encoder.with_tokens({name: {concept.token: row} for name, row in embedding.items()})
    prefixes = PREFIXES if config.augment else ("",)
    before = max(len(words.tokenize_words(prefix)) for prefix in prefixes)
    most = MOST_CHUNKS * (words.context_length - 2)
    captions = [
        (image, caption)
        for image in (*concept.images, *concept.regularization)
        for caption in image.captions
    ]
    for image, caption in captions:
        if (count := before + len(words.tokenize_words(caption))) > most:
            raise DataError(
                f"The caption {caption[:80]!r}... of {image.name} has {count} tokens; {most} are "
                f"the most that are read. Shorten it."
            )
