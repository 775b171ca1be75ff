"""Isolation: each subject is denoised by itself, and the clean pictures are joined.

    x̂ = Σ_r s_r x̂_r + (1 - Σ_r s_r) x̂_whole

x̂_r is what the network takes for the clean picture when it is told subject r's prompt, with its own
concept alone at its words (`routing.py`), and s_r how much of a place is the subject's. No layer of
the network, self-attention included, reads two concepts at once, which is what subjects that look
alike need. N subjects cost N + 1 evaluations in place of one (in the spirit of Isolated Diffusion,
arXiv 2403.16954, and TweedieMix, Kwon et al., ICLR 2025).

What a network predicts at one noisy picture, be it noise, velocity or the clean picture, depends
linearly on the others, so any of them may be joined like this.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ISOLATED_FROM = 0.2
"""The part of the sampling from which subjects are apart, as in TweedieMix; not tuned."""


def joined(whole: Tensor, subjects: Sequence[Tensor], shares: Tensor) -> Tensor:
    """Predictions (b, c, h, w) of the whole picture and of each of r subjects as one.

    `shares` (b or 1, r, h, w) say whose each place is; what they leave is the whole picture's.
    """
    shares = shares.to(whole)[:, :, None]
    return whole + (shares * (torch.stack(list(subjects), 1) - whole[:, None])).sum(1)
