"""Shows the miniature's cross-attention which word means what in a picture, while it is young.

A noun's features tell its colour and its place in the caption (`words.py`), but from pictures alone
the UNet takes hours to find out that a noun concerns one region of the picture only. The world
knows where its objects are. So for the first part of the training the attention of an object's
pixels to its noun is rewarded; later nothing is, and the UNet attends as it likes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from .world import Placed, Scene

_INSIDE = 0.75  # of an object's radius surely belong to it


class WatchedAttention(AttnProcessor):  # type: ignore[misc]
    """diffusers' plain attention; it keeps how cross-attention shares itself out when asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.watching = False
        self.shares: list[Tensor] = []
        """(b, positions, words) of every layer since they were last taken, means over heads"""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        if encoder_hidden_states is None or not self.watching:
            plain: Tensor = super().__call__(attn, hidden_states, encoder_hidden_states, **others)
            return plain
        query, key, value = (
            attn.head_to_batch_dim(part)
            for part in (
                attn.to_q(hidden_states),
                attn.to_k(encoder_hidden_states),
                attn.to_v(encoder_hidden_states),
            )
        )
        shares = attn.get_attention_scores(query, key)
        self.shares.append(shares.unflatten(0, (len(hidden_states), -1)).mean(1))
        output: Tensor = attn.to_out[0](attn.batch_to_head_dim(shares @ value))
        return output

    def take_shares(self) -> list[Tensor]:
        shares, self.shares = self.shares, []
        return shares


def grounding_loss(
    shares: Sequence[Tensor], scenes: Sequence[Scene], token_ids: Tensor, nouns: Tensor
) -> Tensor:
    """-log of the attention that each object's positions pay to its noun; mean over the layers.

    `shares` are (b, positions, words) of each layer, `nouns` the token ids of all shapes. Captions
    that do not name every object say nothing here.
    """
    rows: list[int] = []
    words: list[int] = []
    objects: list[Placed] = []
    for row, scene in enumerate(scenes):
        named = torch.isin(token_ids[row], nouns).nonzero().flatten().tolist()
        if len(named) == len(scene.objects):
            rows += [row] * len(named)
            words += named
            objects += scene.objects
    losses = []
    for layer in shares:
        edge = round(layer.shape[1] ** 0.5)
        points = (torch.arange(edge) + 0.5) / edge
        y, x = torch.meshgrid(points, points, indexing="ij")
        places = torch.tensor([[o.x, o.y, o.radius] for o in objects]).T[:, :, None, None]
        reach = (_INSIDE * places[2]).clamp(min=0.6 / edge)
        inside = ((x - places[0]) ** 2 + (y - places[1]) ** 2 < reach**2).flatten(1)
        losses.append(-(layer[rows, :, words][inside] + 1e-4).log().mean())
    return torch.stack(losses).mean()
