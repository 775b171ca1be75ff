"""The socket types that the pack's nodes share."""

from comfy_api.latest import io

CATEGORY = "custom diffusion"

Concept = io.Custom("CONCEPT")
TrainingConcept = io.Custom("TRAINING_CONCEPT")
RegularizationSet = io.Custom("REGULARIZATION_SET")
