"""What watching costs SDXL at 1024 pixels, counted: multiplications of a step, and memory.

All of SDXL's UNet runs on PyTorch's meta device, which computes shapes and no numbers, with the
hook of Watch Attention at each cross-attention and without; both halves of guidance, one picture.
What the hook takes beside its records is measured where it takes most, at the finest level, by what
PyTorch counts. No time is measured: seconds on a device differ from shares of multiplications.
"""

import _pack  # noqa: F401  (puts the pack on the path)
import torch
from _measure import options, write_json
from custom_diffusion.attention.maps import PARTS, AttentionRecorder, WatchedWord, word_shares
from diffusers import UNet2DConditionModel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

SDXL = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816, "use_linear_projection": True,
}  # fmt: skip
CONTEXT, TOKENS, FINEST = 2048, 77, 640


def multiplications(edge: int, words: int) -> tuple[int, AttentionRecorder]:
    """Of a step on latents of this edge, counted in floating-point operations; 0 words: plain."""
    recorder = AttentionRecorder([WatchedWord(f"{n}", [2 + n]) for n in range(max(words, 1))])
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL)
        latents, time = torch.zeros(2, 4, edge, edge), torch.zeros(2)
        context = torch.zeros(2, TOKENS, CONTEXT)
        added = {"text_embeds": torch.zeros(2, 1280), "time_ids": torch.zeros(2, 6)}
    recorder.size, recorder.rows = (edge, edge), [0] if words else []
    for name, module in unet.named_modules():
        if name.endswith(".attn2"):
            module.register_forward_hook(recorder.hook, with_kwargs=True)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(latents, time, context, added_cond_kwargs=added)
    return counter.get_total_flops(), recorder


def hook_bytes(edge: int, words: int) -> int:
    """The most that the hook takes at once at the finest level, in float32."""
    query, key = torch.randn(edge * edge // 4, FINEST), torch.randn(TOKENS, FINEST)
    columns = [[2 + n] for n in range(words)]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        word_shares(query, key, FINEST // 64, columns)
    level = most = 0
    events = seen.profiler.kineto_results.events()
    for event in sorted(
        (each for each in events if each.name() == "[memory]"), key=lambda each: each.start_ns()
    ):
        level += event.nbytes()
        most = max(most, level)
    return most + 2 * query.nbytes  # the row that is chosen of the input, and its query


def main() -> None:
    parser = options(__doc__ or "", threads=1, rounds=1)
    parser.add_argument("--edge", type=int, default=128, help="of the latents: 128 is 1024 pixels")
    parser.add_argument("--watch", type=int, default=4, help="words, 1 to 16")
    arguments = parser.parse_args()
    plain, _ = multiplications(arguments.edge, 0)
    watched, recorder = multiplications(arguments.edge, arguments.watch)
    kept = sum(total.numel() * 4 for total in recorder._sums.values())
    assert kept == PARTS * arguments.watch * 4 * sum(h * w for h, w in recorder._sums)
    taken = hook_bytes(arguments.edge, arguments.watch)
    share = watched / plain - 1
    print(
        f"a step at {arguments.edge} x {arguments.edge}: {plain / 1e12:.2f} Tflop; watching "
        f"{arguments.watch} words adds {share:.2%}"
    )
    print(f"records {kept / 2**20:.1f} MiB, and {taken / 2**20:.0f} MiB while a layer is looked at")
    write_json(arguments.json, {"flop": plain, "more": share, "kept": kept, "taken": taken})


if __name__ == "__main__":
    main()
