"""How much is tried, from which seed, and what came of it: build/faults.json and build/faults.txt.

`CLIP_LAB_FAULTS=long` tries a great deal more than the short form, which is part of every test run; `CLIP_LAB_FAULTS_SEED` chooses what.
"""
from collections import Counter
from contextlib import contextmanager
import json
import os
from pathlib import Path
import platform
import signal
import sys
import time

from hypothesis import HealthCheck, Phase, seed, settings
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))      # `references`

FORM = os.environ.get("CLIP_LAB_FAULTS", "short")
SEED = int(os.environ.get("CLIP_LAB_FAULTS_SEED", "0"))
if FORM not in ("short", "long"): raise SystemExit(f"CLIP_LAB_FAULTS is {FORM!r}; expected short or long")
TALLY, SKIPPED, TIMES, STARTED = {}, {}, {}, time.time()


def many(short: int, long: int) -> int: return long if FORM == "long" else short


def tally(case: str, outcome: str, n: int = 1) -> None:
    "Count what came of one attempt; the report has a row per case."
    TALLY.setdefault(case, Counter())[outcome] += n


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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if "faults" in item.path.parts:
        name = item.nodeid.rpartition("/")[2]
        TIMES[name] = round(TIMES.get(name, 0) + call.duration, 2)
        if report.skipped: SKIPPED[name] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr).removeprefix("Skipped: ")
    return report


def pytest_sessionfinish(session, exitstatus):
    if not TALLY: return
    found = dict(form=FORM, seed=SEED, passed=exitstatus == 0, seconds=round(time.time() - STARTED, 1), python=platform.python_version(), machine=platform.platform(),
                 cases={k: dict(sorted(v.items())) for k, v in sorted(TALLY.items())}, skipped=SKIPPED, seconds_by_test=TIMES)
    lines = [f"faults, {FORM} form, seed {SEED}: {sum(sum(c.values()) for c in TALLY.values()):,} attempts in {found['seconds']:.0f} s" + ("" if found["passed"] else "; NOT ALL PASSED")]
    lines += [f"  {name:<46} {sum(c.values()):>8,}  " + ", ".join(f"{what} {n:,}" for what, n in c.items()) for name, c in found["cases"].items()]
    lines += [f"  skipped: {name}: {why}" for name, why in SKIPPED.items()]
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build" / "faults.json").write_text(json.dumps(found, indent=1) + "\n")
    (ROOT / "build" / "faults.txt").write_text("\n".join(lines) + "\n")


def pytest_terminal_summary(terminalreporter):
    if TALLY: terminalreporter.write_line((ROOT / "build" / "faults.txt").read_text().rstrip())
