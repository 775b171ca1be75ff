"""The miniature world: its scenes, what captions say of them, its concepts, and the drawing, beside
readers and drawers that share no code with it.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from custom_diffusion.host.open_clip.vocabulary import clip_tokenizer, read_tokenizer
from custom_diffusion.miniature import world
from custom_diffusion.miniature.concepts import (
    concept_look,
    concept_masks,
    concept_pictures,
    concept_style,
)
from custom_diffusion.miniature.drawing import draw
from custom_diffusion.miniature.judge import Facts
from custom_diffusion.miniature.model import CONTEXT_LENGTH
from custom_diffusion.miniature.pretrain import write_world_vocabulary
from custom_diffusion.miniature.world import Look, Placed, Scene, Style, color_name
from custom_diffusion.trainer.learning.tokens import RARE_PIECES
from PIL import Image, ImageDraw
from torch import Tensor

RED, BLUE = (0.86, 0.12, 0.12), (0.15, 0.30, 0.90)


def scenes_of(count: int, seed: int = 0) -> list[tuple[Scene, str]]:
    rng = random.Random(seed)
    return [world.captioned_scene(rng) for _ in range(count)]


def centered(look: Look) -> Scene:
    return Scene((Placed(look, 0.5, 0.5, 0.4),), "in fog")


def color_at(picture_chw: Tensor, u: float, v: float) -> Tensor:
    """At a point in a centred object's own coordinates, in which its radius is 1."""
    edge = picture_chw.shape[-1]
    return picture_chw[:, int((0.5 + 0.4 * v) * edge), int((0.5 + 0.4 * u) * edge)]


def is_color(found: Tensor, color: world.Color) -> bool:
    return torch.allclose(found, torch.tensor(color), atol=1e-6)


# Scenes


def test_scenes_captions_and_pictures_depend_on_the_seed_alone() -> None:
    random_state = random.getstate()
    one, same, other = scenes_of(50, 1), scenes_of(50, 1), scenes_of(50, 2)
    assert one == same
    assert one != other
    pictures = [draw([scene for scene, _ in scenes], 24) for scenes in (one, same, other)]
    assert torch.equal(pictures[0], pictures[1])
    assert not torch.equal(pictures[0], pictures[2])
    assert random.getstate() == random_state


def test_objects_are_in_the_picture_apart_and_of_different_shapes() -> None:
    for scene, _ in scenes_of(1000):
        for placed in scene.objects:
            for center in (placed.x, placed.y):
                assert placed.radius <= center <= 1 - placed.radius
        shapes = [placed.look.shape for placed in scene.objects]
        assert len(set(shapes)) == len(shapes) <= 2
        if len(shapes) == 2:
            one, two = scene.objects
            assert math.hypot(one.x - two.x, one.y - two.y) > one.radius + two.radius


def test_no_object_of_the_world_has_two_rare_colours_or_two_alike() -> None:
    looks = [placed.look for scene, _ in scenes_of(1000) for placed in scene.objects]
    patterned = [look for look in looks if look.pattern != "plain"]
    rare = [sum(is_rare(color) for color in (x.color, x.second_color)) for x in patterned]
    assert set(rare) == {0, 1}, "each alone is common all the same"
    assert 0.4 < sum(rare) / len(rare) < 0.75
    assert all(math.dist(look.color, look.second_color) > 0.3 for look in patterned)


def test_every_colour_has_the_name_it_was_drawn_by() -> None:
    rng = random.Random(0)
    for name in world.RARE_HUES:
        assert {color_name(world.rare_color(rng, name)) for _ in range(200)} == {name}
    assert {color_name(world.common_color(rng)) for _ in range(500)} == {*world.COMMON_COLORS}


def is_rare(color: world.Color) -> bool:
    return color_name(color) in world.RARE_HUES


def test_a_caption_is_true_of_its_scene() -> None:
    """As the judge reads it, which shares no code with what writes captions."""
    backgrounds, places = 0, set()
    for scene, caption in scenes_of(1000):
        facts = Facts.of(caption)
        assert len(facts.objects) == len(scene.objects), caption
        for placed, said in zip(scene.objects, facts.objects, strict=True):
            look = placed.look
            assert said.shape == look.shape, caption
            assert said.color in ("", color_name(look.color)), caption
            assert said.second_color in ("", color_name(look.second_color)), caption
            assert said.pattern in ("", look.pattern), caption
            assert said.mark in ("", look.mark), caption
        assert facts.background in ("", scene.background)
        backgrounds += bool(facts.background)
        if facts.place:
            first, *others = ((placed.x, placed.y) for placed in scene.objects)
            origin = others[0] if others else (0.5, 0.5)
            offset = (first[0] - origin[0], first[1] - origin[1])
            dx, dy = (world.RELATIONS | world.PLACES)[facts.place]
            along, across = dx * offset[0] + dy * offset[1], dy * offset[0] + dx * offset[1]
            assert along > abs(across), caption
            places.add(facts.place)
        radius = 0.25 if len(scene.objects) > 1 else scene.objects[0].radius
        assert not caption.startswith(world.SMALL_WORDS) or radius < world.SMALL_RADIUS
        assert not caption.startswith(world.LARGE_WORDS) or radius > world.LARGE_RADIUS
        assert caption.startswith("painting") == (scene.style is not None)
    assert 400 < backgrounds < 600
    assert places == {*world.PLACES, *world.RELATIONS}


