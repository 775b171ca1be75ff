"""What learns in a run (words, keys and values, further weights of the network), and the concept
that it is so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn

from ..concept.concept import Concept, ModifierToken, Scope
from ..concept.errors import ConfigError
from ..concept.fit import TEXT_MARK
from ..concept.prompts import subject
from ..concept.text import TextEncoder, text_mark
from ..diffusion.protocols import Denoiser
from .checkpoint import Checkpoint
from .config import TrainConfig
from .data.batches import Batch
from .data.training_concept import TrainingConcept
from .earlier import check_earlier
from .events import CheckpointDue
from .learning.class_prior import class_prompts, with_class_prior
from .learning.network_weights import NetworkWeights
from .learning.optimizer import averaged, make_optimizer
from .learning.pivotal import check_word_steps, words_first
from .learning.prompt_features import PromptFeatures
from .learning.samples import Samples, loss_of
from .learning.schedule import set_rates
from .learning.tokens import drift, words_to_teach
from .learning.word_attention import WordAttention, WordPlaces, word_places
from .methods import METHODS, gradient_cut

_FINAL_LOSSES = 20


class Learner:
    """Everything that a run changes, all of it in float32, as `config.method` chooses it."""

    def __init__(
        self,
        config: TrainConfig,
        training_concepts: Sequence[TrainingConcept],
        earlier: Concept | None,
        denoiser: Denoiser,
        text_encoder: TextEncoder,
    ) -> None:
        """Raises ConfigError and IncompatibleModelError for what cannot be learnt on this model."""
        self._config, self._training_concepts = config, training_concepts
        self._family = denoiser.family
        self._earlier = earlier = earlier or Concept(denoiser.family, {})
        self._method = method = METHODS[config.method]
        further_layers = method.further_layers(denoiser)
        check_earlier(earlier, denoiser, config)
        cut = gradient_cut(config, earlier)
        self._scope: Scope = "own words" if cut == "own words" else "every word"
        words = words_to_teach(training_concepts, earlier, text_encoder, denoiser.device)
        self._words = words
        self._began = {
            name: {token: row.detach().clone() for token, row in rows.items()}
            for name, rows in words.items()
        }
        self._learning_words = words if method.learns_words else {}
        known = {name: {**r, **words.get(name, {})} for name, r in earlier.embeddings().items()}
        self.prompts = PromptFeatures(
            text_encoder.with_tokens(known),
            self._learning_words,
            cut,
            [(concept.token, concept.class_noun) for concept in training_concepts],
        )
        self.projections = method.projections(denoiser, earlier.deltas, config)
        self.attention = (
            WordAttention(denoiser, self.projections) if config.attention_weight else None
        )
        """Watches words where they are kept inside their masks"""
        self._subjects = [(concept.token, concept.class_noun) for concept in training_concepts]
        self._network = NetworkWeights(
            denoiser, earlier.deltas, further_layers, method.whole_network
        )
        rows = [row for tokens in self._learning_words.values() for row in tokens.values()]
        check_word_steps(config, rows)
        self.parameters: list[Tensor] = [
            *self.projections.parameters(),
            *rows,
            *self._network.parameters(),
        ]
        if not words and (method.whole_network or not self.parameters):
            raise ConfigError(
                f"The method {config.method!r} saves a UNet and a new word, but no concept has a "
                f"trigger word. Give one, '<new1>' for example, or choose another method."
            )
        self.optimizer = make_optimizer(config, self.parameters, rows)
        self._after_words = [p for p in self.parameters if not any(p is row for row in rows)]
        self._text_mark = text_mark(text_encoder)
        self._base_hash = self.projections.base_hash  # of the network's own keys and values

    @property
    def prompt(self) -> str:
        """Draws what the first concept teaches."""
        return self._training_concepts[0].prompt

    @contextmanager
    def learning(self) -> Iterator[None]:
        """While the context lasts the network uses what learns; afterwards its own again."""
        watching = self.attention.watching() if self.attention else nullcontext()
        with self.projections.installed(), self._network.learning(), watching:
            yield

    def loss_of(self, samples: Samples) -> Tensor:
        """What some samples of a step add to its loss."""
        return loss_of(self.projections, samples, self.attention, self._config.attention_weight)

    def with_class_prior(self, samples: Samples, batch: Batch) -> Samples:
        """The samples of a step, with those that hold the class where the settings ask for it."""
        if not self._config.class_prior:
            return samples
        count = len(batch.prompts) - batch.prior
        tokens = [token for token, _ in self._subjects]
        text = self.prompts.encode(class_prompts(batch.prompts[:count], tokens))
        return with_class_prior(samples, text, self._config.class_prior, count)

    def places(self, batch: Batch, context: Tensor) -> WordPlaces | None:
        """Where the words of a batch are, where that counts."""
        if not self.attention:
            return None
        rows = self.prompts.word_rows(batch.prompts, context)
        return word_places(rows, self._subjects, batch.subject_masks, batch.masks_bhw)

    @contextmanager
    def as_learnt(self) -> Iterator[None]:
        """While the context lasts parameters are what is learnt so far, which an optimiser may say
        is an average of where they were.
        """
        with averaged(self.optimizer):
            yield

    def step(self, number: int) -> None:
        """Step `number`, from 0 on: one update by the gradients that the parameters have."""
        set_rates(self.optimizer, self._config, number)
        words_first(number, self._config, self._after_words)
        if self._config.max_gradient_norm:
            nn.utils.clip_grad_norm_(self.parameters, self._config.max_gradient_norm)
        self.optimizer.step()

    def drift(self) -> dict[str, float]:
        """How far each word that learns has moved; empty where none does."""
        return dict(drift(self._words, self._began)) if self._learning_words else {}

    def concept(self, losses: Sequence[float]) -> Concept:
        """What is learnt after these steps, with all that the run went on from."""
        earlier = self._earlier
        concepts = self._training_concepts
        goes_on = bool(earlier.tokens or earlier.deltas)
        taught = {concept.token: self._token(concept) for concept in concepts if concept.token}
        prompts = [
            prompt
            for concept in concepts
            for prompt in (subject(concept.token, concept.class_noun), concept.prompt)
        ]
        return Concept(
            family=self._family,
            deltas={**self.projections.deltas(), **self._network.deltas()},
            tokens=tuple(({token.name: token for token in earlier.tokens} | taught).values()),
            base_hash=self._base_hash,
            constraint_prompts=tuple(dict.fromkeys([*earlier.constraint_prompts, *prompts])),
            provenance={
                **({"went_on_from": earlier.describe()} if goes_on else {}),
                "method": self._config.method,
                "steps": len(losses),
                "final_losses": list(losses[-_FINAL_LOSSES:]),
                "instance_images": sum(
                    len(concept.images) - self._config.validation_pictures for concept in concepts
                ),
                "regularization_images": sum(
                    len(concept.regularization)
                    for concept in concepts
                    if self._scope == "every word" or not concept.token
                ),
                "config": self._config.as_json(),
                TEXT_MARK: self._text_mark,
            },
            scope=self._scope,
        )

    def checkpoint(
        self, losses: Sequence[float], validation: Mapping[int, float], best: tuple[Tensor, ...]
    ) -> CheckpointDue:
        """What a run goes on from, and the concept until then, where it is one."""
        whole = self._method.whole_network
        with self.as_learnt():
            concept = None if whole else self.concept(losses)
        return CheckpointDue(Checkpoint.of(self.optimizer, losses, validation, best), concept)

    def _token(self, concept: TrainingConcept) -> ModifierToken:
        return ModifierToken(
            name=concept.token,
            class_noun=concept.class_noun,
            initializer=concept.initializer,
            embeddings={n: rows[concept.token].detach().cpu() for n, rows in self._words.items()},
        )
