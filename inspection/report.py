"""What a concept is, in full: what it teaches and changes, how much of that a compression may cut,
where it came from, and whether it fits a model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median_low
from typing import Any

from torch import Tensor

from ..compression.spectrum import spectra
from ..concept.concept import Concept, ModifierToken
from ..concept.delta import Delta
from ..concept.fit import Fit
from ..concept.plain import plain_text

SHARES = (0.6, 0.9)
"""Of the sum of a layer's singular values, which the paper cuts at 60 % (Fig. 12)."""
_FP16_BYTES = 2
_MOST_NUMBERS = 4  # in a line


@dataclass(frozen=True)
class TokenRow:
    """A modifier token in figures."""

    name: str
    class_noun: str
    initializer: str
    vectors: int
    norms: Mapping[str, tuple[float, ...]]
    """Text encoder → the Euclidean norm of each vector"""


@dataclass(frozen=True)
class LayerRow:
    """What a concept changes in one layer, in figures."""

    layer: str
    shape: tuple[int, int]
    """(out, in)"""
    rank: int | None
    """Of the factors; None where the change is stored as a whole matrix"""
    numbers: int
    """That are stored"""
    norm: float
    """Frobenius norm of the change"""
    components: tuple[int, ...]
    """How many singular values, largest first, reach each of `SHARES` of their sum"""

    @property
    def megabytes(self) -> float:
        """In half precision."""
        return _FP16_BYTES * self.numbers / 1e6

    @property
    def stored(self) -> str:
        return "dense" if self.rank is None else f"rank {self.rank}"


