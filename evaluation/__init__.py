"""Is a concept good? Sums on features of pictures and texts, which a host's models make."""
