"""What watching costs at SDXL's shape, from its transformer blocks alone.

All of SDXL in a step at 1024 pixels is too slow for a small CPU. Its cross-attention lies in 70
transformer blocks of two shapes, which are timed here as ComfyUI runs them, with the hook of Watch
Attention and without, on both halves of guidance. The network's convolutions are counted as
nothing, so the share that comes out is more than that of a step. COMFYUI_PATH is ComfyUI's folder.
"""

import os
import sys
from typing import Any

import _pack  # noqa: F401  (puts the pack on the path)
import torch
from _measure import interleaved, options, write_json
from custom_diffusion.attention.maps import PARTS, AttentionRecorder, WatchedWord
from torch.profiler import ProfilerActivity, profile

sys.path.append(os.environ["COMFYUI_PATH"])
BLOCKS = {640: (10, 2), 1280: (60, 4)}
"""Channels → how many blocks, and how much smaller than the latents their level is"""
HEAD, CONTEXT, TOKENS = 64, 2048, 77


def block(channels: int) -> Any:
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.ops
    from comfy.ldm.modules.attention import BasicTransformerBlock

    made = BasicTransformerBlock(
        channels,
        channels // HEAD,
        HEAD,
        context_dim=CONTEXT,
        dtype=torch.float32,
        device="cpu",
        operations=comfy.ops.disable_weight_init,
    )
    for weight in made.parameters():
        weight.data.normal_(0, 0.01)
    return made.requires_grad_(False)


def peak_bytes(run: Any) -> int:
    """The most that is taken and not given back at once, by what PyTorch counts."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    level = most = 0
    events = seen.profiler.kineto_results.events()
    for event in sorted(
        (e for e in events if e.name() == "[memory]"), key=lambda event: event.start_ns()
    ):
        level += event.nbytes()
        most = max(most, level)
    return most


def main() -> None:
    parser = options(__doc__ or "", threads=1, rounds=7)
    parser.add_argument("--edge", type=int, default=128, help="of the latents: 128 is 1024 pixels")
    parser.add_argument("--watch", type=int, default=4, help="words, 1 to 16")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    words = [WatchedWord(f"{n}", [2 + n]) for n in range(arguments.watch)]
    plain = watched = 0.0
    kept = 0
    for channels, (count, smaller) in BLOCKS.items():
        recorder, edge = AttentionRecorder(words), arguments.edge // smaller
        recorder.size = (arguments.edge, arguments.edge)
        recorder.rows = [0]
        without, hooked = block(channels), block(channels)
        hooked.attn2.register_forward_hook(recorder.hook, with_kwargs=True)
        x, context = torch.randn(2, edge * edge, channels), torch.randn(2, TOKENS, CONTEXT)

        def run(which: Any, x: Any = x, context: Any = context) -> Any:
            with torch.inference_mode():
                return which(x.clone(), context=context)

        turns = {"without": lambda b=without: run(b), "with": lambda b=hooked: run(b)}
        times = interleaved(turns, arguments.rounds)
        more = times.ratio("with", "without") - 1
        plain += count * times.median("without")
        watched += count * times.median("without") * more
        kept += PARTS * arguments.watch * edge * edge * 4
        peaks = {name: peak_bytes(turn) / 2**20 for name, turn in turns.items()}
        print(
            f"{count} blocks of {channels}: {times.median('without'):.3f} s, watched {more:+.2%}, "
            f"n = {arguments.rounds}; peak {peaks['without']:.0f} and {peaks['with']:.0f} MiB"
        )
    share = watched / plain
    print(
        f"watching {arguments.watch} words costs {share:+.2%} of the transformer blocks at "
        f"{arguments.edge} x {arguments.edge}; records take {kept / 2**20:.1f} MiB a picture"
    )
    write_json(arguments.json, {"edge": arguments.edge, "words": arguments.watch, "more": share})


if __name__ == "__main__":
    main()
