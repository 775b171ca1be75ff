"""Making concepts small: singular values, ranks, and what a rank costs."""
