"""The shared vocabulary of the pack: what a concept is, its file, its layers, prompts and text
features.

Imports torch and safetensors only. Nothing here knows ComfyUI, threads, training or merging.
"""
