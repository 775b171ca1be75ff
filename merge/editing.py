"""Edit Concepts: what a model's own words mean, changed in closed form.

After Unified Concept Editing (Gandikota et al., WACV 2024), whose formula is Eq. 5 of Custom
Diffusion with other targets: with the rows C of the edited words, what each is to become as C + Δ,
and G of the regularization captions,

    W = W₀ + W₀ Δᵀ P,   P = (C G⁻¹ Cᵀ + ωI)⁻¹ C G⁻¹

ω = 0 meets every target (Custom Diffusion), ω > 0 is UCE's trade against what should stay. Neither
P nor Δ knows of a layer: W₀ stands before them, and is needed only for the product at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..concept.concept import Concept, hash_projections
from ..concept.delta import Delta, LowRankDelta
from ..concept.errors import IncompatibleModelError, MergeError
from ..concept.fit import TEXT_MARK, check_text_width
from ..concept.layers import family_of_width, is_projection, sort_layers
from ..concept.prompts import CONSTRAINT_TEMPLATES
from ..concept.text import TextEncoder, text_mark
from .caption_cache import cached_caption_factor
from .captions import regularization_captions
from .edit_report import EditReport, Moved, report_of
from .edit_rows import EditRows, edit_rows, split_words
from .edits import Edit, edits_of, in_one_order, restored
from .merging import DEFAULT_RELATIVE_RIDGE
from .neighbours import nearest_words, word_features
from .projector import CaptionFactor, Projector, constraint_projector

METHOD = "closed-form edit"
IDENTITY_RIDGE = 0.5
"""λ of UCE, which has no captions: G = λI"""


@torch.no_grad()
def edit_concept(
    weights: Mapping[str, Tensor],
    encoder: TextEncoder,
    edits: Sequence[Edit],
    *,
    preserved: Sequence[str] = (),
    softness: float = 0.0,
    captions: Sequence[str] | None = None,
    relative_ridge: float = DEFAULT_RELATIVE_RIDGE,
    cache_folder: Path | None = None,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> tuple[Concept, EditReport]:
    """What a model's words mean after the edits, as a concept without words of its own.

    The order of the edits and of what is preserved does not matter.

    Args:
        weights: of the base model by layer name, (out, in); those that are no key or value
            projection are passed over. They are not changed.
        preserved: words and phrases that stay exactly as they are, while softness is 0.
        softness: 0 meets the edits exactly (Eq. 5 of Custom Diffusion). Above it they give way to
            what should stay: ω over the largest of the constraints' squared singular values.
        captions: ordinary captions that should stay; ours where it is None; without any G is λI,
            as in UCE.

    Raises MergeError and IncompatibleModelError.
    """
    layers = sort_layers([layer for layer in weights if is_projection(layer)])
    _check_model({layer: weights[layer] for layer in layers}, encoder)
    if not 0 <= softness <= 1:
        raise MergeError(f"The softness is {softness:g}; 0 (exact) to 1 is needed.")
    edits, preserved = in_one_order(edits), sorted(set(preserved))
    rows = edit_rows(edits, preserved, encoder)
    captions = regularization_captions() if captions is None else list(captions)
    factor = _factor(encoder, captions, relative_ridge, cache_folder, on_progress)
    projector = constraint_projector(factor, rows.features, rows.still, softness)
    on_progress(0.9)

    taught = rows.moves[~rows.still].T @ projector.left
    watched = nearest_words(captions, encoder, edits, preserved, taught @ projector.rows)
    words = [*(edit.word for edit in edits), *preserved, *watched]
    features = word_features(words, encoder)
    deltas, moved = _deltas(weights, layers, rows, projector, features)
    on_progress(1.0)

    kept = [*(edit.word for edit in edits), *preserved]
    concept = Concept(
        family=family_of_width(encoder.context_width),
        deltas=deltas,
        base_hash=hash_projections({layer: weights[layer] for layer in layers}),
        constraint_prompts=tuple(t.format(word) for t in CONSTRAINT_TEMPLATES for word in kept),
        provenance={
            "method": METHOD,
            "edits": [edit.as_json() for edit in edits],
            "preserved": preserved,
            "softness": softness,
            TEXT_MARK: text_mark(encoder),
        },
    )
    report = report_of(
        edits,
        preserved,
        watched,
        moved,
        rows,
        split=split_words(words[: len(kept)], encoder),
        projector=projector,
        captions=len(captions),
    )
    return concept, report


def edit_again(
    earlier: Concept | None,
    weights: Mapping[str, Tensor],
    encoder: TextEncoder,
    edits: Sequence[Edit],
    *,
    restore: Mapping[str, float] | None = None,
    preserved: Sequence[str] = (),
    **more: Any,
) -> tuple[Concept, EditReport]:
    """What an earlier edit remembers and more, solved as one, as if all had been asked for at once;
    without an earlier one `edit_concept`.

    `restore` gives words of the earlier edit back, each by a strength; when nothing is left the
    result changes nothing. Raises IncompatibleModelError where it belongs to another model; for
    other arguments and errors see `edit_concept`.
    """
    if earlier is None:
        if restore:
            raise MergeError(
                f"'{next(iter(restore))}' cannot be restored: no earlier edit was given. Give the "
                "one that has edited it."
            )
        return edit_concept(weights, encoder, edits, preserved=preserved, **more)
    check_same_model(earlier, weights)
    kept = earlier.provenance.get("preserved")
    before = [str(word) for word in kept] if isinstance(kept, list) else []
    every = [*restored(edits_of(earlier.provenance), restore or {}), *edits]
    if not every:
        return _unedited(earlier), EditReport()
    return edit_concept(weights, encoder, every, preserved=[*before, *preserved], **more)


def check_same_model(earlier: Concept, weights: Mapping[str, Tensor]) -> None:
    """Raises IncompatibleModelError where an edit was made of other keys and values."""
    own = hash_projections({layer: w for layer, w in weights.items() if is_projection(layer)})
    if earlier.base_hash and earlier.base_hash != own:
        raise IncompatibleModelError(
            f"The earlier edit was made of another checkpoint, or this one has patches on it (base "
            f"hash {earlier.base_hash[:8]}, this model's is {own[:8]}). Connect the model that it "
            f"was made of."
        )


def _unedited(earlier: Concept) -> Concept:
    """What is left when every edit is restored: a concept that changes nothing."""
    return replace(
        earlier,
        deltas={
            layer: LowRankDelta(torch.zeros(delta.shape[0], 1), torch.zeros(1, delta.shape[1]))
            for layer, delta in earlier.deltas.items()
        },
        provenance={**earlier.provenance, "edits": [], "preserved": []},
    )


def _factor(
    encoder: TextEncoder,
    captions: Sequence[str],
    relative_ridge: float,
    cache_folder: Path | None,
    on_progress: Callable[[float], None],
) -> CaptionFactor:
    if captions:
        return cached_caption_factor(
            encoder, captions, relative_ridge, cache_folder, lambda part: on_progress(0.8 * part)
        )
    identity = torch.eye(encoder.context_width, dtype=torch.float64)
    return CaptionFactor(IDENTITY_RIDGE**0.5 * identity, 0)


def _check_model(weights: Mapping[str, Tensor], encoder: TextEncoder) -> None:
    if not weights:
        raise IncompatibleModelError(
            "The model given has no cross-attention with key and value projections. Load a "
            "checkpoint of SD 1.x, SD 2.x or SDXL."
        )
    check_text_width(encoder.context_width, family_of_width(next(iter(weights.values())).shape[1]))


def _deltas(
    weights: Mapping[str, Tensor],
    layers: Sequence[str],
    rows: EditRows,
    projector: Projector,
    words: Tensor,
) -> tuple[dict[str, Delta], Moved]:
    """ΔW = (W₀ Δᵀ left) rows of every layer, and how far it moves rows and words (n, d); each
    matrix of the model is read once, and none of its size is built.
    """
    taught, left = rows.moves[~rows.still].float(), projector.left.float()
    own, down = rows.features[~rows.still].float(), projector.rows.float()
    read = torch.cat([taught, words.float()]).T
    deltas: dict[str, Delta] = {}
    changed, base = torch.zeros(len(words)), torch.zeros(len(words))
    missed, asked = torch.zeros(len(taught)), torch.zeros(len(taught))
    for layer in layers:
        wanted, now = (weights[layer].to("cpu").float() @ read).split([len(taught), len(words)], 1)
        deltas[layer] = delta = LowRankDelta(wanted @ left, down)
        changed += delta.map_rows(words.float()).square().sum(1)
        base += now.square().sum(0)
        missed += (delta.map_rows(own) - wanted.T).square().sum(1)
        asked += wanted.square().sum(0)
    return deltas, Moved(
        words=(changed / base.clamp(min=1e-30)).sqrt(),
        missed=(missed / asked.clamp(min=1e-30)).sqrt(),
    )
