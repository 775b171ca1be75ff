"""What a diffusion model offers, whichever program owns it: its protocols, and a small sampler."""
