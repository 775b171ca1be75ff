"""Compression of concepts: against torch's full SVD, and the ranks against every other choice."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from custom_diffusion.cli import main
from custom_diffusion.compression.ranks import compress
from custom_diffusion.compression.spectrum import components, singular_values, spectra
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.delta import Delta, DenseDelta, LowRankDelta
from custom_diffusion.concept.errors import ConfigError
from custom_diffusion.concept.file import read_concept, write_concept
from custom_diffusion.concept.layers import FAMILIES
from PIL import Image
from support.concepts import KEY, LAYERS, MIDDLE, VALUE, densified, narrow_family, random_concept
from support.merging import CAT, DOG, merge
from torch import Tensor

SHAPES = [(24, 64), (64, 24), (40, 40)]


def decaying(shape: tuple[int, int], power: float = 1.0, seed: int = 0) -> Tensor:
    """A random float32 matrix with singular values 1, 2^-power, 3^-power and so on."""
    draw = torch.Generator().manual_seed(seed)
    count = min(shape)
    left, right = (
        torch.linalg.qr(torch.randn(n, count, generator=draw, dtype=torch.float64)).Q for n in shape
    )
    values = torch.arange(1, count + 1, dtype=torch.float64) ** -power
    return ((left * values) @ right.T).float()


def steep(seed: int = 0, *, family_width: int = 64) -> Concept:
    """Layers of different sizes whose singular values fall at different rates."""
    concept = random_concept(family=narrow_family(family_width), seed=seed)
    powers = {KEY: 0.5, VALUE: 1.0, MIDDLE: 1.5}
    deltas: dict[str, Delta] = {
        layer: DenseDelta(decaying((LAYERS[layer], family_width), power, seed))
        for layer, power in powers.items()
    }
    return replace(concept, deltas=deltas)


def truncation(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of this rank, by torch's SVD in float64."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def dense(delta: Delta) -> Tensor:
    if isinstance(delta, LowRankDelta):
        return delta.up.double() @ delta.down.double()
    return delta.weight.double()


def energy(concept: Concept) -> float:
    return sum(float(dense(delta).square().sum()) for delta in concept.deltas.values())


def error(concept: Concept, compressed: Concept) -> float:
    """‖ΔW − approximation‖² over all layers; a layer that was left out counts whole."""
    total = 0.0
    for layer, delta in concept.deltas.items():
        kept = compressed.deltas.get(layer)
        rest = dense(delta) - (0 if kept is None else dense(kept))
        total += float(rest.square().sum())
    return total


def numbers(concept: Concept) -> int:
    return sum(
        delta.up.numel() + delta.down.numel()
        if isinstance(delta, LowRankDelta)
        else delta.weight.numel()
        for delta in concept.deltas.values()
    )


def ranks(concept: Concept) -> dict[str, int]:
    return {k: d.rank for k, d in concept.deltas.items() if isinstance(d, LowRankDelta)}


class TestSpectrum:
    @pytest.mark.parametrize("power", [0.5, 1.5, 3.0])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_singular_values_are_those_of_a_full_svd(
        self, shape: tuple[int, int], power: float
    ) -> None:
        matrix = decaying(shape, power)
        expected = torch.linalg.svdvals(matrix.double())
        torch.testing.assert_close(singular_values(DenseDelta(matrix)), expected, rtol=0, atol=2e-8)
        squares = components(DenseDelta(matrix)).values.square()
        torch.testing.assert_close(squares, expected[: len(squares)].square(), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("rank", [3, 30])
    def test_those_of_factors_are_exact(self, shape: tuple[int, int], rank: int) -> None:
        draw = torch.Generator().manual_seed(1)
        up = torch.randn(shape[0], rank, generator=draw)
        factors = LowRankDelta(up, torch.randn(rank, shape[1], generator=draw))
        expected = torch.linalg.svdvals(up.double() @ factors.down.double())[:rank]
        for found in (singular_values(factors)[: len(expected)], components(factors).values):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)

    def test_all_layers_are_listed_in_the_concepts_order(self) -> None:
        concept = steep()
        assert list(spectra(concept)) == concept.layers

    @pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e15])
    @pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_leading_parts_are_the_best_approximation(
        self, shape: tuple[int, int], power: float, scale: float
    ) -> None:
        """Also where it leaves an error of a ten-thousandth."""
        matrix = decaying(shape, power) * scale
        parts = components(DenseDelta(matrix))
        for rank in (1, 4, 23):
            ours, best = dense(parts.leading(rank)), truncation(matrix, rank)
            assert float((ours - best).norm() / best.norm()) < 1e-5
            left = [float((matrix.double() - it).norm()) for it in (ours, best)]
            assert left[0] == pytest.approx(left[1], rel=1e-4)

    def test_both_factors_of_a_part_have_its_size(self) -> None:
        """So that half precision holds both."""
        factors = components(DenseDelta(decaying((24, 64)) * 1e-4)).leading(5)
        sizes = 1e-2 * torch.arange(1, 6) ** -0.5
        torch.testing.assert_close(factors.up.norm(dim=0), sizes)
        torch.testing.assert_close(factors.down.norm(dim=1), sizes)

    def test_a_matrix_without_further_parts_has_no_more(self) -> None:
        """Rounding noise is no component of factors, nor is zero one of anything."""
        up, down = torch.randn(24, 3), torch.randn(3, 64)
        doubled = LowRankDelta(torch.cat([up, up], 1), torch.cat([down, down]))
        assert len(components(doubled).values) == 3
        assert len(components(DenseDelta(torch.zeros(24, 64))).values) == 0
        nothing = LowRankDelta(torch.zeros(24, 2), torch.zeros(2, 64))
        assert len(components(nothing).values) == 0


class TestTargets:
    @pytest.mark.parametrize("rank", [1, 5, 12])
    def test_rank_is_every_layers_and_the_best_of_its_kind(self, rank: int) -> None:
        concept = steep()
        compressed, report = compress(concept, rank=rank)
        assert ranks(compressed) == dict.fromkeys(LAYERS, rank) == report.ranks()
        best = sum(
            float((dense(d) - truncation(dense(d), rank)).square().sum())
            for d in concept.deltas.values()
        )
        assert error(concept, compressed) == pytest.approx(best, rel=1e-6)
        assert report.energy_kept == pytest.approx(1 - best / energy(concept), abs=1e-6)

    @pytest.mark.parametrize("share", [0.3, 0.6, 0.75])
    def test_nuclear_share_is_the_papers_rule(self, share: float) -> None:
        """Component after component, until their sum would exceed the share."""
        concept = steep()
        compressed, _ = compress(concept, nuclear_share=share)
        for layer, delta in concept.deltas.items():
            values = torch.linalg.svdvals(dense(delta)).tolist()
            count, running = 0, 0.0
            while running + values[count] <= share * sum(values):
                running += values[count]
                count += 1
            kept = compressed.deltas[layer]
            assert isinstance(kept, LowRankDelta)
            assert kept.rank == max(count, 1)

    @pytest.mark.parametrize("share", [0.3, 0.8, 0.95, 0.999])
    def test_energy_share_keeps_it_with_hardly_a_number_too_many(self, share: float) -> None:
        concept = steep()
        compressed, report = compress(concept, energy_share=share)
        assert report.energy_kept >= share
        kept = 1 - error(concept, compressed) / energy(concept)
        assert kept == pytest.approx(report.energy_kept, abs=1e-6)
        least = min(
            size for size, lost in every_choice(concept) if lost <= (1 - share) * energy(concept)
        )
        assert least <= numbers(compressed) < least + 104  # a component of the largest layer

    def test_a_share_of_one_loses_nothing(self) -> None:
        concept = steep()
        for compressed, _ in (
            compress(concept, energy_share=1.0),
            compress(concept, nuclear_share=1.0),
            compress(concept, rank=999),
            compress(concept, megabytes=1.0),
        ):
            assert set(compressed.deltas) == set(concept.deltas)
            for layer, delta in concept.deltas.items():
                assert torch.equal(compressed.deltas[layer].dense(), delta.dense())

    @pytest.mark.parametrize("seed", range(3))
    def test_a_given_size_keeps_the_most_that_any_choice_of_ranks_could(self, seed: int) -> None:
        concept = steep(seed)
        options = sorted(every_choice(concept))
        ends = 0
        for megabytes in torch.linspace(0.0065, 0.016, 24).tolist():
            compressed, _ = compress(concept, megabytes=megabytes)
            size, lost = numbers(compressed), error(concept, compressed)
            best = min(other for cost, other in options if cost <= size)
            # No other choice of this size is better by as much as a component of it.
            smallest_part = (
                min(
                    float(torch.linalg.svdvals(dense(delta))[-1]) ** 2
                    for delta in compressed.deltas.values()
                    if isinstance(delta, DenseDelta)
                )
                if not ranks(compressed)
                else min(
                    float(torch.linalg.svdvals(dense(compressed.deltas[layer]))[rank - 1]) ** 2
                    for layer, rank in ranks(compressed).items()
                )
            )
            assert best - 1e-7 <= lost <= best + smallest_part
            ends += lost == pytest.approx(best, abs=1e-6)
        assert ends >= 12

    def test_layers_of_one_size_get_exactly_the_best_choice(self) -> None:
        """Then every component costs the same, and nothing is left to chance."""
        concept = steep()
        concept = replace(concept, deltas={k: v for k, v in concept.deltas.items() if k != MIDDLE})
        for megabytes in (0.0053, 0.0056, 0.0065, 0.007):
            compressed, _ = compress(concept, megabytes=megabytes)
            size = numbers(compressed)
            best = min(lost for cost, lost in every_choice(concept) if cost <= size)
            assert error(concept, compressed) == pytest.approx(best, rel=1e-5)

    def test_a_layer_that_is_worth_nothing_is_left_out(self) -> None:
        concept = steep()
        small = concept.deltas[KEY].scaled(1e-3)
        concept = replace(concept, deltas={**concept.deltas, KEY: small})
        compressed, report = compress(concept, energy_share=0.9)
        assert set(compressed.deltas) == {VALUE, MIDDLE}
        (out,) = [cut for cut in report.layers if cut.rank == 0]
        assert (out.layer, out.error) == (KEY, 1.0)
        assert "left out" in report.text()


def every_choice(concept: Concept) -> Iterator[tuple[int, float]]:
    """Numbers stored and energy lost of every choice of ranks, factors and whole layers."""
    layers = []
    for delta in concept.deltas.values():
        out, width = delta.shape
        squares = torch.linalg.svdvals(dense(delta)).square()
        options = [(k * (out + width), float(squares[k:].sum())) for k in range(len(squares))]
        layers.append([*(o for o in options if o[0] < out * width), (out * width, 0.0)])
    for combination in itertools.product(*layers):
        yield sum(size for size, _ in combination), sum(lost for _, lost in combination)


class TestFactors:
    def test_a_merge_is_compressed_without_building_a_matrix(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        merged, _ = merge([CAT, DOG])
        monkeypatch.setattr(LowRankDelta, "dense", _refuse)
        compressed, report = compress(merged, rank=4)
        monkeypatch.undo()
        for layer, delta in merged.deltas.items():
            best = truncation(dense(delta), 4)
            assert float((dense(compressed.deltas[layer]) - best).norm() / best.norm()) < 1e-5
        whole = {cut.layer: cut.components for cut in report.layers}
        assert whole == dict.fromkeys(LAYERS, 12)

    @pytest.mark.parametrize(
        "target", [{"rank": 4}, {"nuclear_share": 0.6}, {"energy_share": 0.9}], ids=str
    )
    def test_factors_are_cut_as_their_dense_form_is(self, target: dict[str, float]) -> None:
        concept = random_concept(rank=12, seed=4)
        low, low_report = compress(concept, **target)  # type: ignore[arg-type]
        full, full_report = compress(densified(concept), **target)  # type: ignore[arg-type]
        assert low_report.ranks() == full_report.ranks()
        for layer in concept.deltas:
            assert torch.allclose(low.deltas[layer].dense(), full.deltas[layer].dense(), atol=1e-6)

    def test_a_rank_that_is_there_already_changes_nothing(self) -> None:
        concept = random_concept(rank=6)
        for target in ({"rank": 6}, {"rank": 20}):
            compressed, report = compress(concept, **target)
            for layer, delta in concept.deltas.items():
                assert compressed.deltas[layer] is delta
            assert report.energy_kept == 1.0
            assert all(cut.whole and cut.rank == 6 for cut in report.layers)

    def test_factors_larger_than_their_matrix_become_dense(self) -> None:
        concept = random_concept(rank=40)
        compressed, report = compress(concept, energy_share=1.0)
        for layer, delta in concept.deltas.items():
            kept = compressed.deltas[layer]
            assert isinstance(kept, DenseDelta)
            assert torch.equal(kept.weight, delta.dense())
        assert report.bytes_after < report.bytes_before

    def test_a_rank_whose_factors_would_be_larger_than_the_matrix_leaves_it_whole(self) -> None:
        concept = steep()  # (24, 64): 18 components are larger; (40, 64): 25
        compressed, _ = compress(concept, rank=20)
        assert ranks(compressed) == {MIDDLE: 20}
        assert compressed.deltas[KEY] is concept.deltas[KEY]

    def test_compressing_again_goes_on_from_there(self) -> None:
        concept = steep()
        once, _ = compress(concept, rank=10)
        twice, _ = compress(once, rank=4)
        directly, _ = compress(concept, rank=4)
        assert error(concept, twice) == pytest.approx(error(concept, directly), rel=1e-5)
        first, second = twice.provenance["compressed"]
        assert (first["rank"], second["rank"]) == (10, 4)


class TestFile:
    @pytest.mark.parametrize("megabytes", [0.2, 0.5, 1.0, 3.0])
    @pytest.mark.parametrize("rank", [None, 60])
    def test_a_file_is_no_larger_than_asked_and_hardly_smaller(
        self, megabytes: float, rank: int | None, tmp_path: Path
    ) -> None:
        layers = {f"input_blocks.{n}.1.transformer_blocks.0.attn2.to_k": n for n in (1, 2, 4, 5)}
        concept = random_concept(family=FAMILIES["sd15"])
        draw = torch.Generator().manual_seed(0)
        deltas: dict[str, Delta] = {
            layer: LowRankDelta(
                torch.randn(320, rank, generator=draw), torch.randn(rank, 768, generator=draw)
            )
            if rank
            else DenseDelta(torch.randn(320, 768, generator=draw))
            for layer in layers
        }
        provenance = {"method": "custom diffusion", "losses": [0.123456] * 500, "note": 'ü "' * 99}
        concept = replace(concept, deltas=deltas, provenance=provenance)
        compressed, report = compress(concept, megabytes=megabytes)
        size = write_concept(compressed, tmp_path / "small.safetensors").stat().st_size
        assert size <= megabytes * 1e6
        uncut = write_concept(concept, tmp_path / "whole.safetensors").stat().st_size
        assert size > min(megabytes * 1e6, uncut) - 12_000
        assert 0 <= report.bytes_after - size < 5_000
        assert 0 <= report.bytes_before - uncut < 5_000

    def test_the_result_is_read_back_and_keeps_what_it_is(self, tmp_path: Path) -> None:
        concept = replace(
            random_concept(family=FAMILIES["sd15"], base_hash="ab", constraint_prompts=("cat",)),
            provenance={"method": "custom diffusion", "steps": 250},
        )
        compressed, _ = compress(concept, rank=3)
        again = read_concept(write_concept(compressed, tmp_path / "cat.safetensors"))
        assert again.base_hash == "ab" and again.constraint_prompts == ("cat",)
        assert again.provenance["steps"] == 250
        assert again.provenance["compressed"][0]["rank"] == 3
        (token,) = again.tokens
        assert torch.equal(
            token.embeddings["clip_l"], concept.tokens[0].embeddings["clip_l"].half()
        )
        for layer, delta in compressed.deltas.items():
            kept = dense(again.deltas[layer])
            assert float((kept - dense(delta)).norm() / dense(delta).norm()) < 1e-3

    def test_the_input_is_not_changed(self) -> None:
        concept = steep()
        before = {layer: dense(delta).clone() for layer, delta in concept.deltas.items()}
        compress(concept, rank=2)
        assert "compressed" not in concept.provenance
        for layer, weight in before.items():
            assert torch.equal(dense(concept.deltas[layer]), weight)


class TestErrors:
    @pytest.mark.parametrize(
        ("target", "message"),
        [
            ({}, "Exactly one of .* none was given"),
            ({"rank": 2, "megabytes": 3.0}, "rank and megabytes was given"),
            ({"rank": 0}, "rank is 0"),
            ({"nuclear_share": 1.5}, "nuclear share is 1.5"),
            ({"energy_share": 0.0}, "energy share is 0.0"),
            ({"energy_share": float("nan")}, "energy share is nan"),
            ({"megabytes": -1.0}, "size is -1.0 MB"),
            ({"megabytes": float("inf")}, "size is inf MB"),
        ],
        ids=str,
    )
    def test_a_target_that_cannot_be(self, target: dict[str, float], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            compress(steep(), **target)  # type: ignore[arg-type]

    def test_too_small_a_size_says_the_smallest(self) -> None:
        concept = steep()
        with pytest.raises(ConfigError, match=r"at least one component.*Give (0\.\d+) MB") as told:
            compress(concept, megabytes=0.001)
        smallest = float(str(told.value).split("Give ")[1].split()[0])
        compressed, _ = compress(concept, megabytes=smallest)
        assert sum(ranks(compressed).values()) >= 1
        with pytest.raises(ConfigError):
            compress(concept, megabytes=smallest - 0.0015)

    @pytest.mark.parametrize("zero", [False, True])
    def test_a_concept_that_changes_nothing(self, zero: bool) -> None:
        deltas = {KEY: DenseDelta(torch.zeros(24, 64))} if zero else {}
        with pytest.raises(ConfigError, match="changes no projection"):
            compress(replace(steep(), deltas=deltas), rank=1)

    def test_a_layer_of_zeros_is_left_out(self) -> None:
        concept = steep()
        zero: Delta = DenseDelta(torch.zeros(24, 64))
        concept = replace(concept, deltas={**concept.deltas, KEY: zero})
        for target in ({"rank": 2}, {"nuclear_share": 0.6}, {"energy_share": 0.5}):
            compressed, _ = compress(concept, **target)  # type: ignore[arg-type]
            assert set(compressed.deltas) == {VALUE, MIDDLE}


class TestCommand:
    def test_a_file_is_compressed(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file, small, plot = (
            tmp_path / name for name in ("a.safetensors", "b.safetensors", "p.png")
        )
        write_concept(random_concept(family=FAMILIES["sd15"]), file)
        arguments = [str(file), "--rank", "2", "--output", str(small), "--plot", str(plot)]
        assert main(["compress", *arguments]) == 0
        assert set(ranks(read_concept(small)).values()) == {2}
        told = capsys.readouterr().out
        assert "of the energy kept" in told and "rank 2 of 24" in told
        assert Image.open(plot).width > 500
        assert main(["compress", *arguments]) == 1
        assert "exists already" in capsys.readouterr().err

    @pytest.mark.parametrize("given", [[], ["--rank", "2", "--energy", "0.5"]])
    def test_exactly_one_target_is_needed(self, given: list[str], tmp_path: Path) -> None:
        with pytest.raises(SystemExit):
            main(["compress", "a.safetensors", *given, "--output", str(tmp_path / "b")])


def _refuse(self: LowRankDelta) -> Tensor:
    raise AssertionError("the dense matrix was built")
