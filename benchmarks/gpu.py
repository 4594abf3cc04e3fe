"""What one GPU can tell about unite_fast in one command of at most seven minutes: is it right, then how fast is it.

    python benchmarks/gpu.py --out DIR                     # on a machine with a GPU, after `pip install -e .`
    python benchmarks/gpu.py --out DIR --only env,bench_triton
    python benchmarks/gpu.py --out DIR --device cpu --tiny   # the same code on a CPU, small: to try the command itself

Every part is a process group of its own with a time limit, so a part that hangs, crashes or dies costs itself alone.
Parts that judge numbers run side by side first; parts that are timed run alone after them, the most important first.
What no longer fits into --budget is written as skipped. DIR gets results.jsonl (one line a result, as it comes),
log.txt (whatever else the parts print) and summary.md (a table for docs/performance.md). Nothing is downloaded.

Exit status: 0 all is right, 1 a result is wrong or a part failed, 2 a mistake in the arguments.
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
    parser.add_argument("--budget", type=float, default=380.0, help="seconds for everything [380]")
    parser.add_argument("--only", default="", help=f"only these parts, by commas: {', '.join(names)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="[cuda]")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: tries the command, measures nothing")
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
