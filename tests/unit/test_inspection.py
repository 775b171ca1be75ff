"""What is said of a concept, held against numpy's singular values, and how it fits a model."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from custom_diffusion.cli import main
from custom_diffusion.concept.concept import Concept, ModifierToken, hash_projections
from custom_diffusion.concept.delta import DenseDelta
from custom_diffusion.concept.file import read_concept, write_concept
from custom_diffusion.concept.fit import Fit, fit_to
from custom_diffusion.concept.layers import FAMILIES
from custom_diffusion.host.diffusers.lending import borrowed_models
from custom_diffusion.inspection.report import SHARES, inspect_concept
from custom_diffusion.miniature.model import miniature_pipeline
from custom_diffusion.trainer.learning.projections import base_hash
from support.concepts import KEY, LAYERS, MIDDLE, VALUE, base_weights, random_concept
from support.made_concepts import made_concept

ROOT = Path(__file__).resolve().parents[2]
LAYER = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
SHAPES = {layer: (out, 64) for layer, out in LAYERS.items()}


class TestFigures:
    @pytest.mark.parametrize("rank", [None, 5], ids=["dense", "low rank"])
    def test_each_layer_is_as_numpy_finds_it(self, rank: int | None) -> None:
        concept = random_concept(rank=rank, seed=3)
        found = inspect_concept(concept)
        assert [row.layer for row in found.layers] == concept.layers
        total = 0.0
        for row in found.layers:
            matrix = concept.deltas[row.layer].dense().double().numpy()
            values = np.linalg.svd(matrix, compute_uv=False)
            total += float(np.square(matrix).sum())
            assert row.shape == matrix.shape
            assert row.norm == pytest.approx(np.linalg.norm(matrix), rel=1e-6)
            for share, count in zip(SHARES, row.components, strict=True):
                kept = [values[:n].sum() / values.sum() for n in (count - 1, count)]
                assert kept[0] < share <= kept[1]
        assert found.norm == pytest.approx(total**0.5, rel=1e-6)

    def test_how_it_is_stored(self) -> None:
        dense, factored = random_concept(), random_concept(rank=5)
        both = replace(dense, deltas={**dense.deltas, MIDDLE: factored.deltas[MIDDLE]})
        rows = {row.layer: row for row in inspect_concept(both).layers}
        assert (rows[KEY].rank, rows[KEY].numbers) == (None, 24 * 64)
        assert (rows[MIDDLE].rank, rows[MIDDLE].numbers) == (5, (40 + 64) * 5)
        assert "dense and rank [5]" in inspect_concept(both).text()

    def test_the_size_is_that_of_the_files_tensors(self, tmp_path: Path) -> None:
        concept = made_concept({LAYER: (320, 768)}, rank=3)
        path = write_concept(concept, tmp_path / "cat.safetensors")
        content = path.read_bytes()
        header = int.from_bytes(content[:8], "little")
        told = inspect_concept(read_concept(path), path).as_json()
        embedding, alpha = 768 * 2, 4
        stored = len(content) - 8 - header - embedding - alpha
        assert told["totals"]["megabytes"] == pytest.approx(stored / 1e6)
        assert told["layers"][0]["megabytes"] == pytest.approx(stored / 1e6)
        assert (told["file"], told["file_megabytes"]) == (path.name, round(len(content) / 1e6, 2))

    def test_a_change_of_nothing_has_no_component(self) -> None:
        concept = replace(random_concept(), deltas={KEY: DenseDelta(torch.zeros(24, 64))})
        (row,) = inspect_concept(concept).layers
        assert (row.norm, row.components) == (0.0, (0, 0))

    def test_tokens_with_several_vectors_and_encoders(self) -> None:
        rows = {"clip_l": torch.tensor([[3.0, 4.0], [0.0, 2.0]]), "clip_g": torch.ones(2, 4)}
        token = ModifierToken("<new1>", "cat", rows, initializer="ktn")
        (found,) = inspect_concept(Concept(FAMILIES["sdxl"], {}, (token,))).tokens
        assert found.vectors == 2
        assert found.norms == {"clip_l": (5.0, 2.0), "clip_g": (2.0, 2.0)}


class TestTold:
    def test_in_a_terminal(self) -> None:
        provenance = {"method": "low-rank", "steps": 250, "config": {"batch_size": 2}}
        concept = replace(
            random_concept(constraint_prompts=("<new1> cat",), base_hash="ab" * 16),
            provenance=provenance,
        )
        text = inspect_concept(concept).text()
        for told in (
            "Stable Diffusion 1.x, base hash abababab",
            "<new1> cat (started from ktn; 1 vector",
        ):
            assert told in text
        for told in ("kept by a merge: <new1> cat", "steps: 250", "config: batch size 2"):
            assert told in text
        assert KEY not in text and "fits the model" not in text

    def test_the_table_has_a_line_for_each_layer_in_columns(self) -> None:
        lines = inspect_concept(random_concept()).text(layers=True).splitlines()
        table = lines[-len(LAYERS) - 1 :]
        assert [line.split()[0] for line in table] == ["layer", *LAYERS]
        starts = {
            line.index(f"{out} x 64") for line, out in zip(table[1:], LAYERS.values(), strict=True)
        }
        assert starts == {table[0].index("out x in")}

    def test_layers_of_one_size_are_a_row_of_the_short_table(self) -> None:
        found = inspect_concept(random_concept())
        by_layer = {row.layer: row for row in found.layers}
        narrow, wide = by_layer[KEY], by_layer[MIDDLE]
        both = math.hypot(narrow.norm, by_layer[VALUE].norm)
        head, first, second = found.table()
        assert head[-2:] == ("60%", "90%")
        assert first[:4] == ("24 x 64", "dense", "2", f"{both:.3g}")
        assert second[2:] == ("1", f"{wide.norm:.3g}", *map(str, wide.components))
        assert "\n24 x 64" in found.text()

    def test_many_losses_are_told_by_their_mean(self) -> None:
        concept = replace(random_concept(), provenance={"final_losses": [0.1, 0.2, 0.3] * 4})
        assert "final losses: 0.2 on average of 12" in inspect_concept(concept).text()

    def test_without_layers_and_without_tokens(self) -> None:
        token_alone = replace(random_concept(), deltas={})
        assert "changes no projection" in inspect_concept(token_alone).text(layers=True)
        assert "kept by a merge: nothing" in inspect_concept(random_concept(None)).text()

    def test_json_is_what_browsers_read(self) -> None:
        concept = replace(random_concept(), provenance={"losses": [0.5, float("nan")]})
        told = inspect_concept(concept, fit=Fit(("why",))).as_json()
        json.dumps(told, allow_nan=False)
        assert told["provenance"] == {"losses": [0.5, None]}
        assert told["fit"] == {"misfits": ["why"], "remark": ""}
        assert told["layers"][0]["shape"] == [24, 64]
        assert set(told["layers"][0]["components"]) == {"0.6", "0.9"}


class TestFit:
    def test_every_layer_that_does_not_fit_is_named(self) -> None:
        concept = random_concept()
        shapes = {**SHAPES, KEY: (24, 32)}
        del shapes[MIDDLE]
        found = fit_to(concept, concept.family, shapes, "")
        assert found.misfits == (
            f"{KEY} is (24, 64) in the concept and (24, 32) in the model",
            f"{MIDDLE} is (40, 64) in the concept and absent in the model",
        )
        told = inspect_concept(concept, fit=found)
        assert "fits the model: no" in told.text()
        assert all(reason in told.text() for reason in found.misfits)

    def test_another_family_is_the_one_reason(self) -> None:
        concept = made_concept({LAYER: (640, 2048)}, family="sdxl")
        (reason,) = fit_to(concept, FAMILIES["sd15"], SHAPES, "").misfits
        assert "trained on Stable Diffusion XL (text width 2048)" in reason
        assert "Stable Diffusion 1.x (768)" in reason

    def test_another_checkpoint_is_a_remark_and_no_misfit(self) -> None:
        own, other = (hash_projections(base_weights(seed=seed)) for seed in (1, 2))
        concept = random_concept(base_hash=own)
        assert fit_to(concept, concept.family, SHAPES, own) == Fit()
        found = fit_to(concept, concept.family, SHAPES, other)
        assert not found.misfits
        assert own[:8] in found.remark and other[:8] in found.remark
        told = inspect_concept(concept, fit=found).text()
        assert "fits the model: yes" in told and "another checkpoint" in told

    def test_what_does_not_know_its_base_model_gets_no_remark(self) -> None:
        concept = random_concept(base_hash="")
        assert fit_to(concept, concept.family, SHAPES, "ab" * 16) == Fit()


class TestCommand:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        return write_concept(made_concept({LAYER: (320, 768)}), tmp_path / "cat.safetensors")

    def test_as_json(self, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["inspect", str(file), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["file"], told["family"], told["fit"]) == ("cat.safetensors", "sd15", None)
        assert told["created"][:2] == "20"

    def test_layers_are_told_when_asked_for(
        self, file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["inspect", str(file)]) == 0
        assert LAYER not in capsys.readouterr().out
        assert main(["inspect", str(file), "--layers"]) == 0
        assert f"{LAYER}  320 x 768" in capsys.readouterr().out

    def test_the_fit_to_a_model(
        self, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["inspect", str(file), "--base", "miniature"]) == 0
        told = capsys.readouterr().out
        assert "fits the model: no" in told and "this model is The miniature (128)" in told

        with borrowed_models(miniature_pipeline()) as models:
            denoiser = models.denoiser
            changes = {
                layer: DenseDelta(denoiser.network.get_parameter(f"{path}.weight") * 0.01)
                for layer, path in denoiser.projections.items()
            }
            own = Concept(denoiser.family, changes, base_hash=base_hash(denoiser))
        for concept, remarks in ((own, 0), (replace(own, base_hash="ab" * 16), 1)):
            path = write_concept(concept, tmp_path / "own.safetensors")
            assert main(["inspect", str(path), "--base", "miniature"]) == 0
            told = capsys.readouterr().out
            assert "fits the model: yes" in told
            assert told.count("another checkpoint") == remarks

    @pytest.mark.slow
    def test_no_model_library_is_needed(self, file: Path) -> None:
        code = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import conftest
sys.modules["diffusers"] = sys.modules["transformers"] = None
from custom_diffusion.cli import main
print(main(["inspect", {str(file)!r}]), main(["list", {str(file.parent)!r}]))
"""
        result = run_python(code)
        assert result.stdout.splitlines()[-1] == "0 0", result.stderr


def run_python(code: str) -> Any:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
