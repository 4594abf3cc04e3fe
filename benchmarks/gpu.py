"""Test and measure unite_fast on one GPU in one command of at most seven minutes: first correctness, then speed.

    python benchmarks/gpu.py --out DIR                     # on a machine with a GPU, after `pip install -e .`
    python benchmarks/gpu.py --out DIR --only env,bench_triton
    python benchmarks/gpu.py --out DIR --device cpu --tiny   # the same code on a CPU with toy sizes, to try the command

Every part runs in its own process group with a time limit, so a part that hangs or crashes does not affect the others.
Parts that check numbers run first, in parallel; timed parts run alone after them, the most important first. Parts that
no longer fit into --budget are skipped. DIR gets results.jsonl (one line per result, written at once), log.txt (other
output of the parts) and summary.md (tables for docs/performance.md). Nothing is downloaded.

Exit status: 0 everything correct, 1 a result is wrong or a part failed, 2 wrong arguments.
"""

import argparse
import sys
from pathlib import Path

from gpu_parts import PARTS, run_part
from gpu_parts.runner import Runner


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--out", type=Path, default=Path("gpu_results"), help="folder for the results [gpu_results]")
    parser.add_argument("--budget", type=float, default=380.0, help="total seconds [380]")
    parser.add_argument("--only", default="", help=f"only these parts, separated by commas: {', '.join(names)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="[cuda]")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try the command")
    parser.add_argument("--part", choices=names, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        return run_part(options.part, options.device, options.tiny)
    unknown = set(filter(None, options.only.split(","))) - set(names)
    if unknown:
        parser.error(f"--only: there is no part {', '.join(sorted(unknown))}; known: {', '.join(names)}")
    return Runner(options, PARTS).run()


if __name__ == "__main__":
    sys.exit(main())
