"""Pictures: opened from strangers' files, made of tensors, laid out in sheets, drawn as plots."""
