"""A step of ours beside a step of diffusers' Custom Diffusion script, on the same UNet shapes.

The other side is the training step of that script, written here after its published behaviour, with
diffusers' own attention processors for it: every projection by itself, the whole table of words in
AdamW, all rows but the new one's gradient set to zero. A step has two pictures of the concept and
two of the class, as in the command that the script comes with. Like for like, both get latents and
compute in the same type; in bfloat16 the script casts the text encoder as well. As shipped, it
computes in float32 and encodes every picture at every step.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import _pack  # noqa: F401  (puts the pack on the path)
import torch
import torch.nn.functional as F
from _measure import Times, interleaved, options, peak_memory_gib, write_json
from _models import VOCABULARY, random_text_model, random_unet, random_vae
from custom_diffusion.diffusion.latents import LATENT_PIXELS
from custom_diffusion.trainer.config import TrainConfig
from custom_diffusion.trainer.learning.optimizer import make_optimizer
from diffusers import DDPMScheduler
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0
from torch import nn
from training_step import CAPTIONS, WARM_UP, Bench

TOKEN_ID = VOCABULARY - 3
"""The row of the table that stands for the new word: the last two mark start and end."""
BATCH = 2 * len(CAPTIONS)
"""As many pictures of the class as of the concept"""


class DiffusersScript:
    """The script's step; `vae` encodes the pictures at every step, if that is asked for."""

    def __init__(self, dtype: torch.dtype, edge: int, vae: nn.Module) -> None:
        self._unet = random_unet(dtype)
        self._dtype, self._vae = dtype, vae
        self._text_model = random_text_model().to(dtype)
        self._scheduler = DDPMScheduler()
        self._unet.set_attn_processor(_processors(self._unet))
        self._table = self._text_model.get_input_embeddings().weight.requires_grad_(True)
        trained = [p for p in self._unet.parameters() if p.requires_grad]
        self._parameters = [*trained, self._table]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=8e-5, weight_decay=1e-2)
        self._latents = torch.randn(BATCH, 4, edge, edge)
        self._images = torch.rand(BATCH, 3, edge * LATENT_PIXELS, edge * LATENT_PIXELS) * 2 - 1
        self._ids = torch.randint(0, TOKEN_ID, (BATCH, 77))
        self._ids[: BATCH // 2, 4] = TOKEN_ID
        self._other_rows = torch.arange(VOCABULARY) != TOKEN_ID

    def steps(self, count: int, encode: bool = False) -> list[float]:
        """Seconds of each step after the first."""
        ends = []
        for _ in range(count):
            self._step(encode)
            ends.append(time.perf_counter())
        return [end - start for start, end in pairwise(ends)]

    def _step(self, encode: bool) -> None:
        latents = self._latents
        if encode:
            with torch.no_grad():
                latents = self._vae.encode(self._images).latent_dist.sample() * 0.18215
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (BATCH,))
        noisy = self._scheduler.add_noise(latents, noise, timesteps)
        context = self._text_model(self._ids)[0]
        out = self._unet(noisy.to(self._dtype), timesteps, context.to(self._dtype)).sample
        errors = F.mse_loss(out.float(), noise, reduction="none")
        (errors[: BATCH // 2].mean() + errors[BATCH // 2 :].mean()).backward()
        assert self._table.grad is not None
        gradient = self._table.grad.data
        gradient[self._other_rows] = gradient[self._other_rows].zero_()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)  # the script's default


def _processors(unet: nn.Module) -> dict[str, nn.Module]:
    """Of cross-attention with float32 keys and values that learn, of self-attention without."""
    processors = {}
    for path, attention in unet.named_modules():
        if not path.endswith(("attn1", "attn2")):
            continue
        width = attention.to_q.weight.shape[0]
        learns = path.endswith("attn2")
        processor = CustomDiffusionAttnProcessor2_0(
            train_kv=learns, train_q_out=False, hidden_size=width, cross_attention_dim=768
        )
        if learns:
            processor.to_k_custom_diffusion.weight.data = attention.to_k.weight.data.float()
            processor.to_v_custom_diffusion.weight.data = attention.to_v.weight.data.float()
        processors[f"{path}.processor"] = processor
    return processors


def optimizer_steps(rounds: int) -> Times:
    """Clipping and update alone: of one stacked matrix and one row, or of the script's tensors."""
    rows = [width for width, count in ((320, 10), (640, 10), (1280, 12)) for _ in range(count)]

    def with_gradients(*shapes: tuple[int, int]) -> list[nn.Parameter]:
        parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        return parameters

    ours = with_gradients((sum(rows), 768), (1, 768))
    theirs = with_gradients(*((width, 768) for width in rows), (VOCABULARY, 768))
    fused = make_optimizer(TrainConfig(), ours)
    plain = torch.optim.AdamW(theirs, lr=8e-5, weight_decay=1e-2)

    def step(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return interleaved(
        {"ours": lambda: step(ours, fused), "script": lambda: step(theirs, plain)}, rounds
    )


def measure(
    steps: dict[str, Callable[[int], list[float]]], rounds: int, count: int, warm_up: int
) -> Times:
    """Each turn makes `count` steps after those that do not count; their median is the time."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, run in steps.items():
            seconds[name].append(statistics.median(run(warm_up + count)[warm_up - 1 :]))
    return Times(seconds)


def main() -> None:
    parser = options(__doc__ or "", threads=2, rounds=5)
    parser.add_argument("--edge", type=int, default=16, help="edge of the latents; 64 is 512 px")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a turn")
    parser.add_argument(
        "--warm-up",
        type=int,
        default=WARM_UP,
        help="its steps before, at least 1: until memory is where later steps find it again",
    )
    given = parser.parse_args()
    if given.warm_up < 1:
        parser.error(f"--warm-up {given.warm_up}: the first step sets the optimiser up; give 1")
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    vae = random_vae()
    script = DiffusersScript(torch.float32, given.edge, vae)
    sides: dict[str, Callable[[int], list[float]]] = {
        "ours, bfloat16": Bench(torch.bfloat16, given.edge, regularized=True).steps,
        "script, bfloat16": DiffusersScript(torch.bfloat16, given.edge, vae).steps,
        "script, float32": script.steps,
        "script as shipped": partial(script.steps, encode=True),
    }
    if given.edge < 64:  # memory
        sides["ours, float32"] = Bench(torch.float32, given.edge, regularized=True).steps
    times = measure(sides, given.rounds, given.steps, given.warm_up)
    print(f"SD 1.5, batch {BATCH}, latents {given.edge} x {given.edge}, {given.threads} threads")
    results: dict[str, float] = {}
    for name in sides:
        results[f"{name}, s"] = times.median(name)
        print(f"  {name:18} {times.median(name):7.3f} s a step")
    pairs = [(name, "ours, bfloat16") for name in sides if name.startswith("script")]
    pairs += [("script, float32", "ours, float32")] if "ours, float32" in sides else []
    for slower, faster in pairs:
        results[f"{slower} / {faster}"] = times.ratio(slower, faster)
        print(f"  {faster} is {times.ratio(slower, faster):.2f} times as fast as {slower}")
    updates = optimizer_steps(4 * given.rounds)
    results |= {"optimizer, ours, s": updates.median("ours")}
    results |= {"optimizer, script / ours": updates.ratio("script", "ours")}
    print(
        f"  clipping and update: {1e3 * updates.median('ours'):.1f} ms, the script's "
        f"{1e3 * updates.median('script'):.1f} ms, {updates.ratio('script', 'ours'):.1f} times"
    )
    print(f"  peak memory of all together {peak_memory_gib():.1f} GiB")
    write_json(given.json, results)


if __name__ == "__main__":
    main()
