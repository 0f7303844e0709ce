"""Run the notebooks and save their outputs: `make notebooks`.

python tools/notebooks.py [--only nbs/ui] [--only 25_probe] [--workers 2] [--timeout 900]

Each runs from top to bottom in its own process and folder (studies keep their results beside themselves), with the cells left out that `nbdev_test` leaves out; those keep the outputs that they have.
What a cell showed before is gone first, so nothing stale is saved. A notebook with a cell that fails is named with that cell, its file stays as it was, and the others go on.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
import os
from pathlib import Path
import re
import signal
import subprocess
import sys
import time

ROOT = Path(__file__).resolve().parent.parent
RUNNING: set[int] = set()      # process groups
KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}      # without it JupyterLab asks for a kernel every time


def wanted(only: list[str]) -> list[Path]:
    "The notebooks whose path holds one of the texts; none is an error."
    found = sorted(f for f in (ROOT / "nbs").rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in f.relative_to(ROOT).parts))
    chosen = [f for f in found if not only or any(text in f.relative_to(ROOT).as_posix() for text in only)]
    if not chosen: sys.exit(f"no notebook has {' or '.join(only)} in its path; there are {len(found)}, such as {found[0].relative_to(ROOT)}")
    return chosen


def latest(shown: list) -> list:
    "What a cell displayed, each update in the place of what it updates, as JupyterLab has it."
    places = {}
    for i, output in enumerate(shown): places[(output.transient or {}).get("display_id", i)] = output
    return list(places.values())


def steadied(outputs: list, seen: dict[str, str]) -> list:
    "The same outputs with the random ids of pandas' styled tables numbered, so that running again changes nothing where nothing changed; seen: those of the notebook so far."
    def number(id): return seen.setdefault(id[0], f"T_{len(seen)}")
    for output in outputs:
        if html := output.get("data", {}).get("text/html"): output["data"]["text/html"] = [re.sub(r"\bT_[0-9a-f]{5}(?=_|\b)", number, line) for line in html]
    return outputs


def run_one(file: Path) -> int:
    "Run a notebook in this process and save it; what fails is told."
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    from nbdev.clean import clean_nb
    from nbdev.config import get_config
    from nbdev.process import extract_directives
    flags = set(get_config(path=ROOT).tst_flags.split())
    class Shell(CaptureShell):
        def _run(self, *args, **kwargs):
            done = super()._run(*args, **kwargs)
            done.display_objects = latest(done.display_objects)
            return done
    nb, shell, seen = read_nb(file), Shell(file), {}
    os.chdir(file.parent)
    for cell in nb.cells:
        if cell.cell_type != "code": continue
        said = extract_directives(cell, remove=False)
        if flags & said.keys() or said.get("eval:", [""])[0].lower() == "false": continue
        cell.outputs = []
        shell.cell(cell)
        if shell.exc:
            print(shell.prettytb(fname=file.relative_to(ROOT)), file=sys.stderr)
            return 1
        cell.outputs = steadied(cell.outputs, seen)
    clean_nb(nb)
    nb.metadata["kernelspec"] = KERNEL
    write_nb(nb, file)
    return 0


def run(file: Path, timeout: float) -> tuple[str, float]:
    "What went wrong in a process of its own, '' for nothing, and how long it took."
    start = time.perf_counter()
    env = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    process = subprocess.Popen([sys.executable, __file__, "--one", str(file)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    RUNNING.add(process.pid)
    try: said, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)                     # with whatever it has started
        process.communicate()
        return f"not done after {timeout:g} seconds", time.perf_counter() - start
    finally: RUNNING.discard(process.pid)
    return (said.strip() or f"ended with {process.returncode}") if process.returncode else "", time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="only notebooks with this in their path; may be repeated")
    parser.add_argument("--workers", type=int, default=2, help="how many run at the same time")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for each")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one: return run_one(args.one.resolve())
    files, failed = wanted(args.only), []
    pool = ThreadPoolExecutor(max(1, args.workers))
    try:
        for file, (wrong, seconds) in zip(files, pool.map(lambda f: run(f, args.timeout), files)):
            name = file.relative_to(ROOT)
            print(f"{'FAILED' if wrong else 'saved '} {seconds:6.1f} s  {name}", flush=True)
            if wrong: failed.append(name); print("\n".join(f"    {line}" for line in wrong.splitlines()[-25:]), flush=True)
    finally:                                                            # also when somebody presses Ctrl-C
        pool.shutdown(wait=False, cancel_futures=True)
        for group in list(RUNNING): os.killpg(group, signal.SIGKILL)
    print(f"{len(files) - len(failed)} of {len(files)} notebooks ran and were saved" + (f"; failed: {', '.join(map(str, failed))}" if failed else ""))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
