"""How far the figures of an evaluation are from reference implementations: the largest difference.

KID and FID against torchmetrics, in float64 on features of random sets of several sizes; CLIP-T and
CLIP-I against transformers' CLIPModel with its own preparation of pictures and random
weights. Needs the packages of the tests.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import _pack  # noqa: F401  (puts the pack on the path)
import numpy as np
import torch
from _measure import options, write_json
from custom_diffusion.evaluation.alignment import image_alignment, text_alignment
from custom_diffusion.evaluation.distances import Moments, frechet_distance, kernel_distance
from custom_diffusion.evaluation.features import picture_features, text_features
from custom_diffusion.host.judges import read_judge
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from support.judges import clip_processor, write_clip
from support.tiny_models import clip_tokenizer

WIDTH = 48
COUNTS = ((300, 200), (60, 60), (20, 100), (5, 4))
TEXTS = ("a cat", "photo of a dog on the beach, with a red ball", "a watercolour of a mug", "snow")


class Flat(torch.nn.Module):
    """Gives pictures that are features already back as they are."""

    num_features = WIDTH

    def forward(self, pictures: Any) -> Any:
        return pictures.flatten(1)


def sets(seed: int, counts: tuple[int, int]) -> list[Any]:
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(WIDTH, WIDTH, generator=draw, dtype=torch.float64) / WIDTH**0.5
    return [
        torch.randn(count, WIDTH, generator=draw, dtype=torch.float64) @ mixing + 0.3 * n
        for n, count in enumerate(counts)
    ]


def distances(rounds: int) -> dict[str, float]:
    """Largest relative difference over all sizes and seeds."""
    worst = {"KID": 0.0, "FID": 0.0}
    for seed in range(rounds):
        for counts in COUNTS:
            x, y = sets(seed, counts)
            fid = FrechetInceptionDistance(feature=Flat(), input_img_size=(WIDTH, 1, 1))
            pairs = {"FID": (fid, frechet_distance(Moments.of([x]), Moments.of([y])))}
            if counts[0] == counts[1]:  # torchmetrics' subsets are of one size
                kid = KernelInceptionDistance(feature=Flat(), subsets=1, subset_size=counts[0])
                pairs["KID"] = (kid, kernel_distance(x, y))
            for name, (reference, ours) in pairs.items():
                reference.set_dtype(torch.float64)
                for features, real in ((y, True), (x, False)):
                    reference.update(features[:, :, None, None], real=real)
                found = reference.compute()
                theirs = float(found[0] if isinstance(found, tuple) else found)
                worst[name] = max(worst[name], abs(ours - theirs) / abs(theirs))
    return worst


@torch.no_grad()
def alignments(rounds: int) -> dict[str, float]:
    """Largest difference of a picture's CLIP-T and CLIP-I over all rounds."""
    worst = {"CLIP-T": 0.0, "CLIP-I": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        model = write_clip(Path(folder), edge=224)
        judge = read_judge(Path(folder))
        tokens = clip_tokenizer()(list(TEXTS), padding=True, return_tensors="pt")
        read = _unit(model.get_text_features(**tokens))
        for seed in range(rounds):
            drawn, mine = photographs(2 * seed), photographs(2 * seed + 1)
            seen, known = (
                _unit(model.get_image_features(**clip_processor(224)(p, return_tensors="pt")))
                for p in (drawn, mine)
            )
            ours, references = (picture_features(judge, p) for p in (drawn, mine))
            texts = text_features(judge, TEXTS, ours.shape[1])
            theirs = 2.5 * (seen * read).sum(-1).clamp(min=0)
            gap = (text_alignment(ours, texts) - theirs).abs().max()
            worst["CLIP-T"] = max(worst["CLIP-T"], float(gap))
            gap = (image_alignment(ours, references) - (seen @ known.T).mean(1)).abs().max()
            worst["CLIP-I"] = max(worst["CLIP-I"], float(gap))
    return worst


def photographs(seed: int) -> list[Image.Image]:
    """Four of different sizes, with large shapes and some grain."""
    draw = np.random.default_rng(seed)
    found = []
    for width, height in ((512, 512), (640, 427), (300, 420), (224, 224)):
        coarse = Image.fromarray(draw.integers(0, 255, (7, 9, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        grain = smooth + draw.normal(0, 6, smooth.shape)
        found.append(Image.fromarray(grain.clip(0, 255).astype(np.uint8)))
    return found


def _unit(found: Any) -> Any:
    features = found if isinstance(found, torch.Tensor) else found.pooler_output
    return features / features.norm(dim=-1, keepdim=True)


def main() -> None:
    arguments = options(__doc__ or "", threads=1, rounds=5).parse_args()
    torch.set_num_threads(arguments.threads)
    relative, absolute = distances(arguments.rounds), alignments(arguments.rounds)
    for name, value in relative.items():
        print(f"{name} against torchmetrics: at most {value:.1e} relative")
    for name, value in absolute.items():
        print(f"{name} against transformers' CLIPModel: at most {value:.1e}")
    write_json(arguments.json, {"relative": relative, "absolute": absolute})


if __name__ == "__main__":
    main()
