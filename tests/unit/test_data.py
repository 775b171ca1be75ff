"""Folders, captions and pictures of every make, and messages for those that cannot be used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from custom_diffusion.concept.errors import DataError, TokenError
from custom_diffusion.concept.prompts import STYLE_TEMPLATE
from custom_diffusion.trainer.data.captioned import CaptionedImage, check_readable
from custom_diffusion.trainer.data.folders import folder_advice, load_folder
from custom_diffusion.trainer.data.training_concept import TrainingConcept, instance_caption
from PIL import Image, features

RED = Image.new("RGB", (20, 10), "red")
GOOD = CaptionedImage(RED, "photo of a <new1> cat")


def concept(**changes: object) -> TrainingConcept:
    settings: dict[str, object] = {"images": (GOOD,), "class_noun": "cat", "token": "<new1>"}
    return TrainingConcept(**{**settings, **changes})  # type: ignore[arg-type]


def saved_in(folder: Path) -> Path:
    """The folder, with a picture."""
    RED.save(folder / "other.png")
    return folder


def saved(image: Image.Image, path: Path, **options: object) -> CaptionedImage:
    image.save(path, **options)
    return CaptionedImage(path, "photo of a <new1> cat")


def test_a_folder_is_read_by_name_with_captions_beside_its_pictures(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "c.webp", "d.bmp"):
        RED.save(tmp_path / name)
    (tmp_path / "b.txt").write_text("a <new1> cat\n  on a   sofa\n", encoding="utf-8")
    (tmp_path / "c.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "notes.md").write_text("not a picture")
    images = load_folder(tmp_path, "photo of a <new1> cat")
    assert [image.name for image in images] == ["a.JPG", "b.png", "c.webp", "d.bmp"]
    assert [image.caption for image in images] == [
        "photo of a <new1> cat",
        "a <new1> cat",
        "photo of a <new1> cat",
        "photo of a <new1> cat",
    ]


def test_captions_may_be_in_any_script(tmp_path: Path) -> None:
    RED.save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("<new1> Käse 猫", encoding="utf-8")
    assert load_folder(tmp_path, "default")[0].caption == "<new1> Käse 猫"


def test_the_mark_that_windows_editors_put_before_utf8_is_not_part_of_a_caption(
    tmp_path: Path,
) -> None:
    RED.save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("photo of a <new1> cat", encoding="utf-8-sig")
    assert load_folder(tmp_path, "default")[0].caption == "photo of a <new1> cat"


def test_a_caption_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    RED.save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("Käse".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.txt is not a UTF-8 text file\. Save it as UTF-8"):
        load_folder(tmp_path, "default")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no folder .*nowhere\. Make it and put"):
        load_folder(tmp_path / "nowhere", "default")


def test_a_file_instead_of_a_folder_is_named(tmp_path: Path) -> None:
    RED.save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"There is no folder .*a\.png"):
        load_folder(tmp_path / "a.png", "default")


def test_a_folder_without_pictures_says_what_belongs_there(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a caption alone")
    with pytest.raises(DataError, match=r"holds no pictures \(\.png, .*Put 4 to 20 pictures"):
        load_folder(tmp_path, "default")


def test_a_picture_is_turned_upright_as_its_camera_noted(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "blue")
    image.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter to the right
    opened = saved(image, tmp_path / "turned.png", exif=exif).open().image
    assert opened.size == (20, 40)
    assert opened.getpixel((10, 5)) == (255, 0, 0)
    assert opened.getpixel((10, 35)) == (0, 0, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "1", "P", "PA", "CMYK"])
def test_every_kind_of_picture_opens_in_rgb_with_its_colours(mode: str, tmp_path: Path) -> None:
    image = Image.new("RGB", (12, 8), "white").convert(mode.replace("PA", "P"))
    image = image.convert(mode)
    in_memory = CaptionedImage(image, "a <new1> cat").open().image
    suffix = "tif" if mode in ("CMYK", "PA") else "png"
    pictures = [in_memory]
    if mode != "PA":
        pictures.append(saved(image, tmp_path / f"a.{suffix}").open().image)
    for opened in pictures:
        assert opened.mode == "RGB"
        assert opened.size == (12, 8)
        assert min(opened.getpixel((6, 4))) >= 250


def test_a_palette_picture_keeps_its_colours(tmp_path: Path) -> None:
    image = RED.convert("P", palette=Image.Palette.ADAPTIVE)
    assert saved(image, tmp_path / "a.gif").open().image.getpixel((5, 5)) == (255, 0, 0)


def test_greyscale_of_sixteen_bits_keeps_its_shades(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    opened = saved(Image.fromarray(ramp), tmp_path / "scan.png").open().image
    assert opened.mode == "RGB"
    shades = np.asarray(opened)[0, :, 0].astype(int)
    assert abs(shades - np.arange(256)).max() <= 1


def test_opening_does_not_change_the_picture_it_was_given() -> None:
    image = Image.new("RGBA", (4, 4), (1, 2, 3, 4))
    CaptionedImage(image, "a <new1> cat").open()
    assert image.mode == "RGBA"


def test_what_is_transparent_is_grey_and_does_not_count() -> None:
    image = Image.new("RGBA", (4, 2), (255, 0, 0, 255))
    image.paste((0, 255, 0, 0), (0, 0, 2, 2))
    opened = CaptionedImage(image, "a <new1> cat").open()
    assert opened.image.getpixel((0, 0)) == (128, 128, 128)
    assert opened.image.getpixel((3, 1)) == (255, 0, 0)
    assert opened.mask is not None
    assert np.asarray(opened.mask).tolist() == [[0, 0, 255, 255]] * 2


def test_pictures_without_transparent_parts_have_no_mask() -> None:
    for image in (RED, RED.convert("RGBA"), RED.convert("P")):
        assert CaptionedImage(image, "a <new1> cat").open().mask is None


def test_a_mask_beside_a_picture_is_used_and_is_no_picture(tmp_path: Path) -> None:
    RED.save(tmp_path / "a.jpg")
    shades = Image.new("L", RED.size, 255)
    shades.paste(100, (0, 0, 5, 10))
    shades.save(tmp_path / "a.mask.png")
    (image,) = load_folder(tmp_path, "default")
    mask = image.open().mask
    assert mask is not None
    assert (mask.getpixel((0, 0)), mask.getpixel((19, 9))) == (100, 255)


def test_a_mask_and_transparent_parts_count_together() -> None:
    image = RED.convert("RGBA")
    image.putalpha(Image.new("L", RED.size, 128))
    mask = CaptionedImage(image, "a <new1> cat", Image.new("L", RED.size, 128)).open().mask
    assert mask is not None
    assert mask.getextrema() == (64, 64)


def test_masks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match=r"image in memory is 5 x 5 pixels, the picture 20 x 10"):
        CaptionedImage(RED, "a <new1> cat", Image.new("L", (5, 5))).open()
    with pytest.raises(DataError, match="is black everywhere.* Paint white what counts"):
        CaptionedImage(RED, "a <new1> cat", Image.new("L", RED.size)).open()


def test_folders_inside_come_as_often_as_their_names_say(tmp_path: Path) -> None:
    for folder in ("3_cat", "1_cat asleep", "notes"):
        (tmp_path / folder).mkdir()
        RED.save(tmp_path / folder / "a.png")
    (tmp_path / "3_cat" / "a.txt").write_text("my <new1> cat")
    RED.save(tmp_path / "b.png")
    images = load_folder(tmp_path, "default")
    assert [(image.name, image.caption, image.repeats) for image in images] == [
        ("b.png", "default", 1),
        ("a.png", "default", 1),
        ("a.png", "my <new1> cat", 3),
    ]


@pytest.mark.parametrize("name", ["20240612_holiday", "1001_cat", "0_cat", "٢٠٢٤_cat"])
def test_a_folder_of_too_many_repeats_says_what_its_name_means(tmp_path: Path, name: str) -> None:
    """A date is no number of repeats, in whatever digits."""
    (tmp_path / name).mkdir()
    load_folder(saved_in(tmp_path), "default")  # without pictures it may be called so
    RED.save(tmp_path / name / "a.png")
    number, _, rest = name.partition("_")
    with pytest.raises(DataError) as caught:
        load_folder(tmp_path, "default")
    message = str(caught.value)
    assert f"{tmp_path / name} means that each of its pictures counts {int(number)} times" in (
        message
    )
    assert f"1 to 1000. Rename it: to '1_{rest}' to use its pictures, to '{rest}' not to." in (
        message
    )


def test_a_thousand_repeats_are_one_picture_each(tmp_path: Path) -> None:
    (tmp_path / "1000_cat").mkdir()
    for number in range(20):
        RED.save(tmp_path / "1000_cat" / f"{number}.png")
    images = load_folder(tmp_path, "default")
    assert [image.repeats for image in images] == [1000] * 20


def test_corrupt_pictures_are_named_and_only_they(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for name in ("good.png", "cut.png", "fine.jpg", "short.jpg"):
        noise.save(tmp_path / name)
    for name in ("cut.png", "short.jpg"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.webp").write_bytes(b"")
    (tmp_path / "text.png").write_text("this is no picture")
    images = load_folder(tmp_path, "a <new1> cat")
    with pytest.raises(DataError) as caught:
        check_readable(images)
    message = str(caught.value)
    assert len(message.splitlines()) == 4
    for name in ("cut.png", "short.jpg", "empty.webp", "text.png"):
        assert f"{tmp_path / name} cannot be read as a picture" in message
    assert "good.png" not in message
    assert "fine.jpg" not in message
    assert "Remove it from the folder, or export it again as PNG or JPEG" in message


def test_readable_pictures_pass(tmp_path: Path) -> None:
    check_readable([GOOD, saved(RED, tmp_path / "a.png")])


def test_an_open_file_is_closed_again(tmp_path: Path) -> None:
    image = saved(RED, tmp_path / "a.png")
    image.open()
    (tmp_path / "a.png").unlink()  # Windows refuses while it is open
    with pytest.raises(DataError, match=r"a\.png cannot be read"):
        image.open()


def test_instance_captions_are_written_as_in_the_paper() -> None:
    assert instance_caption("<new1>", "cat") == "photo of a <new1> cat"


def test_no_instance_images_says_how_many_to_connect() -> None:
    with pytest.raises(DataError, match=r"No instance images were given\. Connect 4 to 20"):
        concept(images=())


@pytest.mark.parametrize("noun", ["", "  "])
def test_an_empty_class_noun_says_what_to_write(noun: str) -> None:
    with pytest.raises(DataError, match=r"The class noun is empty\. Write the everyday word"):
        concept(class_noun=noun)


def test_a_caption_without_the_token_is_quoted_with_an_example() -> None:
    with pytest.raises(DataError) as caught:
        concept(images=(GOOD, CaptionedImage(Path("some") / "b.png", "photo of a cat")))
    message = str(caught.value)
    assert "'photo of a cat' of b.png does not contain the trigger word <new1>" in message
    assert "Write it like 'photo of a <new1> cat'" in message


def test_a_regularization_caption_with_the_token_is_quoted() -> None:
    with pytest.raises(DataError) as caught:
        concept(regularization=(CaptionedImage(RED, "a <new1> cat"),))
    message = str(caught.value)
    assert "'a <new1> cat' of an image in memory contains the trigger word <new1>" in message
    assert "remove the word from their captions" in message


@pytest.mark.parametrize("token", ["new1", "<new 1>", "<>", "<new1> cat", "<new1>\n"])
def test_a_malformed_token_says_how_to_write_it(token: str) -> None:
    with pytest.raises(TokenError, match=r"name in angle brackets .* Write '<[\w-]+>'"):
        concept(token=token)


def test_an_initializer_without_a_token_is_refused() -> None:
    with pytest.raises(DataError, match="'cat' has no trigger word to start"):
        concept(token="", initializer="cat")


@pytest.mark.parametrize(
    ("changes", "prompt"),
    [
        ({}, "photo of a <new1> cat"),
        ({"token": ""}, "photo of a cat"),
        (
            {"class_noun": "art", "template": STYLE_TEMPLATE},
            "painting in the style of <new1> art",
        ),
    ],
)
def test_things_categories_and_styles_have_their_prompts(
    changes: dict[str, object], prompt: str
) -> None:
    captioned = (CaptionedImage(RED, prompt),)
    assert concept(images=captioned, **changes).prompt == prompt


def test_a_good_concept_is_accepted() -> None:
    made = concept(regularization=(CaptionedImage(RED, "a cat"),), initializer="cat")
    assert made.images == (GOOD,)


# What other tools leave in a folder


@pytest.mark.parametrize("ending", [".txt", ".TXT", ".caption", ".Caption"])
def test_captions_have_the_endings_of_every_tool_and_one_line(ending: str, tmp_path: Path) -> None:
    saved_in(tmp_path)
    (tmp_path / f"other{ending}").write_text("\n a  <new1> cat\r\nred, sitting\n")
    assert load_folder(tmp_path, "default")[0].caption == "a <new1> cat"
    (said,) = folder_advice(tmp_path)
    assert said == (
        "Of captions with several lines the first is taken, unless caption_lines is any: other.png."
    )


def test_of_two_caption_files_the_one_that_says_something_counts(tmp_path: Path) -> None:
    saved_in(tmp_path)
    (tmp_path / "other.caption").write_text("of kohya")
    (tmp_path / "other.txt").write_text(" \n")
    assert load_folder(tmp_path, "default")[0].caption == "of kohya"
    (tmp_path / "other.txt").write_text("of ours")
    assert load_folder(tmp_path, "default")[0].caption == "of ours"


def test_a_caption_in_sixteen_bits_without_a_mark_is_named(tmp_path: Path) -> None:
    saved_in(tmp_path)
    (tmp_path / "other.txt").write_bytes("a <new1> cat".encode("utf-16-le"))
    with pytest.raises(DataError, match=r"other\.txt is not a UTF-8 text file\. Save it as UTF-8"):
        load_folder(tmp_path, "default")


@pytest.mark.parametrize(
    "name",
    [
        *("other.mask.png", "other.MASK.PNG", "other-masklabel.png", "Other-MaskLabel.webp"),
        *("other_mask.png", "other-mask.PNG", "other.mask.jpg"),
    ],
)
def test_masks_of_every_tool_are_masks_and_never_taught(name: str, tmp_path: Path) -> None:
    saved_in(tmp_path)
    Image.new("L", RED.size, 200).save(tmp_path / name)
    (image,) = load_folder(tmp_path, "default")
    assert image.name == "other.png"
    mask = image.open().mask
    assert mask is not None and abs(mask.getpixel((3, 3)) - 200) <= 2
    assert [*folder_advice(tmp_path)] == []


def test_a_mask_alone_is_said_and_a_picture_of_a_mask_is_one(tmp_path: Path) -> None:
    saved_in(tmp_path)
    for name in ("gone-masklabel.png", "carnival_mask.png"):
        RED.save(tmp_path / name)
    assert [image.name for image in load_folder(tmp_path, "")] == ["carnival_mask.png", "other.png"]
    assert [*folder_advice(tmp_path)] == [
        "Masks without a picture are not used: gone-masklabel.png."
    ]


def test_shades_of_sixteen_bits_in_a_mask_are_shades(tmp_path: Path) -> None:
    """Not white above 255."""
    saved_in(tmp_path)
    shades = np.full((RED.height, RED.width), 100 * 257, np.uint16)
    Image.fromarray(shades).save(tmp_path / "other.mask.png")
    mask = load_folder(tmp_path, "")[0].open().mask
    assert mask is not None and mask.getextrema() == (100, 100)


@pytest.mark.parametrize("name", ["a.avif", "a.jfif", "a.jpe", "a.JPG"])
def test_pictures_that_other_programs_save_are_read(name: str, tmp_path: Path) -> None:
    if name.endswith("avif") and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    path = tmp_path / name
    RED.save(path, None if name.endswith("avif") else "JPEG")
    (image,) = load_folder(tmp_path, "default")
    red, green, blue = image.open().image.getpixel((5, 5))
    assert red > 240 and green < 15 and blue < 15


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    saved_in(tmp_path)
    for name in ("a.heic", "b.HEIC", "c.tga", "d.jp2", "notes.md", ".DS_Store", "other.npz"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "._other.png").write_bytes(b"\0\5\x16\7 of a Mac")
    for inner in ("img/10_cat", "more", "3_cat"):
        (tmp_path / inner).mkdir(parents=True)
        RED.save(tmp_path / inner / "a.png")
    images = load_folder(tmp_path, "default")
    assert [(image.name, image.repeats) for image in images] == [("other.png", 1), ("a.png", 3)]
    kinds, hidden, inside = folder_advice(tmp_path)
    assert kinds.startswith("Not read, because of their kind: 2 .heic, 1 .jp2, 1 .tga. Export")
    assert hidden == "Hidden files are not read: ._other.png."
    place = Path("img") / "10_cat"
    assert inside.startswith(f"2 pictures in folders inside are not read: {place}, more. Move them")


def test_a_folder_without_pictures_says_what_is_there_instead(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(b"x")
    (tmp_path / "more").mkdir()
    RED.save(tmp_path / "more" / "a.png")
    with pytest.raises(DataError) as caught:
        load_folder(tmp_path, "default")
    assert "because of their kind: 1 .heic" in str(caught.value)
    assert "1 pictures in folders inside are not read: more" in str(caught.value)


@pytest.mark.parametrize("white, dtype", [(1.0, "f4"), (255.0, "f4"), (65535, "i4"), (255, "i4")])
def test_wide_shades_are_scaled(white: float, dtype: str, tmp_path: Path) -> None:
    ramp = np.linspace(0, white, 256).astype(dtype)[None].repeat(4, 0)
    opened = saved(Image.fromarray(ramp), tmp_path / "scan.tif").open().image
    shades = np.asarray(opened)[0, :, 0].astype(int)
    assert abs(shades - np.arange(256)).max() <= 1


@pytest.mark.parametrize("shades", [(-1.0, 1.0), (0.0, 1e6), (float("nan"), 1.0)])
def test_shades_that_no_white_is_known_of_are_refused(
    shades: tuple[float, float], tmp_path: Path
) -> None:
    image = Image.fromarray(np.array([shades] * 2, np.float32))
    with pytest.raises(DataError, match=r"scan\.tif cannot be read as a picture \(its shades go"):
        saved(image, tmp_path / "scan.tif").open()


def test_the_same_files_cannot_be_taught_and_be_ordinary(tmp_path: Path) -> None:
    """A link to the folder is the folder."""
    (tmp_path / "set").mkdir()
    saved_in(tmp_path / "set")
    (tmp_path / "link").symlink_to(tmp_path / "set")
    for folder in ("set", "link"):
        with pytest.raises(DataError, match=r"other\.png .* pictures of the concept and as regul"):
            concept(
                images=load_folder(tmp_path / "set", "photo of a <new1> cat"),
                regularization=load_folder(tmp_path / folder, "photo of a cat"),
            )
