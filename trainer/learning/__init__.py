"""What changes in a training, and by what: projections, words, further weights, loss, optimiser."""
