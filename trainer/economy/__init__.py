"""Speed and memory of a training; never another result."""
