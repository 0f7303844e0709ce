"""The short form of every benchmark: does it run, do the sides agree, is what it writes laid out as the pages read it? Nothing here looks at a time."""

import importlib.util
import json
import math
import os
from pathlib import Path
import subprocess
import sys

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = {"encode": ["tokenizer", "preprocess", "towers", "classify", "start"], "evals": ["imports", "probe", "recall", "search", "classifier"], "audits": ["aggregation"], "train_step": ["steps"], "loss_memory": ["loss"]}
PEERS = {"encode": ("open_clip", "instant_clip_tokenizer", "transformers"), "evals": ("open_clip", "clip_benchmark", "faiss"), "train_step": ("open_clip",), "loss_memory": ("open_clip",)}


def run(*words) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


def measured(part: dict) -> None:
    "Every row has a side and a positive time for each round, or says why not; every ratio is that of its rows."
    rows = part["rows"]
    assert rows and part["measured"].keys() == {"date", "load"}
    for row in rows:
        assert row["side"] and row["what"]
        if "not_run" in row: continue
        assert len(row["cpu"]) == len(row["wall"]) and min(row["wall"]) > 0
    for ratio in part["ratios"]:
        ours, theirs = (next(r for r in rows if r["side"] == ratio[who] and r["what"] == ratio["what"] and r.get("size") == ratio.get("size")) for who in ("ours", "theirs"))
        middle, low, high = ratio["wall"]
        assert low <= middle <= high and ratio["rounds"] == len(ours["wall"])
        assert math.isclose(low, min(b / a for a, b in zip(ours["wall"], theirs["wall"])))


@pytest.mark.parametrize("name", PARTS)
def test_the_short_form_of_a_benchmark(name, tmp_path):
    lacking = [peer for peer in PEERS.get(name, ()) if importlib.util.find_spec(peer) is None]
    done = run(f"bench/{name}.py", tmp_path / "found.json", "--short")
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["parts"]) == PARTS[name] and found["about"]["short"] is True
    for part in found["parts"].values():
        if "not_run" not in part: measured(part)
        else: assert any(peer in part["not_run"] for peer in lacking), part["not_run"]
    if name == "encode" and not lacking:      # the sides agree where they should; the scripts stop where they do not
        assert found["parts"]["tokenizer"]["facts"]["same_ids"]["open_clip (openai/CLIP)"] == 1
        assert all(apart < 1e-3 for each in found["parts"]["towers"]["facts"]["largest_difference"].values() for apart in each.values())
    if lacking: pytest.skip(f"not installed, so those parts were left out and said so: {', '.join(lacking)} (pip install -e '.[bench]')")
    assert "not run" not in done.stdout


def test_a_missing_peer_leaves_out_its_part_and_no_other(tmp_path):
    (tmp_path / "faiss.py").write_text("raise ModuleNotFoundError(\"No module named 'faiss'\", name='faiss')\n")
    code = f"import sys, runpy; sys.path[:0] = [{str(tmp_path)!r}, 'bench']; sys.argv = ['bench/evals.py', {str(tmp_path / 'found.json')!r}, '--short', '--parts', 'search', 'imports']; runpy.run_path('bench/evals.py', run_name='__main__')"
    run("-c", code)
    parts = json.loads((tmp_path / "found.json").read_text())["parts"]
    assert parts["search"]["rows"] == [] and "faiss is not installed" in parts["search"]["not_run"]
    measured(parts["imports"])


def test_the_short_form_of_the_load_of_a_study(tmp_path):      # that of an app is in tests/faults/test_apps.py
    run("bench/study_load.py", tmp_path / "study.json", "--short")
    [row] = json.loads((tmp_path / "study.json").read_text())["rows"]
    assert row["people"] * 2 == row["answers"]


def test_one_command_runs_them_all():
    jobs = importlib.util.spec_from_file_location("bench_main", ROOT / "bench" / "__main__.py")
    module = importlib.util.module_from_spec(jobs)
    jobs.loader.exec_module(module)
    assert {words[0] for words in module.JOBS.values()} == {f.name for f in (ROOT / "bench").glob("*.py")} - {"__main__.py", "common.py"}
    assert {words[0] for words in module.CUDA.values()} <= {words[0] for words in module.JOBS.values()}
