"""How the defaults of `backprop-gpu train` were chosen: recipes compared on MNIST's training set alone.

    python -m benchmarks.recipe [record.json]

784-512-10, relu, he, cosine, 10 epochs; trained on the first 50 000 training images, measured on the other 10 000, for
seeds 0..2. The test set is not looked at.
"""

import json
import statistics
import sys
from pathlib import Path

import backprop_gpu as bp

from .record import conditions

CANDIDATES = [
    (bp.SGD(0.3), 128),
    (bp.SGD(0.1, momentum=0.9), 128),
    (bp.Adam(1e-3), 128),
    (bp.Adam(2e-3), 128),
    (bp.Adam(3e-3), 128),
    (bp.AdamW(2e-3, weight_decay=0.1), 128),
    (bp.Adam(1e-3), 64),
    (bp.Adam(2e-3), 256),
]
SEEDS = range(3)


def main() -> None:
    """Run every candidate; print a line each."""
    train, _ = bp.datasets.load("mnist")
    X, T, held_out = train.images[:50_000], train.labels[:50_000], (train.images[50_000:], train.labels[50_000:])
    conditions_before, rows = conditions(), []
    for rule, batch_size in CANDIDATES:
        accuracies, seconds = [], []
        for seed in SEEDS:
            net = bp.Network([784, 512, 10], seed=seed)
            history = bp.train(net, X, T, None, rule, "cosine", 10, batch_size, held_out, seed=seed)
            accuracies.append(history.validation_accuracy[-1])
            seconds.append(sum(history.seconds))
        rows.append(
            {"rule": repr(rule), "batch_size": batch_size, "validation_accuracy": accuracies, "train_seconds": seconds}
        )
        print(
            f"{100 * statistics.mean(accuracies):.2f} % ({100 * min(accuracies):.2f} to {100 * max(accuracies):.2f}), "
            f"{statistics.median(seconds):.1f} s: {rule}, batch {batch_size}",
            flush=True,
        )
    if len(sys.argv) > 1:
        record = {
            "command": "python -m benchmarks.recipe",
            "conditions": conditions_before,
            "seeds": list(SEEDS),
            "rows": rows,
        }
        Path(sys.argv[1]).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
