"""Small files that stand for much: refused by the shapes, before anything is made of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_diffusion.concept.checks import check_sizes
from custom_diffusion.concept.errors import CustomDiffusionError
from custom_diffusion.concept.file import read_concept
from custom_diffusion.concept.layers import MOST_LAYERS, MOST_NUMBERS
from custom_diffusion.formats.base import BaseModel
from custom_diffusion.formats.importing import open_concept
from safetensors.torch import save_file
from support.hostile import concept_with

Shapes = Mapping[str, tuple[int, ...]]


def layer(number: int = 4, matrix: str = "to_k") -> str:
    return f"input_blocks.{number}.1.transformer_blocks.0.attn2.{matrix}"


def lora(parts: Shapes, layers: int = 1) -> dict[str, torch.Tensor]:
    return {
        f"diffusion_model.{layer(number)}.{part}": torch.full(shape, 0.01, dtype=torch.float16)
        for number in range(layers)
        for part, shape in parts.items()
    }


def lokr(first: tuple[int, int], second: tuple[int, int]) -> Shapes:
    return {"lokr_w1": first, "lokr_w2": second}


def halves(name: str, out: int, rank: int, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}_a": (out, rank), f"{name}_b": (rank, width)}


def loha(out: int, width: int) -> Shapes:
    return {**halves("hada_w1", out, 1, width), **halves("hada_w2", out, 1, width)}


DORA: Shapes = {"dora_scale": (1 << 14, 1)}
SMALL: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "LoKr of one layer": (lora(lokr((400, 400), (400, 400))), "more than any layer"),
    "LoKr of many layers": (lora(lokr((40, 32), (64, 64)), 250), "more than any model"),
    "LoKr of more layers than there are": (lora(lokr((2, 2), (4, 384)), 300), "than any model"),
    "LoKr of four factors": (
        lora({**halves("lokr_w1", 4000, 1, 4000), **halves("lokr_w2", 2, 1, 2)}),
        "more than any layer",
    ),
    "LoKr with a factor that is nothing": (
        lora({**halves("lokr_w1", 60000, 1, 60000), "lokr_w2": (0, 0)}),
        "or none",
    ),
    "LoKr with DoRA": (lora({**lokr((128, 128), (128, 128)), **DORA}), "more than any layer"),
    "LoKr whose halves do not chain": (
        lora({"lokr_w1_a": (8, 2), "lokr_w1_b": (3, 8), "lokr_w2": (80, 96)}),
        "do not chain",
    ),
    "LoHa of one layer": (lora(loha(60000, 60000)), "more than any layer"),
    "LoHa of many layers": (lora(loha(2560, 2560), 250), "more than any model"),
    "LoHa with DoRA": (lora({**loha(1 << 14, 1 << 14), **DORA}), "more than any layer"),
    "LoHa of two shapes": (
        lora({**halves("hada_w1", 8, 1, 8), **halves("hada_w2", 8, 1, 9)}),
        "different shapes",
    ),
    "low rank": (
        lora({"lora_up.weight": (1 << 17, 1), "lora_down.weight": (1, 768)}),
        "more than any layer",
    ),
    "low rank of many layers": (
        lora({"lora_up.weight": (2560, 1), "lora_down.weight": (1, 768)}, 300),
        "more than any model",
    ),
    "factors of convolutions": (
        lora({"lora_up.weight": (8, 2, 1, 1), "lora_down.weight": (2, 8, 3, 3)}),
        "not matrices",
    ),
    "CP factors": (
        lora(
            {"lokr_t2": (2, 2, 3, 3), "lokr_w1": (8, 8), "lokr_w2_a": (2, 9), "lokr_w2_b": (2, 9)}
        ),
        "not matrices",
    ),
    "many words": ({f"<w{n}>": torch.zeros(1, 768) for n in range(2000)}, "words"),
}
A1111 = {"json": f'{{"entries": {{"{layer()}": "delta_factors"}}}}'}


def write(tensors: dict[str, torch.Tensor], path: Path, **metadata: str) -> Path:
    save_file(tensors, path, metadata or None)
    return path


def message_of(path: Path, base: BaseModel | None = None) -> str:
    with pytest.raises(CustomDiffusionError) as caught:
        open_concept(path, base)
    assert path.name in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("case", SMALL)
def test_it_is_refused(case: str, tmp_path: Path) -> None:
    tensors, message = SMALL[case]
    assert message in message_of(write(tensors, tmp_path / "a.safetensors"))


def test_factors_of_other_tools(tmp_path: Path) -> None:
    up, down = torch.zeros(1 << 17, 1), torch.zeros(1, 768)
    tensors = {f"{layer()}.US": up, f"{layer()}.Vh": down}
    message = message_of(write(tensors, tmp_path / "a.safetensors", **A1111))
    assert "more than any layer" in message
    factors = {"u": up, "v": down}
    name = f"model.diffusion_model.{layer()}.weight"
    values: dict[str, Any] = {"unet": {name: factors}, "state_dict": {name: factors}}
    torch.save({"unet": values["unet"]}, tmp_path / "adobe.bin")
    torch.save({"state_dict": values["state_dict"]}, tmp_path / "compvis.ckpt")
    for file in ("adobe.bin", "compvis.ckpt"):
        assert "more than any layer" in message_of(tmp_path / file)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"lora_up.weight": (1 << 17, 1), "lora_down.weight": (1, 768)}, "more than any layer"),
        ({"diff": (4000, 768)}, "more than any layer"),
    ],
)
def test_of_our_own_files_too(parts: Shapes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(concept_with(lora({**parts, **({} if "diff" in parts else {"alpha": ()})})))
    with pytest.raises(CustomDiffusionError, match=rf"a\.safetensors.*{message}"):
        read_concept(path)


@pytest.mark.parametrize("size", [1e300, 1e39, -1e300, 1e38])
@pytest.mark.parametrize("part", ["alpha", "lora_up.weight"])
@pytest.mark.parametrize("own", [True, False], ids=["ours", "another tool's"])
def test_values_that_no_float32_has(own: bool, part: str, size: float, tmp_path: Path) -> None:
    """They would be infinite as soon as the matrix is made."""
    tensors = {
        k: t.double()
        for k, t in lora(
            {"lora_up.weight": (8, 2), "lora_down.weight": (2, 768), "alpha": ()}
        ).items()
    }
    for name in tensors:
        tensors[name].fill_(size if name.endswith(part) else 100.0)
    path = tmp_path / "a.safetensors"
    if own:
        path.write_bytes(concept_with(tensors))
    else:
        save_file(tensors, path)
    with pytest.raises(CustomDiffusionError, match=r"a\.safetensors.*finite"):
        (read_concept if own else open_concept)(path)


def test_all_of_sdxl_fits() -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for number in range(70):
        width = 640 if number < 10 else 1280
        for matrix in ("to_k", "to_v"):
            shapes[layer(number, matrix)] = (width, 2048)
        for matrix in ("to_q", "to_out.0"):
            shapes[layer(number, matrix)] = (width, width)
    assert len(shapes) == MOST_LAYERS
    assert sum(out * width for out, width in shapes.values()) == MOST_NUMBERS
    check_sizes(shapes)


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
@pytest.mark.slow
def test_it_takes_no_memory(tmp_path: Path) -> None:
    """All of them in one process, as concepts and as cards: no more than the largest file."""
    for case, (tensors, _) in SMALL.items():
        write(tensors, tmp_path / f"{case}.safetensors")
    tests = Path(__file__).resolve().parents[1]
    code = f"""
import resource, sys
sys.path.insert(0, {str(tests)!r})
import conftest
from pathlib import Path
from custom_diffusion.concept.errors import CustomDiffusionError
from custom_diffusion.inspection.any_card import read_any_card
from custom_diffusion.formats.importing import open_concept
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in Path(".").glob("*.safetensors"):
    read_any_card(path)
    try:
        open_concept(path)
    except CustomDiffusionError:
        pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert int(run.stdout) < 100_000, run.stderr  # kB


def test_a_word_of_too_many_vectors(tmp_path: Path) -> None:
    rows = torch.zeros(1001, 768)
    assert "1000 are the most" in message_of(write({"emb": rows}, tmp_path / "a.safetensors"))
