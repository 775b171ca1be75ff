"""Several concepts in one picture: tensors in, tensors out."""
