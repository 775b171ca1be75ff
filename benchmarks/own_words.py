"""A training step at the concept's own words beside one through every word, with a regularization
picture for each picture of the concept and without.

Steps are those of the real loop on given latents, at the shapes of SD 1.5 with random weights.
"""

import statistics
from collections.abc import Callable

import torch
from _measure import interleaved, options, write_json
from training_step import Bench

EVERY_WORD = {"gradient_cut": "start and padding"}


def main() -> None:
    parser = options(__doc__ or "", threads=1, rounds=5)
    parser.add_argument("--edge", type=int, default=32, help="edge of the latents; 64 is 512 px")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    alone, with_others = (Bench(torch.float32, arguments.edge, 2, more) for more in (False, True))

    def step(bench: Bench, **settings: object) -> Callable[[], float]:
        return lambda: statistics.median(bench.steps(4, **settings))

    turns = {
        "own words, 2 pictures": step(alone),
        "every word, 2 pictures": step(alone, **EVERY_WORD),
        "every word, 2 pictures and 2 of regularization": step(with_others, **EVERY_WORD),
    }
    times = interleaved(turns, arguments.rounds)
    own, *others = turns
    for name in others:
        print(f"{name}: {times.ratio(name, own):.2f} times as long as {own}")
    write_json(arguments.json, {name: times.ratio(name, own) for name in others})


if __name__ == "__main__":
    main()
