"""Regularization captions: what a merged model must keep doing as the base model does.

The reference uses captions of a web data set. Ours come from a small grammar, so that they can be
shipped, repeated and read; `read_captions` takes the user's own file instead.
"""

import os
import random
from pathlib import Path

from ..concept.errors import DataError
from ..concept.regular_files import read_regular

DEFAULT_COUNT = 1200
MINIMUM_COUNT = 20
MOST_BYTES = 16_000_000

_SUBJECTS = """
cat dog horse cow sheep elephant giraffe zebra bear fox rabbit squirrel owl eagle parrot duck swan
goldfish shark whale turtle frog butterfly bee spider man woman boy girl baby family couple crowd
farmer doctor teacher soldier dancer musician painter chef fisherman cyclist runner skier surfer
king queen knight wizard robot astronaut car truck bus train tram bicycle motorcycle airplane
helicopter boat ship canoe tractor house cottage castle tower bridge church temple barn lighthouse
skyscraper station stadium market library museum kitchen bedroom bathroom office classroom garage
garden street alley square harbour beach island river lake waterfall forest jungle desert mountain
valley volcano glacier field meadow vineyard sky cloud rainbow moon sunset tree flower rose
sunflower cactus mushroom apple banana orange lemon strawberry grape tomato carrot pumpkin bread
cake pizza burger sandwich soup salad sushi cheese egg coffee tea wine cup mug plate bowl spoon
knife bottle vase lamp candle clock mirror chair sofa table bed desk bookshelf book newspaper letter
map camera telephone laptop television guitar piano violin drum trumpet hat coat dress shoe boot
glove scarf umbrella backpack suitcase watch ring necklace crown glasses ball kite doll teddybear
toy puzzle chessboard helmet sword shield flag statue fountain painting mosaic carpet
curtain window door stairs roof fence gate bench tent barrel basket box rope wheel anchor compass
""".split()

_ADJECTIVES = """
red orange yellow green blue purple pink brown black white grey golden silver wooden metal glass
plastic stone paper leather woollen old new young ancient modern broken shiny dusty rusty wet dry
clean dirty big small tiny huge tall short long round square thin thick heavy happy sad angry sleepy
hungry lonely friendly famous empty full striped spotted colourful transparent frozen burning
floating abandoned decorated expensive cheap soft fluffy """.split()

_ACTIONS = """
sitting standing running walking jumping sleeping eating drinking swimming flying dancing singing
reading writing cooking waiting hiding falling climbing resting playing working smiling looking
lying leaning turning shining """.split()

_PLACES = (
    "on a table; in a field; on the beach; in the snow; under a tree; near a river; in the city; "
    "on a mountain; in a kitchen; beside a window; on the grass; in the rain; at night; in the "
    "morning; on a wooden floor; in front of a house; behind a fence; on the road; in a forest; "
    "under the bridge; at the market; in space; on a shelf; in a basket; next to a fire; above "
    "the clouds; in shallow water; on a rooftop; inside a museum; against a white wall; in a dark "
    "room; in the desert; by the sea; at sunset; in the fog; during a storm"
).split("; ")

_MEDIA = (
    "a photo of; a close up of; a painting of; a drawing of; a sketch of; a black and white "
    "photograph of; a watercolor of; an oil painting of; a portrait of; a blurry picture of; an "
    "aerial view of; a cartoon of; a sculpture of; a poster of; a render of; a stamp with; a "
    "tattoo of; a postcard of; an illustration of"
).split("; ")

_STYLES = (
    "impressionism; cubism; pop art; pixel art; art nouveau; surrealism; minimalism; baroque; "
    "ukiyo-e; low poly; film noir; studio lighting; soft focus; high contrast; vivid colors; "
    "pastel tones; golden hour; highly detailed; wide angle; macro; vintage; cinematic; "
    "symmetrical; trending"
).split("; ")

_NUMBERS = "two three four five six several many".split()


def regularization_captions(count: int = DEFAULT_COUNT, seed: int = 0) -> list[str]:
    """`count` different captions of everyday scenes, the same for the same seed."""
    rng = random.Random(seed)
    captions: dict[str, None] = {}
    while len(captions) < count:
        captions[_caption(rng)] = None
    return list(captions)


def read_captions(path: str | Path) -> list[str]:
    """One caption a line from a UTF-8 text file; empty lines are skipped."""
    path = Path(path)
    if not os.path.lexists(path):
        raise DataError(
            f"There is no caption file {path}. Give a text file with one caption a line, or none "
            "for ours."
        )
    try:
        lines = read_regular(path, MOST_BYTES).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path.name} is not a UTF-8 text file ({error.reason}). Save it as UTF-8 text."
        ) from error
    except OSError as error:
        raise DataError(
            f"The caption file {path} cannot be read ({error.strerror}). Give a text file with one "
            "caption a line, or none for ours."
        ) from error
    captions = [line.strip() for line in lines if line.strip()]
    if len(captions) < MINIMUM_COUNT:
        raise DataError(
            f"{path.name} holds {len(captions)} captions; at least {MINIMUM_COUNT} are needed, "
            "about 1000 are good. Add more lines, or leave the file out to use ours."
        )
    return captions


def _caption(rng: random.Random) -> str:
    shape = rng.randrange(6)
    if shape == 0:
        return f"{rng.choice(_MEDIA)} {_thing(rng)} {rng.choice(_PLACES)}"
    if shape == 1:
        return f"{_thing(rng)} {rng.choice(_ACTIONS)} {rng.choice(_PLACES)}"
    if shape == 2:
        return f"{_thing(rng)} and {_thing(rng)}, {rng.choice(_STYLES)}"
    if shape == 3:
        return f"{rng.choice(_MEDIA)} {_thing(rng)} with {_thing(rng)}"
    if shape == 4:
        things = f"{rng.choice(_NUMBERS)} {rng.choice(_ADJECTIVES)} things"
        return f"{things} and {_thing(rng)} {rng.choice(_PLACES)}"
    style = f"{rng.choice(_STYLES)}, {rng.choice(_STYLES)}"
    return f"{rng.choice(_SUBJECTS)}, {rng.choice(_ADJECTIVES)}, {style}"


def _thing(rng: random.Random) -> str:
    subject = rng.choice(_SUBJECTS)
    words = f"{rng.choice(_ADJECTIVES)} {subject}" if rng.random() < 0.7 else subject
    article = rng.choice(("the", "an" if words[0] in "aeiou" else "a"))
    return f"{article} {words}"
