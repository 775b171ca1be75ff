"""CLIP text models that learn words, for every host."""
