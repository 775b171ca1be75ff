"""Encoding regularization captions, where a first merge spends most of its time.

The text encoder is causal, so captions need no padding, and captions of equal length share a batch.
The script also looks at what comes out: features that do not span the text space cannot hold the
model in place.
"""

import _pack  # noqa: F401  (puts the pack on the path)
import torch
from _measure import interleaved, options, write_json
from _models import random_text_encoder
from custom_diffusion.concept.text import TextEncoder, encode_unpadded
from custom_diffusion.merge.captions import DEFAULT_COUNT, regularization_captions

TIMED_CAPTIONS = 200
SIZES = ((768, 12), (1024, 23))
"""Width and layers of the text models of SD 1.x and SD 2.x."""
ROUNDING = 1e-6
"""Singular values below this part of the largest count as zero; float32 rounding leaves 1e-8."""


@torch.no_grad()
def encode_padded(encoder: TextEncoder, captions: list[list[int]]) -> list[torch.Tensor]:
    """One caption at a time, padded to 77 tokens, and cut to its own length afterwards."""
    return [encoder.encode(encoder.pad([ids]))[0, : len(ids)] for ids in captions]


def measure_speed(rounds: int) -> dict[str, float]:
    encoder = random_text_encoder()
    captions = [encoder.tokenize(text) for text in regularization_captions(TIMED_CAPTIONS)]
    pairs = zip(encode_padded(encoder, captions), encode_unpadded(encoder, captions), strict=True)
    difference = max(float((a - b).norm() / a.norm()) for a, b in pairs)
    times = interleaved(
        {
            "padded": lambda: encode_padded(encoder, captions),
            "unpadded": lambda: encode_unpadded(encoder, captions),
        },
        rounds,
    )
    return {
        "captions": TIMED_CAPTIONS,
        "tokens": sum(map(len, captions)),
        "padded_s": times.median("padded"),
        "unpadded_s": times.median("unpadded"),
        "ratio": times.ratio("padded", "unpadded"),
        "largest_relative_difference": difference,
    }


def measure_span(width: int, layers: int) -> dict[str, float]:
    """Rank and condition number of the default captions' features, as a merge stacks them."""
    encoder = random_text_encoder(width, layers)
    captions = [encoder.tokenize(text) for text in regularization_captions()]
    features = torch.cat([encoded[1:] for encoded in encode_unpadded(encoder, captions)]).double()
    singular = torch.linalg.svdvals(torch.linalg.qr(features, mode="r").R)
    return {
        "width": width,
        "rows": len(features),
        "rank": int((singular > ROUNDING * singular[0]).sum()),
        "condition": float(singular[0] / singular[-1]),
    }


def main() -> None:
    parser = options(__doc__ or "", threads=1, rounds=3)
    parser.add_argument("--wide", action="store_true", help="look at SD 2's width of 1024, too")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    speed = measure_speed(given.rounds)
    print(f"{TIMED_CAPTIONS} captions, {speed['tokens']:.0f} tokens, CLIP-L")
    print(f"  padded to 77, one by one       {speed['padded_s']:7.2f} s")
    print(f"  unpadded, in batches by length {speed['unpadded_s']:7.2f} s")
    print(
        f"  ratio {speed['ratio']:.1f}; largest relative difference of a caption's features "
        f"{speed['largest_relative_difference']:.1e}"
    )
    spans = [measure_span(width, layers) for width, layers in SIZES[: 2 if given.wide else 1]]
    for span in spans:
        print(
            f"{DEFAULT_COUNT} default captions: {span['rows']} rows, rank {span['rank']} of "
            f"{span['width']}, condition {span['condition']:.3g}"
        )
    write_json(given.json, {"speed": speed, "span": spans})


if __name__ == "__main__":
    main()
