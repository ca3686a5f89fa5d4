"""Tokens/s of the demo by OpenMP spin count and thread count, on free cores and on shared ones.

    python benchmarks/shared_cores.py [--repeats 3] [--spin-counts libgomp 1000 ...]

Three loads: `quiet` runs one job, `busy` runs one job beside busy loops (two per core), `two jobs`
runs two jobs at once and reports the mean of both. Each setting runs once per repeat, in turn. The
rate is that of the run summary, so imports and loading do not count. `libgomp` is the default of
libgomp when the environment is silent: 300,000 iterations. `passive` is OMP_WAIT_POLICY=passive.
Prints one table of medians; the last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SPIN_COUNTS = ("libgomp", "10000", "1000", "100", "passive")
LOADS = ("quiet", "busy", "two jobs")
LIBGOMP_DEFAULT = "300000"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--spin-counts", nargs="+", default=SPIN_COUNTS)
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=LOADS)
    parser.add_argument("--threads", nargs="+", type=int, default=[os.cpu_count() or 1, 1])
    args = parser.parse_args()
    settings = [(spin, args.threads[0]) for spin in args.spin_counts]
    settings += [("1000", threads) for threads in args.threads[1:]]
    rates: dict[tuple[str, str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):
            for load in args.loads:
                for spin, threads in settings:
                    rate = tokens_per_s(Path(folder), load, spin, threads)
                    rates.setdefault((load, spin, threads), []).append(rate)
                    print(
                        f"repeat {repeat}: {load}, {spin}, {threads} threads: {rate:.0f}",
                        flush=True,
                    )
    medians = {key: statistics.median(values) for key, values in rates.items()}
    print("| spin count | threads |" + "".join(f" {load} |" for load in args.loads))
    print("|---|---|" + "---|" * len(args.loads))
    for spin, threads in settings:
        cells = "".join(f" {medians[load, spin, threads]:.0f} |" for load in args.loads)
        print(f"| {spin} | {threads} |{cells}")
    print(json.dumps({" / ".join(map(str, key)): values for key, values in rates.items()}))


def tokens_per_s(folder: Path, load: str, spin: str, threads: int) -> float:
    """Return the mean rate of the jobs that run at once under this load."""
    loops = 2 * (os.cpu_count() or 1) if load == "busy" else 0
    with busy_loops(loops):
        jobs = [start(folder, spin, threads) for _ in range(2 if load == "two jobs" else 1)]
        outputs = [job.communicate()[0] for job in jobs]
    if any(job.returncode != 0 for job in jobs):
        raise SystemExit("gptbatch generate failed; see above")
    rates: list[float] = [json.loads(out.splitlines()[-1])["tokens_per_s"] for out in outputs]
    return statistics.mean(rates)


def start(folder: Path, spin: str, threads: int) -> subprocess.Popen[str]:
    unset = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    if spin == "passive":
        environment["OMP_WAIT_POLICY"] = "passive"
    else:
        environment["GOMP_SPINCOUNT"] = LIBGOMP_DEFAULT if spin == "libgomp" else spin
    output = tempfile.mkdtemp(dir=folder)
    command = [sys.executable, "-m", "gptbatch", "generate", "--config", "demo", "--output", output]
    return subprocess.Popen(
        [*command, "--threads", str(threads)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


if __name__ == "__main__":
    main()
