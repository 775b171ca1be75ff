"""`custom-diffusion import` and `export`, as they are typed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from custom_diffusion.cli import main
from custom_diffusion.concept.concept import Concept, ModifierToken
from custom_diffusion.concept.delta import LowRankDelta
from custom_diffusion.concept.file import read_concept, write_concept
from custom_diffusion.formats.base import BaseModel
from custom_diffusion.formats.exporting import FORMATS
from safetensors.torch import load_file
from support.tiny_models import tiny_pipeline

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given") / "model"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def cat(model: Path, tmp_path: Path) -> Path:
    base = BaseModel.of(tiny_pipeline().unet.named_parameters())
    deltas = {
        layer: LowRankDelta(torch.full((len(weight), 2), 0.001), torch.ones(2, weight.shape[1]))
        for layer, weight in base.weights.items()
        if layer.endswith(("to_k", "to_v"))
    }
    word = ModifierToken("<new1>", "cat", {"clip_l": torch.ones(1, 768)})
    concept = Concept(base.family, deltas, (word,), base_hash=base.hash)
    return write_concept(concept, tmp_path / "cat.safetensors")


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_goes_there_and_back(
    kind: str, cat: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = ["export", str(cat), "--format", kind, "--output", str(tmp_path / "theirs")]
    assert main([*export, "--base", str(model)]) == 0
    said = capsys.readouterr().out
    files = [Path(line.split()[1]) for line in said.splitlines() if line.startswith("saved")]
    assert files and all(file.is_file() for file in files)
    back = tmp_path / "back.safetensors"
    words = ["--base", str(model), "--class-noun", "cat", "--output", str(back)]
    assert main(["import", str(files[0]), *words]) == 0
    read = read_concept(back)
    for layer, delta in read.deltas.items():
        wanted = read_concept(cat).deltas[layer].dense()
        torch.testing.assert_close(delta.dense().float(), wanted, rtol=1e-2, atol=1e-5)
    assert main(export + ["--base", str(model)]) == 1
    assert "exists already" in capsys.readouterr().err


def test_a_checkpoint_is_baked(
    cat: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unet = model / "unet" / "diffusion_pytorch_model.safetensors"
    baked = tmp_path / "baked.safetensors"
    export = ["export", str(cat), "--format", "checkpoint", "--output", str(baked)]
    assert main(export) == 1 and "--base FILE" in capsys.readouterr().err
    assert main([*export, "--base", str(unet)]) == 0
    assert "<new1>" in capsys.readouterr().out
    before, after = load_file(unet), load_file(baked)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == len(read_concept(cat).deltas) and before.keys() == after.keys()


def test_what_is_left_out_is_said(
    cat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"<toy>": torch.ones(768)}, tmp_path / "toy.bin")
    assert (
        main(["import", str(tmp_path / "toy.bin"), "--output", str(tmp_path / "t.safetensors")])
        == 0
    )
    words = {"new_concept_embedding": {"<a>": torch.ones(16, 768)}, "text_encoder": {}, "unet": {}}
    torch.save({"params": words}, tmp_path / "ed.pth")
    output = ["--token", "<mine>", "--output", str(tmp_path / "ed.safetensors")]
    assert main(["import", str(tmp_path / "ed.pth"), *output]) == 0
    assert "note: <a> has a row for each of 16 layers: their mean" in capsys.readouterr().out
    assert [t.name for t in read_concept(tmp_path / "ed.safetensors").tokens] == ["<mine>"]
