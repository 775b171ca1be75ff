"""A small network that says what is in a picture of the miniature world.

It is what the judge sees with. It is trained on drawn pictures alone, `python -m
custom_diffusion.miniature.recognizer`, and shares nothing with the model that it judges. Objects of
a scene differ in shape, so it answers one question a shape: is one there, where, and how does it
look?
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ..concept.tensors import read_tensors
from .drawing import draw
from .model import LATENT_EDGE, WEIGHTS
from .world import (
    BACKGROUNDS,
    MARKS,
    PATTERNS,
    SHAPES,
    Color,
    Look,
    Scene,
    common_color,
    random_look,
    random_scene,
    rare_color,
)

FILE = "recognizer.safetensors"
MOST_OBJECTS = 3
_PARTS = {"presence": 1, "place": 2, "color": 3, "second_color": 3}
_PARTS |= {"pattern": len(PATTERNS), "mark": len(MARKS)}
_STEPS, _BATCH_SIZE, _LEARNING_RATE = 3000, 128, 3e-3


@dataclass(frozen=True)
class Seen:
    """What is in a batch of pictures; probabilities where not said otherwise."""

    presence: Tensor
    """(b, shapes)"""
    place: Tensor
    """(b, shapes, 2): x and y of the centre, as a share of the edge"""
    color: Tensor
    """(b, shapes, 3) in 0..1, of the object of each shape, if there is one"""
    second_color: Tensor
    pattern: Tensor
    """(b, shapes, patterns)"""
    mark: Tensor
    """(b, shapes, marks)"""
    count: Tensor
    """(b, 4): 0, 1, 2 or more objects than two"""
    background: Tensor
    """(b, backgrounds)"""
    features: Tensor
    """(b, 128): what all this was read from"""


class Recognizer(nn.Module):
    """A hundred and fifty thousand weights; reads pictures at one pixel a latent.

    A map of features, a map for each shape of where it is, and one small network that reads an
    object's look from the features there.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
            convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation)
            return nn.Sequential(convolution, nn.GroupNorm(8, outputs), nn.SiLU())

        self.trunk = nn.Sequential(
            block(3, width // 2),
            block(width // 2, width, 2),
            block(width, width),
            block(width, width, 1, 2),
            block(width, width),
        )
        self.where = nn.Conv2d(width, len(SHAPES), 1)
        hidden, answers = 2 * width, sum(_PARTS.values())
        self.object = nn.Sequential(
            nn.Linear(width + 2 + len(SHAPES), hidden), nn.SiLU(), nn.Linear(hidden, answers)
        )
        self.count = nn.Linear(width, MOST_OBJECTS + 1)
        self.background = nn.Linear(width, len(BACKGROUNDS))

    def forward(self, pictures_bchw: Tensor) -> dict[str, Tensor]:
        """Pictures in 0..1, of any size that is a multiple of 24 → raw outputs, by name."""
        small = F.interpolate(pictures_bchw, LATENT_EDGE, mode="area")
        maps = self.trunk(small * 2 - 1)
        scores = self.where(maps).flatten(2)
        features = maps.flatten(2).transpose(1, 2)
        there = scores.softmax(-1)
        points = (torch.arange(maps.shape[-1]) + 0.5) / maps.shape[-1]
        places = torch.cartesian_prod(points, points).flip(-1)
        shapes = torch.eye(len(SHAPES)).expand(len(maps), -1, -1)
        strength = scores.logsumexp(-1, keepdim=True)
        read = torch.cat([there @ features, there @ places, shapes], -1)
        parts = self.object(read).split(list(_PARTS.values()), -1)
        outputs = dict(zip(_PARTS, parts, strict=True))
        outputs["presence"] = outputs["presence"] + strength
        outputs["place"] = outputs["place"] + there @ places
        overall = features.mean(1)
        present = outputs["presence"].sigmoid()
        seen = (present * (there @ features)).sum(1)
        return outputs | {
            "count": self.count(overall),
            "background": self.background(overall),
            "features": torch.cat([overall, seen], -1),
        }

    @torch.no_grad()
    def look(self, pictures_bchw: Tensor) -> Seen:
        """What is in pictures (b, 3, h, w) in 0..1."""
        raw = self(pictures_bchw)
        soft = {k: raw[k].softmax(-1) for k in ("pattern", "mark", "count", "background")}
        return Seen(
            presence=raw["presence"][..., 0].sigmoid(),
            place=raw["place"],
            color=raw["color"],
            second_color=raw["second_color"],
            features=raw["features"],
            **soft,
        )


def load_recognizer(weights: Path = WEIGHTS) -> Recognizer:
    recognizer = Recognizer()
    tensors, _ = read_tensors(weights / FILE)
    recognizer.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return recognizer.requires_grad_(False)


def train_recognizer(folder: Path, steps: int = _STEPS, seed: int = 0) -> None:
    """Trains it from nothing, in minutes, and leaves its weights in `folder`."""
    rng = random.Random(f"recognizer {seed}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        recognizer = Recognizer()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(recognizer.parameters(), lr=_LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, steps)
    for step in range(1, steps + 1):
        scenes = [_any_scene(rng) for _ in range(_BATCH_SIZE)]
        pictures = _worsened(draw(scenes, LATENT_EDGE, samples=2), generator)
        loss = _loss(recognizer(pictures), scenes)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step} of {steps}, loss {loss.item():.4f}", flush=True)
    weights = {name: t.detach().half() for name, t in recognizer.state_dict().items()}
    save_file(weights, folder / FILE)


def _any_scene(rng: random.Random) -> Scene:
    """Scenes of the world and beyond: no object or three, twice the same shape, any colours."""
    count = rng.choices(range(MOST_OBJECTS + 1), (4, 42, 42, 12))[0]
    repeated = rng.random() < 0.1
    shapes = rng.choices(SHAPES, k=count) if repeated else rng.sample(SHAPES, count)
    looks = [_any_look(rng, shape) for shape in shapes]
    scene = random_scene(rng, looks[:2] or [_any_look(rng, "circle")])
    third = random_scene(rng, looks[2:]).objects if count == 3 else ()
    return Scene((*scene.objects[:count], *third), scene.background, scene.tint)


def _any_look(rng: random.Random, shape: str) -> Look:
    look = random_look(rng, shape)
    if rng.random() < 0.5:
        return look
    colors: list[Color] = [
        rng.choice([common_color, rare_color, _any_color])(rng) for _ in range(2)
    ]
    return Look(look.shape, colors[0], rng.choice(PATTERNS), colors[1], rng.choice(MARKS))


def _any_color(rng: random.Random) -> Color:
    return rng.random(), rng.random(), rng.random()


def _worsened(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Noise, blur and faded colours, as a model's pictures have them."""
    strength = torch.rand(len(pictures), 3, 1, 1, 1, generator=generator)
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    pictures = torch.lerp(pictures, blurred, 0.6 * strength[:, 0])
    grey = pictures.mean((1, 2, 3), keepdim=True)
    pictures = torch.lerp(pictures, grey, 0.15 * strength[:, 1])
    noise = torch.randn(pictures.shape, generator=generator)
    return (pictures + 0.06 * strength[:, 2] * noise).clamp(0, 1)


def _loss(raw: dict[str, Tensor], scenes: Sequence[Scene]) -> Tensor:
    counts = torch.tensor([len(scene.objects) for scene in scenes])
    grounds = torch.tensor([list(BACKGROUNDS).index(scene.background) for scene in scenes])
    presence = torch.zeros(len(scenes), len(SHAPES))
    rows, placed = [], []
    for index, scene in enumerate(scenes):
        shapes = [SHAPES.index(p.look.shape) for p in scene.objects]
        presence[index, shapes] = 1
        for shape, found in zip(shapes, scene.objects, strict=True):
            if shapes.count(shape) == 1:  # with two of a kind there is no one answer
                rows.append((index, shape))
                placed.append(found)
    where = torch.tensor(rows).T.unbind()
    answers = {name: raw[name][where] for name in _PARTS}
    looks = [p.look for p in placed]
    patterned = torch.tensor([look.pattern != "plain" for look in looks])

    def squared(name: str, wanted: Sequence[Sequence[float]]) -> Tensor:
        return (answers[name] - torch.tensor(wanted)).square().sum(-1)

    return (
        F.binary_cross_entropy_with_logits(raw["presence"][..., 0], presence) * len(SHAPES)
        + F.cross_entropy(raw["count"], counts)
        + F.cross_entropy(raw["background"], grounds)
        + F.cross_entropy(
            answers["pattern"], torch.tensor([PATTERNS.index(x.pattern) for x in looks])
        )
        + F.cross_entropy(answers["mark"], torch.tensor([MARKS.index(x.mark) for x in looks]))
        + 10 * squared("place", [(p.x, p.y) for p in placed]).mean()
        + 10 * squared("color", [look.color for look in looks]).mean()
        + 10 * (squared("second_color", [x.second_color for x in looks]) * patterned).mean()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=WEIGHTS)
    parser.add_argument("--steps", type=int, default=_STEPS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    train_recognizer(options.folder, options.steps, options.seed)


if __name__ == "__main__":
    main()
