"""`clip-lab eval` as a user starts it, on one process and on two, against the model card that an earlier program wrote."""

import io
import json
import os
import subprocess
import sys

import pandas as pd
import pytest
from typer.testing import CliRunner

from clip_lab.cli_evals import app
from clip_lab.data import stamps
from clip_lab.evals.embedded import read_card
from clip_lab.evals.results import Results

ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def command(*arguments, processes=1) -> subprocess.CompletedProcess:
    start = ["-m", "clip_lab"] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m", "clip_lab"]
    return subprocess.run([sys.executable, *start, *map(str, arguments)], capture_output=True, text=True, timeout=590, env=ENV)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("emoji, rows", [pytest.param("emoji", 70, marks=pytest.mark.long), ("emoji-twemoji", 14)])
def test_two_processes_print_the_model_card_to_the_last_digit_and_one_finds_it_again(tmp_path, emoji, rows):
    try: stamps.load(); data = f"{emoji},stamps"
    except FileNotFoundError: data = emoji
    done = command("eval", "--data", data, "--tasks", "zeroshot", "--results", tmp_path, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    card, measured = read_card()
    if data == emoji: card = card[card.data != "stamps"]
    if emoji != "emoji": card = card[card.data.isin([emoji.removeprefix("emoji-"), "stamps"])]
    table = Results(tmp_path).table()
    table["data"] = table.data.str.removeprefix("emoji-")
    keys, numbers = ["data", "target", "subset", "metric"], ["estimate", "low", "high", "n", "chance", "classes"]
    both = card.rename(columns={"task": "target"}).merge(table, on=keys, suffixes=("_card", ""))
    assert len(both) == len(card) > rows
    for name in numbers: pd.testing.assert_series_equal(both[name], both[f"{name}_card"], check_names=False, check_exact=True, check_dtype=False)
    asked = [b.asked for b in Results(tmp_path)]
    assert {a["weights_hash"] for a in asked} == {measured["weights_hash"]}
    assert {a["data"].removeprefix("emoji-"): a["data_hash"] for a in asked if a["data"] != "stamps"} == {k: v for k, v in measured["data_hash"].items() if k != "stamps" and k in set(card.data)}
    again = command("eval", "--data", data, "--tasks", "zeroshot", "--results", tmp_path, "--json")
    assert again.returncode == 0, again.stderr[-3000:]
    assert {b["id"] for b in json.loads(again.stdout)} == set(Results(tmp_path).names())


@pytest.mark.long
def test_twice_in_a_row_and_on_one_process_the_same_digits(tmp_path):
    for name, processes in (("first", 1), ("second", 1), ("two", 2)):
        done = command("eval", "--data", "digits", "--tasks", "zeroshot,probe", "--results", tmp_path / name, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    first, second, two = (Results(tmp_path / n).table() for n in ("first", "second", "two"))
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    pd.testing.assert_frame_equal(first, two, check_exact=True)


def test_what_cannot_be_done_is_said_and_the_rest_is_answered(tmp_path):
    done = command("eval", "--data", "photographs", "--tasks", "zeroshot,probe,retrieval", "--results", tmp_path)
    assert done.returncode == 0 and done.stdout.count("photographs · ") == 3, done.stderr[-2000:]
    for arguments, told in ((("--data", "photos"), "photographs"), (("--data", "digits", "--tasks", "zero-shot"), "expected some of zeroshot"), (("--data", "cifar10=/nowhere"), "/nowhere")):
        done = command("eval", *arguments, "--results", tmp_path)
        assert done.returncode == 1 and told in done.stderr and "Traceback" not in done.stderr, done.stderr[-2000:]
    done = command("results", "show", "zzz", "--results", tmp_path)
    assert done.returncode == 1 and "no bundle 'zzz' among 3" in done.stderr


def test_what_there_is_and_what_is_known_of_it(tmp_path):
    listed = command("data", "list")
    assert listed.returncode == 0, listed.stderr
    assert all(name in listed.stdout for name in ("digits", "cifar10", "imagenet-r", "fairface", "voc2007"))
    assert len(command("data", "list", "--csv").stdout.splitlines()) == 44
    for name, told in (("cifar10", "train 50,000, test 10,000"), ("digits", "train 776, validation 139, test 882"), ("voc2007", "11-point mAP")):
        shown = command("data", "show", name)
        assert shown.returncode == 0 and told in shown.stdout, shown.stdout + shown.stderr
    assert len(json.loads(command("data", "show", "imagenet", "--json").stdout)["classnames"]) == 1000
    nowhere = command("data", "check", "cifar10", "--folder", tmp_path)
    assert nowhere.returncode == 1 and "cifar-10-batches-py" in nowhere.stderr and "Traceback" not in nowhere.stderr


def test_what_the_paper_printed():
    found = command("published", "--model", "RN50", "--data", "cifar10")
    assert found.returncode == 0 and "75.6 %" in found.stdout and "88.7 %" in found.stdout and "[H] arXiv" in found.stdout, found.stderr
    wrong = command("published", "--model", "RN51")
    assert wrong.returncode == 1 and "perhaps 'RN50'" in wrong.stderr and "Traceback" not in wrong.stderr


def test_two_results_side_by_side(tmp_path):
    assert command("eval", "--data", "photographs", "--results", tmp_path).returncode == 0
    names = Results(tmp_path).names()
    same = command("results", "compare", names[0], names[0], "--results", tmp_path)
    assert same.returncode == 0 and "paired" in same.stdout, same.stderr
    other = command("results", "compare", *names[:2], "--results", tmp_path)
    assert other.returncode == 1 and "different classnames" in other.stderr
    assert command("results", "list", "--results", tmp_path, "--csv").stdout.startswith("id,model,data,target,task,")


def test_examples_are_the_same_in_every_form(tmp_path):
    "Text, CSV and figure of one draw; another seed is another draw; what is wrong is named before a model is loaded."
    pytest.importorskip("matplotlib")
    asked = ("examples", "--data", "digits,rendered-sentiment", "--top", "3")
    here = lambda *words: CliRunner().invoke(app, [str(w) for w in words])
    told, table, other = here(*asked, "--out", tmp_path / "a.svg"), here(*asked, "--csv"), here(*asked, "--csv", "--seed", "1")
    assert told.exit_code == table.exit_code == other.exit_code == 0, told.output + table.output
    rows = pd.read_csv(io.StringIO(table.stdout))
    assert rows.groupby("example").right.sum().tolist() == [1, 1] and set(rows["data"]) == {"digits", "rendered-sentiment"}
    for row in rows.itertuples(): assert any(str(row.classname) in line and f"{row.probability:.1%}" in line and ("*" in line) == row.right for line in told.stdout.splitlines()), row
    assert (tmp_path / "a.svg").read_text().count("✓") == 2 and "drawn into" in told.stderr
    assert pd.read_csv(io.StringIO(other.stdout)).picture.tolist() != rows.picture.tolist()
    for wrong, says in ((("--target", "colour"), "no set has a question 'colour'; there is digit"), (("--out", "a.gif"), "a.gif: figures are saved as .svg, .pdf or .png")):
        assert says in str(here("examples", "--data", "digits", *wrong).exception)
