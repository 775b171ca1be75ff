"""Pictures become tensors and pictures again, shade by shade; and in one place alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
import torch
from custom_diffusion.pictures.tensors import for_network, of_network, to_picture, to_tensor
from PIL import Image
from support.pack import ROOT, pack_files

SHADES = Image.frombytes("L", (16, 16), bytes(range(256)))
COLOURS = Image.merge("RGB", (SHADES, SHADES.rotate(90), SHADES.rotate(180)))
HOME, HOMES = "pictures/tensors.py", ("pictures/tensors.py", "pictures/colours.py")
CONVERSIONS = {"fromarray", "pil_to_tensor", "to_pil_image", "frombuffer"}


@pytest.mark.parametrize("picture", [SHADES, COLOURS], ids=["shades", "colours"])
def test_every_shade_comes_back(picture: Image.Image) -> None:
    tensor = to_tensor(picture)
    assert tensor.dtype == torch.float32 and tensor.shape[:2] == (16, 16)
    for x, y in ((0, 0), (3, 7), (15, 15)):
        wanted = picture.getpixel((x, y))
        assert (tensor[y, x] * 255).round().tolist() == (
            list(wanted) if isinstance(wanted, tuple) else wanted
        )
    again = to_picture(tensor)
    assert again.mode == picture.mode and again.tobytes() == picture.tobytes()


def test_what_lies_beyond_is_cut_off() -> None:
    beyond = torch.tensor([[-0.5, 0.0, 0.4999, 1.0, 1.5]])
    assert [*to_picture(beyond).tobytes()] == [0, 0, 127, 255, 255]


def test_networks_look_at_minus_one_to_one_with_channels_first() -> None:
    image_chw = for_network(COLOURS)
    assert image_chw.shape == (3, 16, 16)
    assert (image_chw.min(), image_chw.max()) == (-1, 1)
    red, _, _ = COLOURS.split()
    assert ((image_chw[0] + 1) * 127.5).round().flatten().tolist() == [*red.tobytes()]
    assert to_picture(of_network(image_chw)).tobytes() == COLOURS.tobytes()
    assert of_network(image_chw[None].repeat(2, 1, 1, 1)).shape == (2, 16, 16, 3)


def _conversions(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Attribute)
            and node.attr in CONVERSIONS
            or (
                isinstance(node, ast.BinOp)
                and isinstance(node.op, (ast.Mult, ast.Div))
                and isinstance(node.right, ast.Constant)
                and node.right.value in (255, 127.5)
            )
        ):
            yield ast.unparse(node)


def test_nothing_else_makes_pictures_of_numbers() -> None:
    found = {
        name: conversions
        for path in pack_files()
        if (name := path.relative_to(ROOT).as_posix()) not in HOMES
        and (conversions := [*_conversions(path.read_text(encoding="utf-8"))])
    }
    assert not found
    assert [*_conversions((ROOT / HOME).read_text(encoding="utf-8"))]
