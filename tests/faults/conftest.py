"""How much is tried, from which seed, and what came of it: build/faults.json and build/faults.txt.

`CLIP_LAB_FAULTS=long` tries a great deal more than the short form, which is part of every test run; `CLIP_LAB_FAULTS_SEED` chooses what. `CLIP_LAB_FAULTS_RECORD=bench/results/faults.json` also puts
what was found into that file, in place of what it had of the same tests: a long run may be made in pieces.
"""
from collections import Counter
from contextlib import contextmanager
from importlib.metadata import version
import json
import os
from pathlib import Path
import platform
import signal
import sys

from hypothesis import HealthCheck, Phase, seed, settings
import pytest

import clip_lab
from clip_lab.whole import write_whole

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))      # `references`

FORM = os.environ.get("CLIP_LAB_FAULTS", "short")
SEED = int(os.environ.get("CLIP_LAB_FAULTS_SEED", "0"))
if FORM not in ("short", "long"): raise SystemExit(f"CLIP_LAB_FAULTS is {FORM!r}; expected short or long")
RECORD = Path(os.environ["CLIP_LAB_FAULTS_RECORD"]) if os.environ.get("CLIP_LAB_FAULTS_RECORD") else None
TALLY, SKIPPED, TIMES, FAILED, NOW = Counter(), {}, {}, set(), [""]


def many(short: int, long: int) -> int: return long if FORM == "long" else short


def tally(case: str, outcome: str, n: int = 1) -> None:
    "Count what came of one attempt; the report has a row per case and outcome."
    TALLY[NOW[0], case, outcome] += n


def fuzz(short: int, long: int):
    "Hypothesis with so many examples, from the seed of this run, and nothing kept between runs."
    def decorate(test):
        chosen = settings(max_examples=many(short, long), deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate, Phase.shrink])
        return seed(SEED)(chosen(test))
    return decorate


class Hang(BaseException):
    "Nobody catches this by mistake."


@contextmanager
def no_hang(seconds: float = 30):
    "Raises Hang after so much processor time, which other work on the machine does not use up."
    def told(*_): raise Hang(f"still busy after {seconds:g} s of processor time")
    before = signal.signal(signal.SIGPROF, told)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def pytest_collection_modifyitems(items):
    for item in items:
        if "faults" in item.path.parts and FORM == "long": item.add_marker(pytest.mark.timeout(3600))


def name_of(item) -> str: return item.nodeid.partition("[")[0].rpartition("/")[2]


def pytest_runtest_setup(item): NOW[0] = name_of(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if "faults" in item.path.parts:
        name = name_of(item)
        TIMES[name] = round(TIMES.get(name, 0) + call.duration, 2)
        if report.failed: FAILED.add(name)
        if report.skipped: SKIPPED[name] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr).removeprefix("Skipped: ")
    return report


def found() -> dict:
    "What this run tried: a row per test, case and outcome."
    return dict(form=FORM, seed=SEED, versions=dict(python=platform.python_version()) | {name: version(name) for name in ("torch", "pillow", "hypothesis")} | dict(clip_lab=clip_lab.__version__), machine=platform.platform(),
                failed=sorted(FAILED), skipped=SKIPPED, rows=[dict(test=test, case=case, outcome=outcome, n=n) for (test, case, outcome), n in sorted(TALLY.items())], seconds=TIMES)


def together(before: dict, now: dict) -> dict:
    "Two runs of one form, seed and versions: where both have a test, what the later one found."
    if any(before.get(k) != now[k] for k in ("form", "seed", "versions")): return now
    old = lambda test: test not in now["seconds"]
    return now | dict(failed=sorted({*filter(old, before["failed"]), *now["failed"]}), skipped={k: v for k, v in before["skipped"].items() if old(k)} | now["skipped"],
                      rows=sorted([*(r for r in before["rows"] if old(r["test"])), *now["rows"]], key=lambda r: (r["test"], r["case"], r["outcome"])), seconds=dict(sorted((before["seconds"] | now["seconds"]).items())))


def as_text(run: dict) -> str:
    cases = {}
    for row in run["rows"]: cases.setdefault(row["case"], Counter())[row["outcome"]] += row["n"]
    lines = [f"faults, {run['form']} form, seed {run['seed']}: {sum(r['n'] for r in run['rows']):,} attempts in {sum(run['seconds'].values()):.0f} s" + (f"; FAILED: {', '.join(run['failed'])}" if run["failed"] else "")]
    lines += [f"  {name:<46} {sum(c.values()):>8,}  " + ", ".join(f"{what} {n:,}" for what, n in sorted(c.items())) for name, c in sorted(cases.items())]
    return "\n".join([*lines, *(f"  skipped: {name}: {why}" for name, why in run["skipped"].items())])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    "What a worker of pytest-xdist found, added to what the others did."
    run = getattr(node, "workeroutput", {}).get("faults")
    if not run: return
    TALLY.update({(r["test"], r["case"], r["outcome"]): r["n"] for r in run["rows"]})
    SKIPPED.update(run["skipped"])
    FAILED.update(run["failed"])
    for test, seconds in run["seconds"].items(): TIMES[test] = round(TIMES.get(test, 0) + seconds, 2)


def pytest_sessionfinish(session, exitstatus):
    if not TALLY: return
    if hasattr(session.config, "workeroutput"): session.config.workeroutput["faults"] = found(); return
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build" / "faults.json").write_text(json.dumps(run := found(), indent=1) + "\n")
    (ROOT / "build" / "faults.txt").write_text(as_text(run) + "\n")
    if RECORD: write_whole(RECORD, json.dumps(together(json.loads(RECORD.read_text()), run) if RECORD.exists() else run, indent=1) + "\n")


def pytest_terminal_summary(terminalreporter):
    if TALLY: terminalreporter.write_line(as_text(found()))