# Concepts


def test_a_tenth_of_the_coloured_captions_is_kept_for_tests() -> None:
    assert not any(world.held_out(caption) for _, caption in scenes_of(3000))
    rng = random.Random(0)
    captions = {world.random_caption(world.random_scene(rng), rng) for _ in range(5000)}
    coloured = [c for c in captions if any(name in c.split() for name in world.COLORS)]
    kept = [caption for caption in captions if world.held_out(caption)]
    assert set(kept) <= set(coloured)
    assert 0.07 < len(kept) / len(coloured) < 0.13


def test_concepts_have_two_rare_colours_a_pattern_and_a_mark_and_repeat() -> None:
    looks = [concept_look(seed) for seed in range(200)]
    assert looks == [concept_look(seed) for seed in range(200)]
    assert len(set(looks)) == 200
    assert all(is_rare(color) for x in looks for color in (x.color, x.second_color))
    assert min(math.dist(look.color, look.second_color) for look in looks) > 0.3
    assert {look.shape for look in looks} == set(world.SHAPES)
    assert {look.pattern for look in looks} == {*world.PATTERNS} - {"plain"}
    assert {look.mark for look in looks} == {*world.MARKS} - {"none"}


def test_a_pair_of_concepts_has_no_shape_and_no_colour_in_common() -> None:
    for seed in range(0, 200, 2):
        one, two = concept_look(seed), concept_look(seed + 1)
        assert one.shape != two.shape
        colors = ((one.color, one.second_color), (two.color, two.second_color))
        assert min(math.dist(a, b) for a, b in product(*colors)) > 0.3


def test_styles_differ_by_seed_and_lead_from_dark_to_light() -> None:
    styles = [concept_style(seed) for seed in range(50)]
    assert styles == [concept_style(seed) for seed in range(50)]
    assert len(set(styles)) == 50
    assert all(style.hatched and max(style.dark) < 0.4 < max(style.light) for style in styles)


# Drawing


@pytest.mark.parametrize("shape, reach", [("circle", math.sqrt(0.9)), ("square", 0.82)])
def test_plain_shapes_are_where_pillow_draws_them(shape: str, reach: float) -> None:
    x, y, radius, scale = 0.55, 0.4, 0.3, 8
    picture = draw([Scene((Placed(Look(shape, RED), x, y, radius),), "in fog")], 24)[0]
    mask = Image.new("L", (24 * scale, 24 * scale))
    corners = [(c + s * reach * radius) * 24 * scale for s in (-1, 1) for c in (x, y)]
    pen = ImageDraw.Draw(mask)
    (pen.ellipse if shape == "circle" else pen.rectangle)(corners, fill=255)
    share = torch.tensor(list(mask.reduce(scale).tobytes())).view(24, 24) / 255
    ground = picture[:, :, :1]  # the object does not reach the left edge; rows are of one colour
    wanted = torch.lerp(ground, torch.tensor(RED)[:, None, None], share)
    assert (picture - wanted).abs().mean() < 0.005
    assert (picture - wanted).abs().max() < 0.15


def test_a_picture_is_the_same_at_any_size() -> None:
    rng = random.Random(0)
    styled = [world.random_scene(rng, style=world.random_style(rng)) for _ in range(3)]
    scenes = [*(scene for scene, _ in scenes_of(9)), *styled]
    difference = draw(scenes, 24) - F.avg_pool2d(draw(scenes, 192), 8)
    assert difference.abs().mean() < 0.01
    assert difference.mean((2, 3)).abs().max() < 0.01, "no picture has other colours"


# Points (y points down) that show the main colour, and some that do not: beside a shape lies the
# background, and the rest of a pattern has the second colour.
POINTS = {
    "circle": ([(0.9, 0), (0, -0.9), (0.6, 0.6)], [(1, 0), (0.7, 0.7)]),
    "square": ([(0.78, 0.78), (-0.78, 0.78), (0.78, -0.78)], [(0.86, 0), (0, -0.86)]),
    "triangle": ([(0, -0.8), (0.85, 0.7), (-0.85, 0.7)], [(0.3, -0.8), (-0.3, -0.8), (0, 0.8)]),
    "cross": ([(0.95, 0.3), (-0.95, 0), (0, 0.95)], [(0.4, 0.4), (-0.4, 0.4), (0.6, -0.6)]),
    "plain": ([(0, 0), (0.5, 0.5), (-0.5, 0.5), (0, -0.8)], []),
    "striped": ([(0, 0.1), (0.7, 0.5), (0, -0.6)], [(0, -0.1), (0.7, -0.5), (0, 0.6)]),
    "split": ([(-0.1, 0.5), (-0.8, 0)], [(0.1, 0.5), (0.8, 0)]),
    "ringed": ([(0, 0), (0.5, 0), (0, -0.5)], [(0.7, 0), (0, -0.7), (0.6, 0.6)]),
}


