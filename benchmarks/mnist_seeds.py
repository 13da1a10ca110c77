"""`backprop-gpu train` as it comes, on MNIST, for seeds 0..9: accuracy and seconds, written to a JSON record.

    python -m benchmarks.mnist_seeds [record.json]

Each seed is a process of its own, one after the other, timed from its start to its end; `train_seconds` is what the
training steps took. Exits with 1 where a seed stays below 98.0 % test accuracy.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .record import conditions

SEEDS = range(10)
GOAL = 0.98


def main() -> int:
    """Run all seeds; print a line each and a summary."""
    command = [sys.executable, "-m", "backprop_gpu", "train", "--json"]
    record: dict[str, Any] = {
        "command": "backprop-gpu train --json --seed SEED",
        "conditions": conditions(),
        "runs": [],
    }
    for seed in SEEDS:
        start = time.perf_counter()
        done = subprocess.run([*command, "--seed", str(seed)], capture_output=True, text=True, check=True)
        result = json.loads(done.stdout.splitlines()[-1])
        result["process_seconds"] = time.perf_counter() - start
        record["runs"].append(result)
        print(f"seed {seed}: {100 * result['test_accuracy']:.2f} %, {result['process_seconds']:.1f} s", flush=True)
    accuracies = [run["test_accuracy"] for run in record["runs"]]
    seconds = [run["process_seconds"] for run in record["runs"]]
    print(
        f"accuracy {100 * min(accuracies):.2f} to {100 * max(accuracies):.2f} %, median "
        f"{100 * statistics.median(accuracies):.2f} %; process {min(seconds):.1f} to {max(seconds):.1f} s, median "
        f"{statistics.median(seconds):.1f} s; n = {len(accuracies)}"
    )
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(record, indent=1) + "\n")
    return 0 if min(accuracies) >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
