"""The order of products in the step back: (delta^T W) D, delta^T (W D) and d ⊙ (W^T delta), timed by width.

    python -m benchmarks.product_order [record.json]

Widths 100 to 2000, float64, one sample, NumPy on the host; the least of 20 runs or more of each, after the example
`product-order`, which says what is multiplied. Exits with 1 where vector first is not the faster order, or a product
is not the engine's to 1e-12 of its largest element.
"""

import json
import sys
from pathlib import Path
from typing import Any

from backprop_gpu.examples import product_order

from .record import conditions

WIDTHS = (100, 200, 500, 1000, 2000)


def main() -> int:
    """Run every width; print a line each."""
    record: dict[str, Any] = {
        "command": "python -m benchmarks.product_order",
        "conditions": conditions(),
        **product_order(0, "numpy", WIDTHS, repeats=20),
    }
    good = True
    for row in record["rows"]:
        times, counts = row["seconds"], row["multiplications"]
        print(
            f"N {row['width']:5}: "
            + ", ".join(f"{way} {1e6 * seconds:,.0f} us" for way, seconds in times.items())
            + f"; matrices first / vector first: {times['matrices first'] / times['vector first']:.0f} measured, "
            f"{counts['matrices first'] / counts['vector first']:.0f} counted"
        )
        good &= times["vector first"] < times["matrices first"] and max(row["difference"].values()) <= 1e-12
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(record, indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
