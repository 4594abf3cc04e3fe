"""Break the code in some 400 small ways, one at a time, and list the changes that no test notices.

    python tests/mutants/run.py                       # all, two at a time: about half an hour on two cores
    python tests/mutants/run.py --only train_step     # files with this in their path
    python tests/mutants/run.py --list
    python tests/mutants/run.py --table               # also counts per file

A mutant replaces one text in one file. It is dead if one of its test files fails, and survives if all pass; with a
survivor, the exit status is 1. Each worker changes its own copy of the package, so the checkout stays unchanged. Not
part of the test suite: run it by hand after changes of the code it covers.
"""

import argparse
import importlib.util
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 600
"""Seconds after which a mutant that makes the tests hang counts as dead."""
WITHOUT_THE_CHECKOUT = """import sys
# An editable install would import from the checkout.
sys.meta_path[:] = [finder for finder in sys.meta_path if "unite_fast" not in type(finder).__module__]
"""


@dataclass(frozen=True)
class Mutant:
    path: str
    old: str
    new: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        old, new = (" ".join(text.split())[:60] for text in (self.old, self.new))
        return f"{self.path}: {old} -> {new}"

    def source(self) -> str:
        """The changed file. The old text must occur once."""
        text = (ROOT / self.path).read_text()
        if text.count(self.old) != 1:
            raise SystemExit(f"{self}: the text occurs {text.count(self.old)} times; update tests/mutants/areas")
        return text.replace(self.old, self.new)

    def installed_path(self) -> Path:
        return Path(self.path) if self.path.startswith("unite_fast/") else Path("unite_fast", self.path)


def load_mutants() -> list[Mutant]:
    """From areas/: (file, test files of which one must fail, [(old text, new text), ...])."""
    mutants = []
    for path in sorted(Path(__file__).with_name("areas").glob("*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        mutants += [Mutant(file, *change, tests) for file, tests, changes in module.CHANGES for change in changes]
    return mutants


def assemble(folder: Path) -> None:
    """Copy the package to `folder` in its installed layout, with the installed C++ extensions."""
    folder.mkdir()
    subprocess.run([ROOT / ".ci" / "copy-as-installed", folder], check=True)
    for name in ("unite_fast.kernels", "unite_fast.data_pipeline"):
        for location in importlib.util.find_spec(name).submodule_search_locations:
            for library in Path(location).glob("*.so"):
                shutil.copy(library, folder / name.replace(".", "/"))
    (folder / "sitecustomize.py").write_text(WITHOUT_THE_CHECKOUT)
    (folder / "start.py").write_text("import sys, pytest\nsys.exit(pytest.main(sys.argv[1:]))\n")
    command = [sys.executable, "-c", "import unite_fast.kernels as k; print(*k.__path__)"]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    imported = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout
    if Path(imported.strip()) != folder / "unite_fast" / "kernels":
        raise SystemExit(f"the tests would import {imported.strip()} instead of the changed copy")


def passes(folder: Path, tests: tuple[str, ...], limit: float | None = LIMIT) -> tuple[bool, str]:
    """Whether the tests pass with the package in `folder`, and the last line about a failure."""
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(folder / "start.py"), "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
    # In its own session, so that processes which a test started are killed with it.
    process = subprocess.Popen(
        [*command, "--show-capture=no", *tests],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        return False, f"took longer than {limit} s"
    failed = [line for line in out.splitlines() if line.startswith(("FAILED", "ERROR", "E  "))]
    if process.returncode not in (0, 1) and not failed:
        failed = out.splitlines()[-1:]
    return process.returncode == 0, (failed or [""])[-1][:110]


def work(folder: Path, pending: queue.Queue, results: dict[Mutant, bool], total: int) -> None:
    while True:
        try:
            mutant = pending.get_nowait()
        except queue.Empty:
            return
        target = folder / mutant.installed_path()
        before = target.read_text()
        target.write_text(mutant.source())
        start = time.monotonic()
        survives, reason = passes(folder, mutant.tests)
        target.write_text(before)
        results[mutant] = survives
        outcome = "SURVIVES" if survives else "dead"
        print(f"{len(results):3}/{total} {outcome:8} {time.monotonic() - start:4.0f} s  {mutant}  {reason}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only files with this in their path")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time [2]")
    parser.add_argument("--list", action="store_true", help="list them and run nothing")
    parser.add_argument("--table", action="store_true", help="print a table per file at the end")
    options = parser.parse_args()
    mutants = [mutant for mutant in load_mutants() if options.only in mutant.path]
    for mutant in mutants:
        mutant.source()
    if options.list:
        print(*mutants, f"{len(mutants)} mutants", sep="\n")
        return
    results: dict[Mutant, bool] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch, str(job)) for job in range(options.jobs)]
        for folder in folders:
            assemble(folder)
        tests = tuple(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
        ok, reason = passes(folders[0], tests, limit=None)
        if not ok:
            raise SystemExit(f"the tests fail without any change: {reason}")
        pending: queue.Queue = queue.Queue()
        for mutant in mutants:
            pending.put(mutant)
        workers = [threading.Thread(target=work, args=(f, pending, results, len(mutants))) for f in folders]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    if options.table:
        count, alive = Counter(m.path for m in mutants), Counter(m.path for m, survives in results.items() if survives)
        print("| file | mutants | survive |", "|---|---|---|", sep="\n")
        print(*(f"| {path} | {n} | {alive[path]} |" for path, n in sorted(count.items())), sep="\n")
    survivors = [mutant for mutant, survives in results.items() if survives]
    print(f"{len(mutants)} mutants, {len(survivors)} survive")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
