"""How much each kind of layer of a UNet has changed: Custom Diffusion's Fig. 3, of any two models.

    change of a tensor = |W' - W| / |W|

Kumari et al. saw that of a UNet that was trained whole the cross-attention changes most, and so
taught that alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from PIL import Image
from torch import Tensor

from ..concept.errors import IncompatibleModelError
from ..concept.tensors import read_header, read_tensors
from ..pictures.plot import COLOURS, Axis, Series, line_plot

_KINDS = {".attn2.": "cross-attention", ".attn1.": "self-attention"}
OTHER = "the rest"
KINDS = (*_KINDS.values(), OTHER)
_IN_CHECKPOINTS = "model.diffusion_model."
Pair = tuple[str, Tensor, Tensor]
"""Name of a tensor, and what it was before and is after"""


@dataclass(frozen=True)
class TensorChange:
    """One tensor of the network."""

    name: str
    change: float
    """Frobenius norm of the difference, as a share of the norm before"""
    numbers: int

    @property
    def kind(self) -> str:
        return next((kind for part, kind in _KINDS.items() if part in self.name), OTHER)


@dataclass(frozen=True)
class WeightChanges:
    """Of all tensors that two networks share, in the order of the network."""

    changes: Sequence[TensorChange]
    alone: int
    """Tensors that only one of the two has, or in another shape"""

    @staticmethod
    def of(pairs: Iterable[Pair], alone: int = 0) -> WeightChanges:
        """Raises IncompatibleModelError where no tensor is shared."""
        changes = []
        for name, before, after in pairs:
            if before.shape != after.shape:
                alone += 2
                continue
            old, new = before.float(), after.float()
            size = float(old.norm())
            change = float((new - old).norm()) / size if size else float(new.norm() > 0)
            changes.append(TensorChange(name, change, old.numel()))
        if not changes:
            raise IncompatibleModelError(
                "The two have no tensor of a UNet in common. Compare models of one family, both as "
                "checkpoints or both as UNets of their own."
            )
        return WeightChanges(changes, alone)

    def of_kind(self, kind: str) -> list[TensorChange]:
        return [one for one in self.changes if one.kind == kind]

    def table(self) -> list[tuple[str, ...]]:
        """A row for each kind, the most changed first, below a head."""
        numbers = sum(one.numbers for one in self.changes)
        rows = []
        for kind in KINDS:
            if not (own := self.of_kind(kind)):
                continue
            share = sum(one.numbers for one in own) / numbers
            most = max(own, key=lambda one: one.change)
            rows.append(
                (mean(one.change for one in own), kind, f"{share:.1%}", most.change, most.name)
            )
        rows.sort(reverse=True)
        head = ("kind of layer", "share of the weights", "mean change", "largest", "of")
        return [head, *((k, s, f"{m:.2%}", f"{most:.2%}", name) for m, k, s, most, name in rows)]

    def summary(self) -> list[str]:
        """A verdict in plain words, and what was left out."""
        changed = [one for one in self.changes if one.change]
        if not changed:
            said = [f"The same: {len(self.changes)} tensors of both are equal."]
        else:
            most = self.table()[1]
            said = [
                f"{most[0].capitalize()} changed most, by {most[2]} on average. "
                f"{len(changed)} of {len(self.changes)} tensors changed."
            ]
        if self.alone:
            said.append(f"{self.alone} tensors are in one of the two alone and were not compared.")
        return said

    def plot(self, *, dark: bool = False) -> Image.Image:
        """Change against the place in the network, a line for each kind; without a logarithm where
        nothing changed.
        """
        lines = []
        for kind, colour in zip(KINDS, COLOURS, strict=False):
            points = [
                (100 * i / len(self.changes), one.change)
                for i, one in enumerate(self.changes)
                if one.kind == kind
            ]
            if points:
                lines.append(Series(kind, points, colour))
        changed = any(one.change for one in self.changes)
        return line_plot(
            "How much each kind of layer changed",
            Axis("place in the network, %", low=0, high=100),
            Axis("change", log=changed),
            lines,
            dark=dark,
        )


def changes_between(before: Path, after: Path) -> WeightChanges:
    """Of the UNets in two .safetensors, checkpoints or UNets alone; a block at a time is read."""
    ours, theirs = (_unet_names(path) for path in (before, after))
    shared = [name for name in ours if name in theirs]
    alone = len(ours) + len(theirs) - 2 * len(shared)
    return WeightChanges.of(_pairs(shared, _reader(before, ours), _reader(after, theirs)), alone)


def _unet_names(path: Path) -> dict[str, str]:
    """Name without the prefix of checkpoints → name in the file."""
    names = list(read_header(path).tensors)
    inside = [name for name in names if name.startswith(_IN_CHECKPOINTS)]
    return {name.removeprefix(_IN_CHECKPOINTS): name for name in inside or names}


def _reader(path: Path, names: dict[str, str]) -> Callable[[Sequence[str]], dict[str, Tensor]]:
    def read(wanted: Sequence[str]) -> dict[str, Tensor]:
        chosen = {names[name]: name for name in wanted}
        tensors, _ = read_tensors(path, chosen.__contains__)
        return {chosen[name]: tensor for name, tensor in tensors.items()}

    return read


def _pairs(
    names: Sequence[str],
    before: Callable[[Sequence[str]], dict[str, Tensor]],
    after: Callable[[Sequence[str]], dict[str, Tensor]],
) -> Iterator[Pair]:
    blocks: dict[str, list[str]] = {}
    for name in names:
        blocks.setdefault(".".join(name.split(".")[:2]), []).append(name)
    for block in blocks.values():
        old, new = before(block), after(block)
        yield from ((name, old[name], new[name]) for name in block)
