"""Concept files that the version before has written open as they did. (Its job: test_job_files.py;
its graphs: the example workflows.)
"""

from __future__ import annotations

from pathlib import Path

import pytest
from custom_diffusion.concept.file import concept_tensors, read_concept
from custom_diffusion.inspection.any_card import read_any_card

FILES = Path(__file__).resolve().parents[1] / "support" / "old_concepts"
LAYER = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2."


@pytest.mark.parametrize(
    ("name", "family", "sums"),
    [
        (
            "sd15_dense",
            "sd15",
            {
                f"{LAYER}to_k.diff": -3.940676,
                "bundle_emb.<new1>.string_to_param.*": -3.72567,
            },
        ),
        (
            "sdxl_low_rank",
            "sdxl",
            {
                f"{LAYER}to_k.lora_down.weight": -38.617713,
                f"{LAYER}to_k.lora_up.weight": 0.19002,
                f"{LAYER}to_k.alpha": 2.0,
                "bundle_emb.<new1>.clip_l": 17.978886,
                "bundle_emb.<new1>.clip_g": -4.15391,
            },
        ),
    ],
)
def test_concepts_of_the_version_before_open_as_they_did(
    name: str, family: str, sums: dict[str, float]
) -> None:
    path = FILES / f"{name}.safetensors"
    concept = read_concept(path)
    tensors = concept_tensors(concept)
    for key, total in sums.items():  # as that version had them in memory, in half precision
        assert float(tensors[key].double().sum()) == pytest.approx(total, abs=1e-5)
    assert concept.family.name == family and concept.tokens[0].name == "<new1>"
    card = read_any_card(path)
    assert (card.base, card.prompts, card.other) == (family, ("<new1> cat",), "")


def test_what_they_say_of_themselves_is_kept() -> None:
    concept = read_concept(FILES / "sd15_dense.safetensors")
    assert concept.base_hash == "0123"
    assert concept.constraint_prompts == ("a <new1> cat",)
