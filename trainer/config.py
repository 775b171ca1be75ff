"""Settings of a training run, checked when they are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..diffusion.latents import LATENT_PIXELS
from .settings import Setting, setting, settings_of

MethodName = Literal[
    "custom diffusion",
    "low-rank",
    "cross-attention",
    "textual inversion",
    "dreambooth",
    "fine-tune all",
]
"""What learns: `trainer/methods/` has a file for each."""
OptimizerName = Literal["adamw", "adamw 8-bit"]
GradientCut = Literal["none", "start", "start and padding", "own words"]
Fit = Literal["crop", "letterbox"]


@dataclass(frozen=True)
class TrainConfig:
    """Custom Diffusion's recipe: 250 steps of 8 images at a learning rate of 8e-5.

    `trainer.methods.recipe` has those of other methods. A field is all that a new setting needs:
    the check, the Train node's input and the command's option are made from it. What every node
    with that input says of it has to be translated in locales/.
    """

    # The node's choice of a method has inputs of its own: made in nodes/ and cli/ from METHODS.
    method: MethodName = setting("custom diffusion", "What learns.", None)
    steps: int = setting(250, "How many steps the training takes.", "method", least=1, most=100_000)
    # For keys, values and modifier token alike: the reference's 1e-5 times 8 images.
    learning_rate: float = setting(
        8e-5,
        "How much a step changes. The method's own rate is for 8 pictures a step.",
        "method",
        least=1e-7,
        most=0.1,
        step=1e-6,
    )
    rank: int = setting(
        16,
        "Size of the low-rank factors: larger ones hold more, in a larger file.",
        "method",
        method="low-rank",
        least=1,
        most=320,
    )
    batch_size: int = setting(
        8,
        "Pictures a step; half of them regularization, when there are any.",
        "run",
        least=1,
        most=256,
    )
    resolution: int = setting(
        512,
        "512 for SD 1.x and 2.x base, 768 for SD 2.1 768, 1024 for SDXL.",
        "run",
        least=LATENT_PIXELS * 8,
        most=2048,
        step=LATENT_PIXELS,
    )
    # Data order, views, noise, timesteps and previews.
    seed: int = setting(
        0, "Of everything random: another seed, another run.", "run", least=0, most=2**63 - 1
    )
    augment: bool = setting(True, "Random sizes with words that say so, as in the paper.", "views")
    flip: bool = setting(True, "Mirror half of the pictures. Off for writing and faces.", "views")
    fit: Fit = setting(
        "crop",
        "Pictures that are not square: crop to the middle, or letterbox: all of them, between grey "
        "bars that do not count.",
        "views",
    )
    prior_weight: float = setting(
        1.0,
        "Weight of the regularization pictures.",
        "advanced",
        least=0,
        most=10,
        step=0.1,
        on_command=False,
    )
    # "own words": they change there alone, in the forward pass too (docs/fidelity.md has what that
    # brings); the others cut gradients only. Methods that teach more than keys and values take
    # "start and padding" for it.
    gradient_cut: GradientCut = setting(
        "own words",
        "Where keys and values learn. own words: at the new word and its class noun alone, so that "
        "concepts combine well and need no regularization. The others leave out: the start of the "
        "prompt as in the paper's code; its padding too; or nothing.",
        "advanced",
    )
    micro_batch_size: int = setting(
        0,
        "Pictures computed at once, a part of the batch; 0 is all of it. It becomes less by itself "
        "when memory runs out.",
        "advanced",
        least=0,
        most=256,
    )
    gradient_checkpointing: bool = setting(
        False,
        "Needs less memory and more time. It is turned on by itself when one picture at once is "
        "still too much.",
        "advanced",
    )
    preview_every_steps: int = setting(
        50,
        "A picture of '<new1> cat' is drawn this often; 0 draws none.",
        "advanced",
        least=0,
        most=10_000,
        on_command=False,
    )
    optimizer: OptimizerName = setting(
        "adamw",
        "8-bit: the optimiser's state in a quarter of the memory. It needs the Python package "
        "bitsandbytes.",
        "added",
    )
    text_encoder_on_cpu: bool = setting(
        False,
        "Leaves the text encoders in main memory: less GPU memory, slower steps. For SDXL on small "
        "GPUs.",
        "added",
    )
    weight_decay: float = setting(1e-2, "Of AdamW.", None, least=0)
    max_gradient_norm: float | None = setting(
        1.0, "Gradients are scaled down to this norm; None leaves them.", None, least=1e-12
    )
    views_per_image: int = setting(
        16, "Augmented views of each picture that are encoded before training.", None, least=1
    )

    def __post_init__(self) -> None:
        for name, known in SETTINGS.items():
            known.check(getattr(self, name))

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


SETTINGS: Mapping[str, Setting] = settings_of(TrainConfig)