@dataclass(frozen=True)
class Inspection:
    """All that can be said of a concept without drawing with it."""

    description: str
    family: str
    title: str
    """Of the family, as people say it"""
    base_hash: str
    tokens: tuple[TokenRow, ...]
    layers: tuple[LayerRow, ...]
    constraint_prompts: tuple[str, ...]
    provenance: Mapping[str, Any]
    fit: Fit | None = None
    """None where no model was asked about"""
    file: str = ""
    file_megabytes: float | None = None
    created: str = ""

    @property
    def numbers(self) -> int:
        """That are stored for all layers."""
        return sum(row.numbers for row in self.layers)

    @property
    def norm(self) -> float:
        """Frobenius norm of the change of all layers together."""
        return _together(self.layers)

    def lines(self) -> Iterator[str]:
        """A fact each; of the layers only what they are together."""
        if self.file:
            saved = f", saved {self.created}" if self.created else ""
            yield f"{self.file}: {self.file_megabytes:.2f} MB{saved}"
        yield f"base model: {self.title}, base hash {self.base_hash[:8] or 'unknown'}"
        yield from map(_token_line, self.tokens)
        yield self._changes()
        if self.layers:
            yield self._spectrum()
        kept = ", ".join(self.constraint_prompts)
        yield f"kept by a merge: {kept or ('its tokens' if self.tokens else 'nothing')}"
        for name, value in self.provenance.items():
            yield f"{name.replace('_', ' ')}: {_plain(value)}"
        if self.fit is not None:
            yield "fits the model: " + ("no" if self.fit.misfits else "yes")

    def warnings(self) -> list[str]:
        """What keeps the concept from the model that was asked about, or from its best there."""
        if self.fit is None:
            return []
        why = [f"it does not fit: {misfit}" for misfit in self.fit.misfits]
        return [*why, *([f"remark: {self.fit.remark}"] if self.fit.remark else [])]

    def table(self) -> list[tuple[str, ...]]:
        """A row for all layers of one size, below a head; of their components the median."""
        alike: dict[tuple[str, str], list[LayerRow]] = {}
        for row in self.layers:
            alike.setdefault((_size(row), row.stored), []).append(row)
        table = [("out x in", "stored as", "layers", "norm", *map(_percent, SHARES))]
        for same, rows in alike.items():
            count, norm = str(len(rows)), f"{_together(rows):.3g}"
            table.append((*same, count, norm, *map(str, _medians(rows))))
        return table if alike else []

    def layer_table(self) -> list[tuple[str, ...]]:
        """A row for each layer, below a head."""
        table = [("layer", "out x in", "stored as", "MB", "norm", *map(_percent, SHARES))]
        for row in self.layers:
            size, norm = f"{row.megabytes:.2f}", f"{row.norm:.3g}"
            components = map(str, row.components)
            table.append((row.layer, _size(row), row.stored, size, norm, *components))
        return table if self.layers else []

    def text(self, layers: bool = False) -> str:
        """To be read in a terminal, with a line for each layer or for each size of them."""
        table = self.layer_table() if layers else self.table()
        text = "\n".join([*self.lines(), *self.warnings(), *aligned(table)])
        return plain_text(text, len(text))  # names and provenance may be a stranger's

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values, with null for numbers that are not finite."""
        totals = {"numbers": self.numbers, "megabytes": _FP16_BYTES * self.numbers / 1e6}
        layers = [
            {**asdict(row), "megabytes": row.megabytes, "components": _by_share(row.components)}
            for row in self.layers
        ]
        told = {**asdict(self), "layers": layers, "totals": {**totals, "norm": self.norm}}
        # A file from elsewhere may hold NaN in its provenance, which browsers do not read.
        plain: dict[str, Any] = json.loads(json.dumps(told), parse_constant=lambda _: None)
        return plain

    def _changes(self) -> str:
        if not self.layers:
            return "changes no projection: it is its tokens alone"
        ranks = sorted({row.rank for row in self.layers if row.rank is not None})
        dense = ["dense"] if any(row.rank is None for row in self.layers) else []
        stored = " and ".join(dense + ([f"rank {ranks}"] if ranks else []))
        return (
            f"projections: {len(self.layers)}, {stored}; {self.numbers} numbers, "
            f"{_FP16_BYTES * self.numbers / 1e6:.2f} MB in half precision; norm {self.norm:.4g}"
        )

    def _spectrum(self) -> str:
        """Says what the columns of the tables are."""
        parts = " and ".join(map(_percent, SHARES))
        counts = " and ".join(map(str, _medians(self.layers)))
        whole = median_low(row.rank or min(row.shape) for row in self.layers)
        return (
            f"components that hold {parts} of the sum of a layer's singular values: {counts} of "
            f"{whole} in the median layer"
        )


def inspect_concept(
    concept: Concept, file: Path | None = None, *, created: str = "", fit: Fit | None = None
) -> Inspection:
    """Looks at a concept, and at the file that it was read from where there is one."""
    spectrum = spectra(concept)
    return Inspection(
        description=concept.describe(),
        family=concept.family.name,
        title=concept.family.title,
        base_hash=concept.base_hash,
        tokens=tuple(map(_token_row, concept.tokens)),
        layers=tuple(
            _layer_row(layer, concept.deltas[layer], spectrum[layer]) for layer in concept.layers
        ),
        constraint_prompts=concept.constraint_prompts,
        provenance=dict(concept.provenance),
        fit=fit,
        file=file.name if file else "",
        file_megabytes=round(file.stat().st_size / 1e6, 2) if file else None,
        created=created,
    )


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows of a table as lines with columns below one another."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]  # none without rows
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _token_row(token: ModifierToken) -> TokenRow:
    norms = {
        encoder: tuple(rows.double().norm(dim=1).tolist())
        for encoder, rows in token.embeddings.items()
    }
    vectors = max((len(rows) for rows in token.embeddings.values()), default=0)
    return TokenRow(token.name, token.class_noun, token.initializer, vectors, norms)


def _layer_row(layer: str, delta: Delta, values: Tensor) -> LayerRow:
    return LayerRow(
        layer=layer,
        shape=delta.shape,
        rank=delta.rank,
        numbers=delta.numbers,
        norm=float(values.norm()),
        components=tuple(_reaching(values, share) for share in SHARES),
    )


def _reaching(values: Tensor, share: float) -> int:
    """How many of the values, largest first, have at least this share of their sum."""
    sums = values.cumsum(0)
    return 1 + int((sums < share * sums[-1]).sum()) if sums[-1] > 0 else 0


def _token_line(token: TokenRow) -> str:
    norms = "; ".join(
        f"{encoder} {', '.join(f'{norm:.3g}' for norm in norms)}"
        for encoder, norms in token.norms.items()
    )
    count = f"{token.vectors} vector{'' if token.vectors == 1 else 's'}"
    start = token.initializer or "a rare token"
    return f"token: {token.name} {token.class_noun}".rstrip() + (
        f" (started from {start}; {count}, norm {norms})"
    )


def _together(rows: Sequence[LayerRow]) -> float:
    """Frobenius norm of the change of several layers."""
    return math.hypot(*(row.norm for row in rows))


def _medians(rows: Sequence[LayerRow]) -> list[int]:
    """For each of `SHARES`."""
    return [median_low(counts) for counts in zip(*(row.components for row in rows), strict=True)]


def _size(row: LayerRow) -> str:
    return " x ".join(map(str, row.shape))


def _percent(share: float) -> str:
    return f"{share:.0%}"


def _by_share(components: Sequence[int]) -> dict[str, int]:
    return {f"{share:g}": count for share, count in zip(SHARES, components, strict=True)}


def _plain(value: Any) -> str:
    """Values of JSON as people write them: a merge's provenance holds that of its parents."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key.replace('_', ' ')} {_plain(part)}" for key, part in value.items())
    if isinstance(value, (list, tuple)):
        if len(value) > _MOST_NUMBERS and all(isinstance(part, float) for part in value):
            return f"{_plain(fmean(value))} on average of {len(value)}"
        return "; ".join(map(_plain, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)
