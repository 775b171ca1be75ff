"""Inputs of nodes that draw by themselves: KSampler's, in its words."""

from comfy_api.latest import io

from ..host.comfyui.drawing import SAMPLERS, SCHEDULERS


def sampling_inputs(resolution_tip: str, steps: str = "steps") -> list[io.Input]:
    """`steps` is what the number of sampling steps is called."""
    return [
        io.Int.Input(
            steps,
            default=25,
            min=1,
            max=1000,
            tooltip="Sampling steps per picture, as on KSampler. Lower it to draw faster.",
        ),
        io.Float.Input(
            "cfg",
            default=6.0,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="How closely the pictures follow the prompt, as on KSampler. Lower it if they "
            "look harsh.",
        ),
        io.Combo.Input(
            "sampler_name",
            options=SAMPLERS,
            tooltip="The sampler, as on KSampler. Use one that draws well with your model.",
        ),
        io.Combo.Input(
            "scheduler",
            options=SCHEDULERS,
            tooltip="The noise schedule, as on KSampler. Use the one that goes with your sampler.",
        ),
        io.Int.Input(
            "resolution",
            default=512,
            min=64,
            max=2048,
            step=8,
            tooltip=f"Width and height in pixels. {resolution_tip}",
        ),
    ]
