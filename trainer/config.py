"""Settings of a training run, checked when they are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..concept.errors import ConfigError
from ..diffusion.latents import LATENT_PIXELS
from .options import TrainOptions
from .settings import Setting, setting, settings_of

MethodName = Literal[
    "custom diffusion",
    "values only",
    "low-rank",
    "cross-attention",
    "textual inversion",
    "dreambooth",
    "fine-tune all",
]
"""What learns: `trainer/methods/` has a file for each."""
OptimizerName = Literal["adamw", "adamw 8-bit", "prodigy", "adamw schedule-free"]
GradientCut = Literal["none", "start", "start and padding", "own words"]
Framing = Literal["buckets", "crop", "letterbox"]
EarlyStopping = Literal["off", "suggested", "on"]


@dataclass(frozen=True)
class TrainConfig(TrainOptions):
    """Custom Diffusion's recipe: 250 steps of 8 images at a learning rate of 8e-5.

    `trainer.methods.recipe` has those of other methods. A field is all that a new setting needs:
    the check, the Train node's input and the command's option are made from it. What every node
    with that input says of it has to be translated in locales/.
    """

    # The node's choice of a method has inputs of its own: made in nodes/ and cli/ from METHODS.
    method: MethodName = setting("custom diffusion", "What learns.", None)
    steps: int = setting(
        250,
        "How long to train. Raise it if the concept is not learnt; lower it if every picture looks "
        "like the training pictures.",
        "method",
        least=1,
        most=100_000,
    )
    # For keys, values and modifier token alike: the reference's 1e-5 times 8 images.
    learning_rate: float = setting(
        8e-5,
        "How much each step changes. The default suits 8 pictures per step; halve it and train "
        "longer for faces, or if results look distorted.",
        "method",
        least=1e-7,
        most=0.1,
        step=1e-6,
    )
    rank: int = setting(
        16,
        "Size of the low-rank factors. Raise it to learn more detail, in a larger file.",
        "method",
        method="low-rank",
        least=1,
        most=320,
    )
    batch_size: int = setting(
        8,
        "Pictures per step, half of them regularization pictures if there are any. If memory runs "
        "out, lower micro_batch_size instead: the result stays the same.",
        "run",
        least=1,
        most=256,
    )
    resolution: int = setting(
        512,
        "Size of the training pictures: 512 for SD 1.x and 2.x base, 768 for SD 2.1 768, 1024 for "
        "SDXL.",
        "run",
        least=LATENT_PIXELS * 8,
        most=2048,
        step=LATENT_PIXELS,
    )
    # Data order, views, noise, timesteps and previews.
    seed: int = setting(
        0,
        "Controls everything random. Change it for another result from the same pictures.",
        "run",
        least=0,
        most=2**63 - 1,
    )
    augment: bool = setting(
        True,
        "Shows the subject at random sizes, with words for them in the captions, as in the paper. "
        "Turn it off only if size and framing are part of the concept.",
        "views",
    )
    flip: bool = setting(
        True, "Mirrors half of the pictures. Turn it off for writing, logos and faces.", "views"
    )
    fit: Framing = setting(
        "buckets",
        "For pictures that are not square. buckets keeps their shape; crop cuts out the middle "
        "square; letterbox keeps all of the picture in a square, between grey bars that are not "
        "learnt.",
        "views",
    )
    prior_weight: float = setting(
        1.0,
        "How much the regularization pictures count. Raise it if ordinary pictures of the class "
        "start to look like yours.",
        "advanced",
        least=0,
        most=10,
        step=0.1,
    )
    # "own words": they change there alone, in the forward pass too (docs/fidelity.md has what that
    # brings); the others cut gradients only. Methods that teach more than keys and values take
    # "start and padding" for it.
    gradient_cut: GradientCut = setting(
        "own words",
        "Which words of the prompt train. Keep own words: only the trigger word and its class "
        "noun, so that concepts combine well. The others train every word except the start token "
        "(start, as in the paper), the start token and padding (start and padding), or nothing "
        "(none).",
        "advanced",
    )
    micro_batch_size: int = setting(
        0,
        "How many pictures of the batch are computed at once; 0 means all. It is lowered "
        "automatically when memory runs out, and the result stays the same.",
        "advanced",
        least=0,
        most=256,
    )
    gradient_checkpointing: bool = setting(
        False,
        "Saves memory and takes longer. It is turned on automatically when even one picture at a "
        "time does not fit.",
        "advanced",
    )
    preview_every_steps: int = setting(
        50,
        "How often a sample of '<new1> cat' is drawn, in steps. 0 draws none and trains faster.",
        "advanced",
        least=0,
        most=10_000,
    )
    optimizer: OptimizerName = setting(
        "adamw",
        "adamw 8-bit needs a quarter of the memory for the optimizer's state. Use it if memory is "
        "short; it needs the Python package bitsandbytes. prodigy finds its rate itself and leaves "
        "learning_rate aside (package prodigyopt). adamw schedule-free averages, so it needs no "
        "schedule (package schedulefree).",
        "added",
    )
    text_encoder_on_cpu: bool = setting(
        False,
        "Keeps the text encoders in main memory: less GPU memory, slower steps. Turn it on for "
        "SDXL on a small GPU.",
        "added",
    )
    weight_decay: float = setting(
        1e-2,
        "Pulls what is trained back towards zero at every step. Leave it; raise it a little if the "
        "training pictures are learnt by heart.",
        "added",
        least=0,
        most=10,
        step=0.001,
    )
    preview_prompts: str = setting(
        "",
        "What the samples show, one prompt per line, drawn side by side. Leave it empty for 'photo "
        "of a <new1> cat'.",
        "added",
    )
    # Whole pictures: a view of a picture that trains says how well the picture is remembered. None
    # by default, because of four or five pictures one is much to go without.
    validation_pictures: int = setting(
        0,
        "How many pictures of each concept are kept back from training, to measure what is learnt "
        "on pictures it has not seen. 0 measures nothing. With 8 pictures or more, set 1 or 2 to "
        "see when to stop.",
        "added",
        least=0,
        most=64,
    )
    validation_every_steps: int = setting(
        50,
        "How often the loss on the pictures kept back is measured, in steps. Use the same number "
        "as checkpoint_every_steps, so that every measured step can be kept.",
        "added",
        least=1,
        most=10_000,
    )
    early_stopping: EarlyStopping = setting(
        "suggested",
        "What happens when the validation loss no longer falls. suggested tells you; on stops the "
        "training and keeps the step where it was lowest; off does nothing. It needs "
        "validation_pictures.",
        "added",
    )
    patience_steps: int = setting(
        100,
        "For how many steps the validation loss may stay flat or rise before early_stopping acts. "
        "Raise it if trainings end too soon.",
        "added",
        least=1,
        most=100_000,
    )
    views_per_image: int = setting(
        16, "Augmented views of each picture that are encoded before training.", None, least=1
    )

    def __post_init__(self) -> None:
        for name, known in SETTINGS.items():
            known.check(getattr(self, name))
        _ = self.resolutions, self.sample_seeds  # raise for what is none

    @property
    def resolutions(self) -> tuple[int, ...]:
        """All that it trains at, the first one first. Raises ConfigError for what is no size."""
        known = SETTINGS["resolution"]
        more = _numbers("more_resolutions", self.more_resolutions)
        for edge in more:
            known.check(edge)
        return tuple(dict.fromkeys([self.resolution, *more]))

    @property
    def sample_seeds(self) -> tuple[int, ...]:
        """Of each row of a sample. Raises ConfigError for what is no seed."""
        seeds = _numbers("preview_seeds", self.preview_seeds)
        for seed in seeds:
            SETTINGS["seed"].check(seed)
        return tuple(seeds) or (self.seed,)

    @property
    def ends_early(self) -> str:
        """What may end a run before its steps are done; empty where nothing does."""
        stops = self.validation_pictures and self.early_stopping == "on"
        return f"flat for {self.patience_steps} steps" if stops else ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def _numbers(name: str, text: str) -> list[int]:
    """Of a setting that lists them. Raises ConfigError for anything else."""
    words = text.replace(",", " ").split()
    if wrong := [word for word in words if not (word.isascii() and word.isdecimal())]:
        raise ConfigError(
            f"{name}={text!r} has {wrong[0]!r}, which is no whole number. Write numbers with "
            f"commas between them."
        )
    return [int(word) for word in words]


SETTINGS: Mapping[str, Setting] = settings_of(TrainConfig)
