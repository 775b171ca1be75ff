"""How few directions a concept changes: singular values added up, as in the paper's Fig. 12."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean

import torch
from PIL import Image
from torch import Tensor

from ..concept.concept import Concept
from ..pictures.plot import COLOURS, Axis, Series, line_plot
from .spectrum import spectra

_KINDS = {"to_k": "keys", "to_v": "values", "to_q": "queries", "to_out.0": "outputs"}


def spectrum_plot(
    concept: Concept,
    values: Mapping[str, Tensor] | None = None,
    ranks: Mapping[str, int] | None = None,
    *,
    dark: bool = False,
) -> Image.Image:
    """Share of the sum of singular values against rank; layers of one kind and width are one line,
    their mean.

    `values` are the singular values by layer where they are known already; `ranks` puts a dot
    where each line was cut, at the mean of its layers. Raises ValueError for a concept that
    changes no projection.
    """
    values = spectra(concept) if values is None else values
    groups: dict[tuple[str, int], list[str]] = {}
    for layer, own in values.items():
        kind = next(name for end, name in _KINDS.items() if layer.endswith(end))
        if len(own):
            groups.setdefault((kind, concept.deltas[layer].shape[0]), []).append(layer)
    widths = sorted({width for _, width in groups})
    kinds = [kind for kind in _KINDS.values() if any(kind == group for group, _ in groups)]
    lines = []
    for kind, width in sorted(groups, key=lambda group: (kinds.index(group[0]), group[1])):
        layers = groups[kind, width]
        shares = _mean_shares([values[layer] for layer in layers])
        cut = round(mean(ranks.get(layer, 0) for layer in layers)) if ranks else 0
        points = [(rank, share) for rank, share in enumerate(shares, 1)]
        lines.append(
            Series(
                f"{kind}, {width} wide",
                points,
                COLOURS[widths.index(width) % len(COLOURS)],
                dashed=kind in ("values", "outputs"),
                marks=[(cut, shares[cut - 1])] if cut else [],
            )
        )
    return line_plot(
        "What the first singular values hold" + ("; dots: kept" if ranks else ""),
        Axis("rank", low=1, log=True),
        Axis("share of their sum", low=0, high=1, percent=True),
        lines,
        dark=dark,
    )


def _mean_shares(values: list[Tensor]) -> list[float]:
    """Mean of running shares; a spectrum that ends sooner than others is all there from then on."""
    longest = max(len(own) for own in values)
    shares = torch.ones(len(values), longest, dtype=torch.float64)
    for row, own in zip(shares, values, strict=True):
        row[: len(own)] = own.cumsum(0) / own.sum()
    means: list[float] = shares.mean(0).tolist()
    return means
