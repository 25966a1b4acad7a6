"""Measure how many documents a second are assigned to packed rows, and how full the rows are.

python tests/benchmarks/packing.py
"""

import math
import time

import numpy as np

from accel_llm.data.packing import pack


def main() -> None:
    rng = np.random.default_rng(0)
    lengths = {
        "1e6 uniform to 2048": (rng.integers(1, 2049, 1_000_000), 2048),
        "1e6 short (to 128)": (rng.integers(1, 129, 1_000_000), 2048),
        "1e7 log-normal, median 245": (np.clip(rng.lognormal(5.5, 1, 10_000_000).astype(int), 1, 2048), 2048),
    }
    titles = f"{'first call':>12}{'best of 5':>12}{'documents/s':>14}{'rows':>12}{'floor':>12}{'full':>9}"
    print(f"{'lengths':28}{titles}")
    for name, (values, capacity) in lengths.items():
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            bins = pack(values, capacity, np.random.default_rng(1))
            seconds.append(time.perf_counter() - start)
        rows, tokens = len(bins.offsets) - 1, int(values.sum())
        floor = math.ceil(tokens / capacity)
        print(
            f"{name:28}{seconds[0]:>11.2f}s{min(seconds):>11.2f}s{len(values) / min(seconds):>14,.0f}"
            f"{rows:>12,}{floor:>12,}{tokens / (rows * capacity):>9.2%}"
        )


if __name__ == "__main__":
    main()
