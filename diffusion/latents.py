"""How latents and pixels go together, in every Stable Diffusion."""

from __future__ import annotations

LATENT_PIXELS = 8
"""Edge of the square of pixels that one latent stands for."""
