"""Subjects that are denoised apart, in a pipeline's UNet."""

from __future__ import annotations

from torch import Tensor

from ...composition.isolation import joined
from ...composition.regions import RegionalAttention
from ...diffusion.sampling import Predict


def isolated(predict: Predict, attention: RegionalAttention, start: float, last: int) -> Predict:
    """`predict` for batches of b pictures with their prompt and then b with the empty one, in which
    from `start` on (0 is the first step, 1 the end) the regions of each picture are apart.

    `last` is the timestep of pure noise.
    """

    def predict_apart(
        noisy: Tensor, timesteps: Tensor, context: Tensor, pooled: Tensor | None, sizes: Tensor
    ) -> Tensor:
        whole = predict(noisy, timesteps, context, pooled, sizes)
        if 1 - float(timesteps[0]) / last < start:
            return whole
        for picture, regions in enumerate(attention.sets):
            if regions.places.seeks or not regions.contexts:
                continue
            subjects = [
                _alone(predict, attention, (picture, number), noisy, timesteps, sizes)
                for number in range(len(regions.contexts))
            ]
            shares = regions.places.shares_at(*noisy.shape[-2:])
            whole[picture] = joined(whole[picture : picture + 1], subjects, shares)[0]
        return whole

    return predict_apart


def _alone(
    predict: Predict,
    attention: RegionalAttention,
    region: tuple[int, int],
    noisy: Tensor,
    timesteps: Tensor,
    sizes: Tensor,
) -> Tensor:
    """What is predicted (1, c, h, w) of a picture with a region's prompt, which is all it reads."""
    picture, number = region
    said = attention.sets[picture]
    one = slice(picture, picture + 1)
    pooled = said.pooled[number]
    chosen, index = attention.chosen, attention.router.index
    attention.chosen, attention.router.index = (), said.index[number][None]
    try:
        return predict(
            noisy[one],
            timesteps[one],
            said.contexts[number][None],
            None if pooled is None else pooled[None],
            sizes[one],
        )
    finally:
        attention.chosen, attention.router.index = chosen, index
