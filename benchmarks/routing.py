"""What a route costs a sampling step, and what regions and watching do.

A step is ComfyUI's own prediction of both halves of guidance, with three routed concepts at six
rows of 77 (four with as many regions), against the same step without; the network has the shapes of
SD 1.5 or SDXL and random weights. With `--regions` as many vertical strips of the picture have a
prompt and a concept of their own beside that; with `--watch` nothing is routed, and the attention
of as many words is recorded. COMFYUI_PATH is the folder of ComfyUI.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import _pack  # noqa: F401  (puts the pack on the path)
import torch
from _measure import interleaved, options, peak_memory_gib, write_json
from custom_diffusion.attention.maps import AttentionRecorder, WatchedWord
from custom_diffusion.composition.features import mark
from custom_diffusion.composition.masks import box
from custom_diffusion.composition.places import Places
from custom_diffusion.composition.routing import Route
from custom_diffusion.concept.concept import Concept
from custom_diffusion.concept.delta import LowRankDelta
from custom_diffusion.concept.layers import FAMILIES, is_projection

sys.path.append(os.environ["COMFYUI_PATH"])
ROWS = [(2, 3), (6, 7), (10, 11), (14, 15)]
"""Of each concept, in the positive prompt; the negative one has none."""
FEWEST_CONCEPTS = 3
EDGE = {"sd15": 64, "sdxl": 128}


def random_model(family: str, dtype: torch.dtype) -> Any:
    """A MODEL of true shape; one small number in all weights costs as much time as any other."""
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.model_patcher
    import comfy.supported_models
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    shapes: dict[str, Any] = {
        "sd15": {
            "model_channels": 320, "channel_mult": [1, 2, 4, 4], "num_res_blocks": [2] * 4,
            "transformer_depth": [1] * 6 + [0] * 2, "transformer_depth_middle": 1,
            "transformer_depth_output": [1] * 9 + [0] * 3, "num_heads": 8, "num_head_channels": -1,
            "context_dim": 768, "use_linear_in_transformer": False,
        },
        "sdxl": {
            "model_channels": 320, "channel_mult": [1, 2, 4], "num_res_blocks": [2] * 3,
            "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "num_head_channels": 64,
            "context_dim": 2048, "use_linear_in_transformer": True,
            "num_classes": "sequential", "adm_in_channels": 2816,
        },
    }  # fmt: skip
    config = {
        "use_checkpoint": False, "image_size": 32, "use_spatial_transformer": True,
        "legacy": False, "use_temporal_attention": False, "use_temporal_resblock": False,
        "dtype": dtype, "in_channels": 4, "out_channels": 4, **shapes[family],
    }  # fmt: skip
    kinds = {"sd15": comfy.supported_models.SD15, "sdxl": comfy.supported_models.SDXL}
    known = kinds[family](config)
    known.set_inference_dtype(dtype, None)
    model = known.get_model({}, "", device="cpu")
    assert isinstance(model.diffusion_model, UNetModel)
    for weight in model.diffusion_model.parameters():
        weight.data.normal_(0, 0.01)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def random_concept(model: Any, family: str, number: int) -> Concept:
    deltas = {
        name.removesuffix(".weight"): LowRankDelta(
            0.01 * torch.randn(weight.shape[0], 8), torch.randn(8, weight.shape[1])
        )
        for name, weight in model.model.diffusion_model.named_parameters()
        if is_projection(name.removesuffix(".weight"))
    }
    return Concept(FAMILIES[family], deltas, constraint_prompts=(f"thing{number}",))


def sampling(
    model: Any, positive: torch.Tensor, pooled: int, edge: int, steps: int, **more: Any
) -> Callable[[], object]:
    """Steps of Euler's method with guidance, preparations of ComfyUI and of the route included."""
    import comfy.samplers

    negative = torch.randn(positive.shape)
    rest = {"pooled_output": torch.randn(1, pooled)} if pooled else {}
    noise = torch.randn(1, 4, edge, edge)

    def run() -> object:
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds([[positive, {**rest, **more}]], [[negative, dict(rest)]])
        guider.set_cfg(7.0)
        sigmas = torch.linspace(14.0, 1.0, steps + 1)
        sampler = comfy.samplers.sampler_object("euler")
        with torch.inference_mode():
            return guider.sample(
                noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=0
            )

    return run


def main() -> None:
    parser = options(__doc__ or "", threads=1, rounds=9)
    parser.add_argument("--family", choices=list(EDGE), default="sd15")
    parser.add_argument("--edge", type=int, help="of the latent; smaller ones show the cost more")
    parser.add_argument("--steps", type=int, default=1, help="of a sampling; prepared once")
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--regions", type=int, choices=range(len(ROWS) + 1), default=0)
    parser.add_argument("--watch", type=int, default=0, help="words, 1 to 16, instead of routes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    family = FAMILIES[arguments.family]
    model = random_model(family.name, torch.bfloat16 if arguments.bfloat16 else torch.float32)
    from custom_diffusion.host.comfyui.attention import WATCHED, Watch
    from custom_diffusion.host.comfyui.regions import REGIONS, RegionalRouting, Said
    from custom_diffusion.host.comfyui.routing import Routing

    concepts = max(FEWEST_CONCEPTS, arguments.regions)
    routes = [Route(random_concept(model, family.name, n)) for n in range(concepts)]
    strips = [
        box(n / arguments.regions, 0, 1 / arguments.regions, 1) for n in range(arguments.regions)
    ]
    routing = RegionalRouting(routes, Places(strips)) if strips else Routing(routes)
    routed = routing.on(model)
    features = torch.randn(1, 77, family.context_width)
    own = {}
    for key, rows in zip(routing.concepts, ROWS[:concepts], strict=True):
        own[key] = torch.zeros_like(features)
        own[key][:, list(rows)] = features[:, list(rows)]
    for key in list(own)[: len(strips)]:
        routing.say(Said("", mark(features.clone(), {key: own[key]}), None, key))
    positive, more = mark(features.clone(), own), {REGIONS: routing.key} if strips else {}
    what = f"a route with {len(strips)} regions"
    if arguments.watch:
        words = [WatchedWord(f"{n}", [2 + n]) for n in range(arguments.watch)]
        watch = Watch(AttentionRecorder(words))
        routed, positive, more = watch.on(model), features, {WATCHED: watch.key}
        what = f"watching {arguments.watch} words"
    edge = arguments.edge or EDGE[family.name]
    times = interleaved(
        {
            "without": sampling(model, features, family.pooled_width, edge, arguments.steps),
            "with": sampling(
                routed,
                positive,
                family.pooled_width,
                edge,
                arguments.steps,
                **more,
            ),
        },
        arguments.rounds,
    )
    cost = times.ratio("with", "without") - 1
    for name, seconds in times.seconds.items():
        print(f"{name:8} median {times.median(name):.3f} s, n = {len(seconds)}")
    print(
        f"{what} costs {cost:+.2%} of {arguments.steps} steps at "
        f"{edge} x {edge}; {peak_memory_gib():.1f} GiB"
    )
    write_json(arguments.json, {"family": family.name, "edge": edge, "what": what, "more": cost})


if __name__ == "__main__":
    main()
