"""Settings that few trainings need: as they are, they change nothing. Nodes have them apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..diffusion.latents import LATENT_PIXELS
from .settings import setting

Schedule = Literal["constant", "cosine"]
CaptionChoice = Literal["first", "any"]
LossWeighting = Literal["none", "min-snr", "debiased"]


@dataclass(frozen=True)
class TrainOptions:
    """Part of `TrainConfig`, which checks them."""

    card_gb: int = setting(
        0,
        "Memory of the graphics card in GB, as 8. What makes the training fit it is chosen for you "
        "and said; 0 chooses nothing.",
        "options",
        least=0,
        most=1024,
    )
    more_resolutions: str = setting(
        "",
        "Further sizes to train at, as '384, 640'. Leave it empty, unless you will draw at "
        "very different sizes.",
        "options",
    )
    preview_seeds: str = setting(
        "",
        "Seeds of the samples, as '1, 2, 3': a row of pictures for each. Leave it empty for the "
        "seed of the training.",
        "options",
    )
    preview_resolution: int = setting(
        0,
        "Width and height of the samples. 0 is the resolution of the training; a smaller one is "
        "drawn faster.",
        "options",
        least=0,
        most=2048,
        step=LATENT_PIXELS,
    )
    seg_mix: float = setting(
        0.0,
        "How often the subjects of two concepts are pasted into one picture, whose caption says "
        "both. It needs pictures with masks. Set 0.3 when two concepts that are trained together "
        "take each other's looks.",
        "options",
        least=0,
        most=1,
        step=0.05,
    )
    seg_mix_smallest: float = setting(
        0.75,
        "Smallest size of a pasted subject; 1 fills its half of the picture.",
        "options",
        least=0.1,
        most=1,
        step=0.05,
    )
    seg_mix_largest: float = setting(
        1.0,
        "Largest size of a pasted subject; 1 fills its half of the picture.",
        "options",
        least=0.1,
        most=1,
        step=0.05,
    )
    basis: int = setting(
        0,
        "Method low-rank: trains in one of many fixed bases that do not overlap, so that concepts "
        "add up better. Give each concept of the same rank another number; 0 trains as usual.",
        "options",
        least=0,
        most=2560,
    )
    word_steps: int = setting(
        0,
        "For so many first steps only the trigger word learns, as in textual inversion; then the "
        "rest starts from there. Set word_learning_rate too: 100 steps at 0.0005 to try. 0 starts "
        "with everything.",
        "options",
        least=0,
        most=10_000,
    )
    attention_weight: float = setting(
        0.0,
        "How strongly the trigger word and its class noun are kept from looking beside the masks "
        "of the pictures. It needs masks, more memory and longer steps. Try 0.01.",
        "options",
        least=0,
        most=10,
        step=0.005,
    )
    word_learning_rate: float = setting(
        0.0,
        "How much each step changes the trigger word; 0 takes learning_rate. Raise it if the word "
        "means too little and all else is learnt.",
        "options",
        least=0,
        most=0.1,
        step=1e-6,
    )
    schedule: Schedule = setting(
        "constant",
        "How the learning rate goes. cosine falls to nothing at the last step: calmer ends, but a "
        "training with more steps is another training.",
        "options",
    )
    warmup_steps: int = setting(
        0,
        "For how many steps the learning rate grows to its full size. Set about a tenth of the "
        "steps if the first ones do damage.",
        "options",
        least=0,
        most=10_000,
    )
    loss_weighting: LossWeighting = setting(
        "none",
        "How much each amount of noise counts. min-snr lets little noise count less, which learns "
        "faster in few steps; debiased lets much noise count more, which helps layout and colours.",
        "options",
    )
    min_snr_gamma: float = setting(
        5.0,
        "Where min-snr begins: lower lets little noise count less still.",
        "options",
        least=0.1,
        most=100,
        step=0.5,
    )
    noise_offset: float = setting(
        0.0,
        "Moves the brightness of the noise, too. Try 0.05 if very dark or bright pictures are not "
        "learnt.",
        "options",
        least=0,
        most=1,
        step=0.01,
    )
    min_timestep: int = setting(
        0,
        "The least noise that is trained on: 0 to 999. Raise it to leave out fine detail.",
        "options",
        least=0,
        most=999,
    )
    max_timestep: int = setting(
        999,
        "The most noise that is trained on: 0 to 999. Lower it to leave out layout.",
        "options",
        least=0,
        most=999,
    )
    max_gradient_norm: float = setting(
        1.0,
        "Gradients of a step are scaled down to this norm. Lower it if the loss jumps; 0 leaves "
        "them as they are.",
        "options",
        least=0,
        most=1000,
        step=0.1,
    )
    caption_lines: CaptionChoice = setting(
        "first",
        "Which line of a caption file is used: the first, or any, another one each time.",
        "options",
    )
    shuffle_captions: bool = setting(
        False,
        "Puts the parts of a caption between its commas into another order each time. For captions "
        "that are lists of tags.",
        "options",
    )
    keep_parts: int = setting(
        1,
        "How many parts stay at the start with shuffle_captions: those with the trigger word.",
        "options",
        least=0,
        most=20,
    )
    caption_dropout: float = setting(
        0.0,
        "How often a picture is shown without any caption. Only where every word trains "
        "(gradient_cut).",
        "options",
        least=0,
        most=1,
        step=0.05,
    )
    plain_captions: float = setting(
        0.0,
        "How often a caption is replaced by 'photo of a <new1> cat'. Try 0.2 if long captions "
        "leave the trigger word too little to mean.",
        "options",
        least=0,
        most=1,
        step=0.05,
    )
    class_prior: float = setting(
        0.0,
        "Holds the class without the trigger word to what the model draws anyway, without any "
        "regularization pictures. A step takes more than twice as long. Only where every word "
        "trains (gradient_cut). 1 is as regularization pictures.",
        "options",
        least=0,
        most=10,
        step=0.1,
    )