@pytest.mark.parametrize("name", [*world.SHAPES, *world.PATTERNS])
def test_shapes_and_patterns_have_their_colours_where_they_must(name: str) -> None:
    patterned = name in world.PATTERNS
    look = Look("circle", RED, name, BLUE) if patterned else Look(name, RED)
    picture = draw([centered(look)], 240, 1)[0]
    main, others = ([color_at(picture, u, v) for u, v in points] for points in POINTS[name])
    assert all(is_color(found, RED) for found in main)
    assert not any(is_color(found, RED) for found in others)
    assert all(is_color(found, BLUE) for found in others if patterned)


@pytest.mark.parametrize("pattern", world.PATTERNS)
def test_marks_lie_in_the_middle_over_any_pattern(pattern: str) -> None:
    scenes = [centered(Look("circle", RED, pattern, BLUE, mark)) for mark in world.MARKS]
    bare, white, black = draw(scenes, 240, 1)
    for u, v in [(0, 0), (0.25, 0.1), (-0.1, -0.25)]:
        assert color_at(white, u, v).min() > 0.95
        assert color_at(black, u, v).max() < 0.05
    for u, v in [(0.33, 0), (0, -0.33), (0.6, 0.6)]:
        assert torch.equal(color_at(white, u, v), color_at(bare, u, v))
        assert torch.equal(color_at(black, u, v), color_at(bare, u, v))


def test_a_style_makes_two_colours_ramp_of_a_pictures_brightness() -> None:
    dark, light = torch.tensor([0.2, 0.1, 0.0]), torch.tensor([0.3, 0.9, 0.8])
    styles = [Style((0.2, 0.1, 0.0), (0.3, 0.9, 0.8), hatched) for hatched in (False, True)]
    for scene, _ in scenes_of(20):
        ordinary, plain, hatched = draw(
            [Scene(scene.objects, "in fog", style=style) for style in (None, *styles)], 24
        )
        brightness = (ordinary * torch.tensor([0.3, 0.6, 0.1])[:, None, None]).sum(0)
        ramp = (light - dark)[:, None, None]
        torch.testing.assert_close(plain, dark[:, None, None] + ramp * brightness)
        on_ramp = (hatched - dark[:, None, None]) / ramp
        torch.testing.assert_close(on_ramp[0], on_ramp[2])
        darker = brightness - on_ramp[1]
        assert darker.min() > -1e-5 and darker.max() < 0.2501
        assert 0.09 < darker.mean() < 0.16, "lines cover half of the picture"


def test_the_vocabulary_holds_the_words_of_captions_and_no_others() -> None:
    words = {word for _, caption in scenes_of(20_000) for word in caption.split()}
    assert words == set(world.vocabulary())


def test_captions_fall_into_the_same_pieces_as_with_clips_whole_vocabulary(tmp_path: Path) -> None:
    write_world_vocabulary(tmp_path)
    ours, clips = read_tokenizer(tmp_path, CONTEXT_LENGTH), clip_tokenizer()
    captions = [caption for _, caption in scenes_of(500)]
    pieces, wanted = (
        [t.convert_ids_to_tokens(ids) for ids in t(captions)["input_ids"]] for t in (ours, clips)
    )
    assert pieces == wanted
    assert set(RARE_PIECES) <= ours.get_vocab().keys() & clips.get_vocab().keys()
    for text in ("caterpillar", "<new1> circle", "ein Mützchen, 25 €!", "猫の写真"):
        _, *ids, _ = ours(text)["input_ids"]
        assert ids and ours.unk_token_id not in ids
        assert ours.decode(ids).replace(" ", "") == text.lower().replace(" ", "")


@pytest.mark.parametrize("seed", [1200, 7])
def test_a_mask_is_white_where_the_object_is(seed: int) -> None:
    look = concept_look(seed)
    pictures = concept_pictures(look, 4, seed=1)
    whole = concept_masks(replace(look, color=(1.0, 0.0, 1.0), pattern="plain", mark="none"), 4, 1)
    masks = concept_masks(look, 4, seed=1)
    assert torch.equal(masks, whole)  # whatever its colours and its mark
    corners = pictures[:, :, 0, 0]
    far = (pictures - corners[:, :, None, None]).abs().amax(1) > 0.12  # from the background
    assert (masks[:, 0].bool() | ~far).all()
    assert 0.02 < float(masks.mean()) < 0.5
