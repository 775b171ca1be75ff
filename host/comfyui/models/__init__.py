"""ComfyUI's models as the trainer and the merge see them: copies, patches included."""
