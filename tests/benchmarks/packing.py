"""Measure how many documents a second are assigned to packed rows, and how full the rows are.

python tests/benchmarks/packing.py
python tests/benchmarks/packing.py --growth 1e5 1e6 1e7

With --growth: seconds, and the memory at the peak of a process of its own, for so many documents of log-normal lengths.
"""

import argparse
import math
import resource
import subprocess
import sys
import time

import numpy as np

from accel_llm.data.packing import pack


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--growth", nargs="*", type=float, default=[])
    parser.add_argument("--one", type=float)
    args = parser.parse_args()
    if args.one:
        show_one(int(args.one))
    elif args.growth:
        print(
            f"{'documents':>13}{'seconds':>10}{'rows':>13}{'MiB before':>12}{'MiB at most':>13}{'bytes a document':>18}"
        )
        for count in args.growth:
            subprocess.run([sys.executable, __file__, "--one", str(count)], check=True)
    else:
        show_speed()


def show_one(count: int) -> None:
    """Pack `count` documents; the memory before has the lengths in it, 4 bytes each."""
    rng = np.random.default_rng(0)
    lengths = np.empty(count, np.int32)
    for start in range(0, count, 1 << 20):
        some = lengths[start : start + (1 << 20)]
        some[:] = np.clip(rng.lognormal(5.5, 1, len(some)), 1, 2048)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start_time = time.perf_counter()
    bins = pack(lengths, 2048, np.random.default_rng(1))
    seconds = time.perf_counter() - start_time
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rest = (most - before) * 2**20 / count
    print(
        f"{count:>13,}{seconds:>10.2f}{len(bins.offsets) - 1:>13,}{before:>12,.0f}{most:>13,.0f}{rest:>18.1f}",
        flush=True,
    )


def show_speed() -> None:
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
