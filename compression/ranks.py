"""Making concepts small: the best low-rank form of every layer, and which rank each gets."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..concept.concept import Concept
from ..concept.delta import Delta, DenseDelta, LowRankDelta
from ..concept.errors import ConfigError
from ..concept.file import concept_tensors
from .spectrum import Components, components

BYTES_A_NUMBER = 2
"""Concept files are written in half precision."""
_ENTRY_BYTES = 80
"""What the header of a file says of a tensor beside its name: type, shape, place."""
_HEADER_BYTES = 2000
"""The rest of the header, but for what the concept itself says: format, dates, title."""
_RECORD_BYTES = 200
"""What compression adds to the provenance."""


@dataclass(frozen=True)
class LayerCut:
    """What became of one layer."""

    layer: str
    rank: int
    """Components kept; 0: the layer is left out"""
    components: int
    """How many there were"""
    whole: bool
    """Kept as it was, because that is smaller than its factors or all that there is"""
    error: float
    """‖ΔW − approximation‖ over ‖ΔW‖"""

    def text(self) -> str:
        kept = "whole" if self.whole else f"rank {self.rank}" if self.rank else "left out"
        return f"{self.layer}: {kept} of {self.components}, error {self.error:.1%}"


@dataclass(frozen=True)
class CompressionReport:
    """Figures of one compression."""

    layers: tuple[LayerCut, ...]
    energy_kept: float
    """Share of ‖ΔW‖² over all layers"""
    bytes_before: int
    bytes_after: int
    """Of the files in half precision"""
    spectra: Mapping[str, Tensor]
    """Singular values of every layer before"""

    def ranks(self) -> dict[str, int]:
        return {cut.layer: cut.rank for cut in self.layers}

    def summary(self) -> tuple[str, str]:
        """How small it is and how much is left; which ranks that takes."""
        cut = [layer.rank for layer in self.layers if layer.rank and not layer.whole]
        ranks = f"ranks {min(cut)} to {max(cut)}, median {median(cut):g}" if cut else "no layer cut"
        whole = sum(layer.whole for layer in self.layers)
        gone = sum(not layer.rank for layer in self.layers)
        return (
            f"{self.bytes_before / 1e6:.2f} MB became {self.bytes_after / 1e6:.2f} MB, "
            f"{self.bytes_before / self.bytes_after:.1f} times smaller; "
            f"{self.energy_kept:.2%} of the energy kept",
            f"{ranks}; {whole} of {len(self.layers)} layers kept whole, {gone} left out",
        )

    def lines(self) -> Iterator[str]:
        yield from self.summary()
        yield from (cut.text() for cut in self.layers)

    def text(self) -> str:
        return "\n".join(self.lines())


def compress(
    concept: Concept,
    *,
    rank: int | None = None,
    nuclear_share: float | None = None,
    energy_share: float | None = None,
    megabytes: float | None = None,
) -> tuple[Concept, CompressionReport]:
    """The concept with every layer replaced by its nearest matrix of low rank.

    Exactly one target says how low:

    - `rank`: the same for every layer.
    - `nuclear_share`: in each layer the leading components whose singular values sum to at most
      this share of all, but one at least (the paper's rule, with 0.6).
    - `energy_share`: the smallest file that keeps this share of ‖ΔW‖² over all layers.
    - `megabytes`: what keeps the most of ‖ΔW‖² in a file of at most this size (10^6 bytes, half
      precision, all included).

    The last two weigh all layers against each other; a layer of which nothing is worth its place
    is left out. A layer stays whole where its factors would be as large. Tokens stay as they are.

    Raises ConfigError; the input is never changed.
    """
    target = _target(
        rank=rank, nuclear_share=nuclear_share, energy_share=energy_share, megabytes=megabytes
    )
    parts = {layer: components(concept.deltas[layer]) for layer in concept.layers}
    if not any(len(part.values) for part in parts.values()):
        raise ConfigError(
            f"The concept {concept.describe()} changes no projection, so there is nothing to "
            "compress. Save it as it is: a word by itself takes a few kilobytes."
        )
    choices = [_Choices.of(part) for part in parts.values()]
    if rank is not None:
        taken = [min(rank, choice.last) for choice in choices]
    elif nuclear_share is not None:
        taken = [
            min(_nuclear_rank(part.values, nuclear_share), choice.last)
            for part, choice in zip(parts.values(), choices, strict=True)
        ]
    elif energy_share is not None:
        taken = _smallest(choices, energy_share)
    else:
        taken = _within(choices, _budget(concept, choices, target["megabytes"]))
    return _cut(concept, parts, choices, taken, target)


@dataclass(frozen=True)
class _Choices:
    """What a layer can become: entry k keeps its k largest components as factors, and the last
    entry all of it in its smallest form.
    """

    numbers: Sequence[int]
    """How many numbers are stored, rising"""
    lost: Sequence[float]
    """How much of ‖ΔW‖² is not, falling"""
    whole: bool
    """Whether the last entry is the layer as it was, or its dense form"""

    @staticmethod
    def of(parts: Components) -> _Choices:
        out, width = parts.delta.shape
        whole = min(parts.delta.numbers, out * width)
        smaller = min(len(parts.values), (whole - 1) // (out + width))
        energies = parts.values.square().flip(0).cumsum(0).flip(0).tolist()
        lost = [*energies, 0.0][: smaller + 1]
        numbers = [k * (out + width) for k in range(smaller + 1)]
        if smaller == len(parts.values):
            return _Choices(numbers, lost, whole=False)
        return _Choices([*numbers, whole], [*lost, 0.0], whole=True)

    @property
    def last(self) -> int:
        return len(self.numbers) - 1

    def added(self, start: int, end: int) -> int:
        """Numbers that are stored more, going from one choice to a larger one."""
        return self.numbers[end] - self.numbers[start]

    def gain(self, start: int, end: int) -> float:
        """Energy kept for each of them."""
        return (self.lost[start] - self.lost[end]) / self.added(start, end)

    def steps(self) -> Iterator[tuple[float, int]]:
        """Gains and ends of the steps worth taking: those of the concave hull, so that gains fall.

        Components alone do that by themselves; the step to the whole layer can be worth more than
        some components before it, and is then taken instead of them.
        """
        hull = [0]
        for choice in range(1, len(self.numbers)):
            while len(hull) > 1 and self.gain(hull[-2], hull[-1]) < self.gain(hull[-1], choice):
                hull.pop()
            hull.append(choice)
        return ((self.gain(a, b), b) for a, b in zip(hull, hull[1:], strict=False))


def _target(**targets: float | None) -> dict[str, float]:
    """The one that was given, checked."""
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise ConfigError(
            f"Exactly one of {', '.join(targets)} says how far to compress; "
            f"{' and '.join(given) or 'none'} was given."
        )
    ((name, value),) = given.items()
    if name == "rank" and (value != int(value) or value < 1):
        raise ConfigError(f"The rank is {value}; a whole number from 1 on is needed.")
    if name.endswith("share") and not 0 < value <= 1:
        raise ConfigError(
            f"The {name.replace('_', ' ')} is {value}; give a share above 0 and at most 1."
        )
    if name == "megabytes" and not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"The size is {value} MB; give one above 0.")
    return given


def _nuclear_rank(values: Tensor, share: float) -> int:
    """Components before the running sum of singular values exceeds the share."""
    if not len(values):
        return 0
    sums = values.cumsum(0)
    return max(1, int((sums <= share * sums[-1]).sum()))


def _by_gain(choices: Sequence[_Choices]) -> list[tuple[int, int]]:
    """All layers' steps (layer, choice), best first; a layer's own stay in order.

    Taking them in turn is optimal: after each, no other set of choices of at most that size keeps
    more. Between two, what is lost to the optimum is less than the next step would add.
    """
    steps = (
        (gain, index, end) for index, layer in enumerate(choices) for gain, end in layer.steps()
    )
    return [(index, end) for _, index, end in sorted(steps, key=lambda step: -step[0])]


def _within(choices: Sequence[_Choices], budget: int) -> list[int]:
    """The choice of each layer that keeps the most in at most `budget` numbers."""
    taken, free = [0] * len(choices), budget
    for index, end in _by_gain(choices):
        more = choices[index].added(taken[index], end)
        if more > free:
            break
        taken[index], free = end, free - more
    # What is free then is too little for the best step: it is filled component by component.
    components = (
        (layer.gain(end - 1, end), index, end)
        for index, layer in enumerate(choices)
        for end in range(taken[index] + 1, layer.last + (not layer.whole))
    )
    for _, index, end in sorted(components, key=lambda step: -step[0]):
        more = choices[index].added(taken[index], end)
        if more <= free:
            taken[index], free = end, free - more
    return taken


def _smallest(choices: Sequence[_Choices], share: float) -> list[int]:
    """The choice of each layer that keeps `share` of all energy in the fewest numbers."""
    taken = [0] * len(choices)
    missing = sum(layer.lost[0] for layer in choices)
    allowed = (1 - share) * missing
    for index, end in _by_gain(choices):
        if missing <= allowed:
            break
        lost = choices[index].lost
        now = lost[taken[index]]
        # Of the last step, as much as is needed.
        enough = bisect_left(lost, missing - now - allowed, key=lambda value: -value)
        taken[index] = min(end, enough)
        missing += lost[taken[index]] - now
    return taken


def _budget(concept: Concept, choices: Sequence[_Choices], megabytes: float) -> int:
    """How many numbers of projections fit into a file of this size."""
    factors = LowRankDelta(torch.empty(1, 1), torch.empty(1, 1))
    empty = replace(concept, deltas={layer: factors for layer in concept.deltas})
    placeholders = 2 * len(concept.deltas)
    bare = _file_bytes(empty) + _RECORD_BYTES - BYTES_A_NUMBER * placeholders
    budget = (int(megabytes * 1e6) - bare) // BYTES_A_NUMBER
    least = min(layer.numbers[1] for layer in choices if layer.last)
    if budget < least:
        smallest = math.ceil((bare + BYTES_A_NUMBER * least) / 1e3) / 1e3
        raise ConfigError(
            f"{megabytes:g} MB are too few for {concept.describe()}: its words and names take "
            f"{bare / 1e6:.3f} MB, and at least one component of one layer must fit beside them. "
            f"Give {smallest:.3f} MB or more."
        )
    return budget


def _cut(
    concept: Concept,
    parts: Mapping[str, Components],
    choices: Sequence[_Choices],
    taken: Sequence[int],
    target: Mapping[str, float],
) -> tuple[Concept, CompressionReport]:
    deltas: dict[str, Delta] = {}
    cuts = []
    for (layer, part), choice, index in zip(parts.items(), choices, taken, strict=True):
        whole = choice.whole and index == choice.last
        if whole:
            deltas[layer] = _smaller_form(part.delta)
        elif index:
            deltas[layer] = part.leading(index)
        total = choice.lost[0]
        cuts.append(
            LayerCut(
                layer=layer,
                rank=len(part.values) if whole else index,
                components=len(part.values),
                whole=whole,
                error=math.sqrt(choice.lost[index] / total) if total else 0.0,
            )
        )
    lost = sum(choice.lost[index] for choice, index in zip(choices, taken, strict=True))
    energy_kept = 1 - lost / sum(choice.lost[0] for choice in choices)
    record = {**target, "energy_kept": round(energy_kept, 6)}
    before: Sequence[Any] = concept.provenance.get("compressed", ())
    compressed = replace(
        concept,
        deltas=deltas,
        provenance={**concept.provenance, "compressed": [*before, record]},
    )
    report = CompressionReport(
        layers=tuple(cuts),
        energy_kept=energy_kept,
        bytes_before=_file_bytes(concept),
        bytes_after=_file_bytes(compressed),
        spectra={layer: part.values for layer, part in parts.items()},
    )
    return compressed, report


def _smaller_form(delta: Delta) -> Delta:
    out, width = delta.shape
    return DenseDelta(delta.dense()) if delta.numbers > out * width else delta


def _file_bytes(concept: Concept) -> int:
    """At most so large is the concept's file in half precision; some kilobytes less, as a rule."""
    tensors = concept_tensors(concept)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    alphas = sum(not tensor.ndim for tensor in tensors.values())
    entries = sum(len(name.encode()) + _ENTRY_BYTES for name in tensors)
    words = [[token.name, token.class_noun, token.initializer] for token in concept.tokens]
    said = json.dumps([json.dumps(dict(concept.provenance)), concept.constraint_prompts, words * 2])
    return (
        BYTES_A_NUMBER * (numbers + alphas)  # an alpha has four bytes
        + entries
        + len(said)
        + _HEADER_BYTES
    )
