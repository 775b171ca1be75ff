"""How far two UNets are apart, held against numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from custom_diffusion.cli import main
from custom_diffusion.concept.errors import IncompatibleModelError
from custom_diffusion.inspection.weight_change import WeightChanges, changes_between
from PIL import Image
from safetensors.torch import save_file
from support.tiny_models import tiny_unet
from torch import Tensor


def weights(seed: int = 0) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {name: weight.clone() for name, weight in tiny_unet().state_dict().items()}


def trained(before: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cross-attention by a tenth, self-attention by a hundredth, the rest as it was."""
    generator = torch.Generator().manual_seed(1)

    def moved(name: str, weight: Tensor) -> Tensor:
        share = 0.1 if ".attn2." in name else 0.01 if ".attn1." in name else 0.0
        noise = torch.randn(weight.shape, generator=generator)
        return weight + share * weight.norm() * noise / noise.norm()

    return {name: moved(name, weight) for name, weight in before.items()}


def test_each_kind_has_the_mean_of_its_tensors(tmp_path: Path) -> None:
    before = weights()
    after = trained(before)
    files = tmp_path / "before.safetensors", tmp_path / "after.safetensors"
    beside = {"first_stage_model.decoder.conv_in.weight": torch.ones(2, 2)}
    save_file({f"model.diffusion_model.{name}": w for name, w in before.items()} | beside, files[0])
    save_file({name: w.half() for name, w in after.items()}, files[1])  # a UNet alone
    found = changes_between(*files)
    assert {one.name for one in found.changes} == set(before) and found.alone == 0
    for one in found.changes:
        old, new = before[one.name].double().numpy(), after[one.name].double().numpy()
        size = np.linalg.norm(old)
        wanted = np.linalg.norm(new - old) / size if size else 0
        assert one.change == pytest.approx(wanted, abs=1e-3)
    head, first, second, third = found.table()
    assert [row[0] for row in (first, second, third)] == [
        "cross-attention",
        "self-attention",
        "the rest",
    ]
    assert (first[2], second[2]) == ("10.00%", "1.00%")
    assert sum(float(row[1].rstrip("%")) for row in (first, second, third)) == pytest.approx(
        100, abs=0.2
    )
    assert head[0] == "kind of layer"
    assert found.summary()[0].startswith("Cross-attention changed most, by 10.00% on average.")


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = weights()
    files = [str(tmp_path / f"{name}.safetensors") for name in ("before", "after", "same")]
    for file, tensors in zip(files, (before, trained(before), before), strict=True):
        save_file(tensors, file)
    plot = tmp_path / "change.png"
    assert main(["compare", *files[:2], "--plot", str(plot), "--layers"]) == 0
    told = capsys.readouterr().out
    assert "Cross-attention changed most" in told and told.count("10.00") > 1
    assert Image.open(plot).width > 1000
    assert main(["compare", *files[:2], "--plot", str(plot)]) == 1  # nothing is replaced
    assert main(["compare", files[0], files[2], "--plot", str(tmp_path / "same.png")]) == 0
    assert "The same" in capsys.readouterr().out


def test_what_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = {"a.weight": torch.ones(2, 2), "b.weight": torch.ones(3)}
    found = WeightChanges.of(
        [
            ("a.weight", old["a.weight"], torch.ones(2, 3)),
            ("b.weight", old["b.weight"], 2 * old["b.weight"]),
        ]
    )
    assert found.changes[0].change == 1 and found.alone == 2
    assert "2 tensors are in one of the two alone" in found.summary()[1]
    with pytest.raises(IncompatibleModelError, match="no tensor of a UNet in common"):
        WeightChanges.of([])
    save_file(old, tmp_path / "a.safetensors")
    save_file({"c.weight": torch.ones(2)}, tmp_path / "c.safetensors")
    assert main(["compare", str(tmp_path / "a.safetensors"), str(tmp_path / "c.safetensors")]) == 1
    (tmp_path / "b.safetensors").write_bytes(b"no weights")
    assert main(["compare", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]) == 1
    assert "b.safetensors" in capsys.readouterr().err


def test_nothing_before_is_all_new() -> None:
    zero, one = torch.zeros(2), torch.ones(2)
    found = WeightChanges.of([("a", zero, one), ("b", zero, zero)])
    assert [c.change for c in found.changes] == [1, 0]
