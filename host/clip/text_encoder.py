"""CLIP text models as the pack sees them: a `transformers` model that can learn new words.

Both hosts use it. ComfyUI's own text model cannot be differentiated (it adds in place), so its
weights are copied into one of these; diffusers' text encoder is one already.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...concept.errors import TokenError
from ...concept.prompts import split_at_tokens
from ...concept.text import TextFeatures


class ClipTextEncoder:
    """One CLIP text model with its tokenizer; fulfils `concept.text.TextEncoder`.

    Args:
        name: how embedding files call this encoder: `clip_l`, `clip_h` or `clip_g`.
        model: a `transformers.CLIPTextModel`, or a `CLIPTextModelWithProjection`, which has a
            pooled feature as well; only borrowed while it encodes.
        tokenizer: a `transformers.CLIPTokenizer`, called with text.
        pad_id: id after the end of text: the end token itself (SD 1.x) or 0 (SD 2.x).
        hidden_layer: None for the last layer; -2 for the last but one, and so on ("clip skip").
        normed: whether the final norm is applied to a hidden layer; not so in SDXL.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        *,
        pad_id: int,
        hidden_layer: int | None = None,
        normed: bool = True,
        embeddings: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.name = name
        self.context_width = int(model.config.hidden_size)
        self.context_length = int(model.config.max_position_embeddings)
        self._model, self._tokenizer = model, tokenizer
        self._pad_id, self._hidden_layer, self._normed = pad_id, hidden_layer, normed
        self._embeddings = dict(embeddings or {})
        self._word_ids: dict[str, list[int]] = {}
        next_id = self._vocabulary.num_embeddings
        for token, rows in self._embeddings.items():
            self._word_ids[token] = list(range(next_id, next_id + len(rows)))
            next_id += len(rows)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Moves the text model to the device that trains.

        With a `dtype` its products compute in that from then on, and their weights stay so: half
        the memory in half precision. Words, norms, and what runs from layer to layer stay float32.
        """
        for module in self._model.modules():
            if isinstance(module, nn.Linear) and dtype not in (None, module.weight.dtype):
                module.to(dtype).register_forward_pre_hook(_in_type_of_weight)
        self._model.to(device)

    @property
    def tokens(self) -> dict[str, int]:
        """The new words it knows, in order, with how many vectors each has."""
        return {token: len(ids) for token, ids in self._word_ids.items()}

    def tokenize(self, prompt: str) -> list[int]:
        start, end = self._tokenizer("")["input_ids"]
        return [start, *self.tokenize_words(prompt)[: self.context_length - 2], end]

    def tokenize_words(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in split_at_tokens(text, self._word_ids):
            known = self._word_ids.get(piece)
            if known is None:  # a long one is divided later: no warning
                known = self._tokenizer(piece, verbose=False)["input_ids"][1:-1]
            ids += known
        return ids

    def pad(self, token_ids: Sequence[Sequence[int]]) -> Tensor:
        length = self.context_length
        return torch.tensor([[*ids, *[self._pad_id] * (length - len(ids))] for ids in token_ids])

    def encode(self, token_ids: Tensor) -> Tensor:
        return self.encode_with_pooled(token_ids).context

    def encode_with_pooled(self, token_ids: Tensor) -> TextFeatures:
        model, vocabulary = self._model, self._vocabulary
        model.set_input_embeddings(_ExtendedEmbedding(vocabulary, list(self._embeddings.values())))
        try:
            output = model(
                token_ids.to(vocabulary.weight.device),
                output_hidden_states=self._hidden_layer is not None,
            )
        finally:
            model.set_input_embeddings(vocabulary)
        context = output.last_hidden_state
        if self._hidden_layer is not None:
            context = output.hidden_states[self._hidden_layer]
            if self._normed:
                context = text_transformer(model).final_layer_norm(context)
        pooled = self._pooled(token_ids, output.last_hidden_state)
        return TextFeatures(context.float(), pooled)

    def _pooled(self, token_ids: Tensor, last: Tensor) -> Tensor | None:
        """The end of text after the last layer and its norm, projected: (b, w)."""
        projection = getattr(self._model, "text_projection", None)
        if projection is None:
            return None
        # The first end of text: padding may look the same, and new words have higher ids.
        _, end = self._tokenizer("")["input_ids"]
        position = (token_ids.to(last.device) == end).int().argmax(-1)
        rows = last[torch.arange(len(last), device=last.device), position]
        return projection(rows).float()  # type: ignore[no-any-return]

    def with_tokens(self, embeddings: Mapping[str, Mapping[str, Tensor]]) -> ClipTextEncoder:
        new = embeddings.get(self.name, {})
        for token in new:
            if token in self._embeddings:
                raise TokenError(
                    f"This CLIP already knows the trigger word {token}; it came with another "
                    f"concept. Choose another token, or connect the CLIP of the base model."
                )
        return ClipTextEncoder(
            self.name,
            self._model,
            self._tokenizer,
            pad_id=self._pad_id,
            hidden_layer=self._hidden_layer,
            normed=self._normed,
            embeddings={**self._embeddings, **new},
        )

    def piece_id(self, piece: str) -> int:
        return int(self._tokenizer.convert_tokens_to_ids(piece))

    def vocabulary_row(self, token_id: int) -> dict[str, Tensor]:
        return {
            self.name: self._vocabulary.weight[token_id : token_id + 1].detach().float().clone()
        }

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        settings = (self.name, self._pad_id, self._hidden_layer, self._normed, self._word_ids)
        digest.update(repr(settings).encode())
        weights = text_transformer(self._model).state_dict()
        for tensor in [*weights.values(), *self._embeddings.values()]:
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @property
    def _vocabulary(self) -> nn.Embedding:
        return self._model.get_input_embeddings()  # type: ignore[no-any-return]


def text_transformer(model: Any) -> Any:
    """The module with embeddings, layers and final norm; in older releases one level down."""
    return getattr(model, "text_model", model)


def _in_type_of_weight(layer: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    return inputs[0].to(layer.weight.dtype)


class _ExtendedEmbedding(nn.Module):
    """A frozen vocabulary followed by rows of our own: only those can receive a gradient."""

    def __init__(self, vocabulary: nn.Embedding, rows: Sequence[Tensor]) -> None:
        super().__init__()
        self._vocabulary, self._rows = [vocabulary], list(rows)  # lists: neither becomes ours

    def forward(self, token_ids: Tensor) -> Tensor:
        vocabulary = self._vocabulary[0]
        known = F.embedding(token_ids.clamp_max(vocabulary.num_embeddings - 1), vocabulary.weight)
        if not self._rows:
            return known
        weight = torch.cat([rows.to(known) for rows in self._rows])
        new = F.embedding((token_ids - vocabulary.num_embeddings).clamp_min(0), weight)
        return torch.where((token_ids < vocabulary.num_embeddings)[..., None], known, new)
