"""Keys that are locked to the class noun's, against constrained least squares row by row."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from custom_diffusion.concept.errors import IncompatibleModelError, MergeError
from custom_diffusion.merge.key_lock import lock_keys
from support.concepts import KEY, LAYERS, base_weights, random_concept, solve_by_multipliers
from support.merging import CAPTIONS, RIDGE, WIDTH, caption_rows, change_of, distance, knowing
from support.text import RecurrentTextEncoder

WEIGHTS = base_weights(WIDTH)
CAT = random_concept("<new1>", "cat", seed=1)


def locked(concept: object = CAT, weights: object = WEIGHTS, encoder: object = None) -> object:
    return lock_keys(
        concept,  # type: ignore[arg-type]
        weights,  # type: ignore[arg-type]
        encoder or RecurrentTextEncoder(WIDTH),  # type: ignore[arg-type]
        captions=CAPTIONS,
        relative_ridge=RIDGE,
    )


def rows(prompt: str) -> np.ndarray:
    encoder = knowing([CAT])
    return encoder.encode(torch.tensor([encoder.tokenize(prompt)]))[0].double().numpy()


def test_keys_of_the_words_are_the_class_nouns_and_values_stay() -> None:
    made, report = locked()  # type: ignore[misc]
    assert not report.damped and report.missed < 1e-4
    own, wanted = [], []
    for prompt, start in (("<new1> cat", 1), ("photo of a <new1> cat", 4)):
        bare = rows(prompt.replace("<new1> ", ""))
        own.append(rows(prompt)[start:])  # <new1>, cat, end of text
        wanted.append(bare[[start, start, start + 1]])  # cat, cat, end of text
    c, targets = np.concatenate(own), np.concatenate(wanted)
    w = WEIGHTS[KEY].double().numpy()
    still = np.concatenate([wanted[0][1:], wanted[1][1:], rows("")])
    every = np.concatenate([c, still])
    upper = np.linalg.qr(caption_rows().numpy(), mode="r")
    solved = solve_by_multipliers(w, upper, every, np.concatenate([targets, still]) @ w.T)
    change = change_of(made, KEY)
    assert np.abs(c @ (w + change.numpy()).T - targets @ w.T).max() < 1e-3
    assert distance(change, torch.from_numpy(solved - w)) < 1e-3
    assert all(made.deltas[layer] is CAT.deltas[layer] for layer in LAYERS if layer != KEY)
    assert made.tokens == CAT.tokens and made.provenance["keys"] == "locked"


def test_locked_twice_is_locked_once() -> None:
    once, _ = locked()  # type: ignore[misc]
    twice, _ = locked(once)  # type: ignore[misc]
    assert torch.equal(change_of(once, KEY), change_of(twice, KEY))


def test_a_concept_at_its_own_words_keeps_the_end_of_text() -> None:
    spliced, _ = locked(replace(CAT, scope="own words"))  # type: ignore[misc]
    end = rows("<new1> cat")[1:3] @ change_of(spliced, KEY).numpy().T
    base = (rows("cat")[[1, 1]] - rows("<new1> cat")[1:3]) @ WEIGHTS[KEY].double().numpy().T
    assert np.abs(end - base).max() < 1e-3


@pytest.mark.parametrize(
    ("concept", "message"),
    [
        (random_concept(None, constraint_prompts=("cat",)), "has no trigger word"),
        (random_concept("<new1>", ""), "no class noun for <new1>"),
    ],
)
def test_what_has_no_class_noun_is_refused(concept: object, message: str) -> None:
    with pytest.raises(MergeError, match=message):
        locked(concept)


def test_models_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(IncompatibleModelError, match="does not fit"):
        locked(weights=base_weights(96))
    with pytest.raises(IncompatibleModelError, match="width 96"):
        locked(encoder=RecurrentTextEncoder(96))
