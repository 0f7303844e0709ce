"""The sealed audit: what goes wrong with pictures, tables and files, what a spreadsheet and a browser make of hostile names, and the command as a user starts it."""
from dataclasses import replace
import json
from pathlib import Path
import subprocess
import sys

import numpy as np
import pandas as pd
from PIL import Image
import pytest
import torch

from clip_lab.audits import card
from clip_lab.audits.card import Plan, audit, check_seal, compare_audits, read_audit, repeat, same_numbers, write_audit
from clip_lab.audits.labels import Category, Label, LabelSet, label_set, save_labels
from clip_lab.audits.people import People, emoji_people
from clip_lab.audits.sources import open_people
from clip_lab.data.labelled import Labelled, Pictures
from clip_lab.evals.stats import difference, fisher
from clip_lab.pretrained import load
from clip_lab.ui.report import audit_html, comparison_html

EVIL = "=1+1<script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def model(): return load()


@pytest.fixture(scope="module")
def few():
    "Sixty drawn people, twenty of each gender."
    people = emoji_people("noto")
    g = people.group("gender")
    return people.select(np.sort(np.concatenate([np.flatnonzero(g.codes == i)[::20][:20] for i in range(3)])))


@pytest.fixture(scope="module")
def plan(): return Plan([label_set("paper-21")], by=["gender"], thresholds=[0.04])


@pytest.fixture(scope="module")
def made(model, few, plan): return audit(*model, few, plan, keep_answers=True, progress=False)


def with_broken_picture(people):
    "The same people, and one whose file is no picture."
    data, rows = people.data, people.data.table
    pictures = Pictures([*data.pictures.sources, b"not a picture"], [*data.pictures.names, "broken.png"], data.pictures.background)
    return People(Labelled(data.name, pictures, pd.concat([rows, rows.iloc[:1]])), people.attributes, people.provenance)


def test_an_unreadable_picture_is_left_out_noted_and_changes_nothing_else(model, few, plan, made):
    with pytest.warns(UserWarning, match="could not be read"): found = audit(*model, with_broken_picture(few), plan, progress=False, keep_answers=True)
    assert "1 of 61 pictures" in found.notes[0] and "broken.png" in found.notes[0]
    same_numbers(made, found)
    assert found.asked["pictures"] == 60 and found.asked["data_hash"] == made.asked["data_hash"]
    assert "broken.png" in audit_html(found)


def test_nothing_readable_is_an_error(model, few, plan):
    broken = People(Labelled("broken", Pictures([b"x"] * 60), few.data.table), few.attributes, few.provenance)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="none of its 60 pictures could be read"): audit(*model, broken, plan, progress=False)


def test_a_group_of_nobody_and_a_missing_attribute_are_errors(model, few):
    with pytest.raises(ValueError, match="cannot group by 'income'"): audit(*model, few, Plan([label_set("paper-21")], by=["income"]), progress=False)
    with pytest.raises(ValueError, match="a probability threshold lies between 0 and 1"): Plan([label_set("paper-21")], thresholds=[0.5, 1])


def test_counts_are_those_of_a_plain_loop(made, few):
    best, gender = made.tables["answers"]["paper-21"], few.data.table.gender.astype(str)
    labels = made.tables["labels"].query("threshold == 0")
    for row in labels.itertuples(): assert row.k == ((best == row.label) & (gender == row.group)).sum() and row.n == (gender == row.group).sum()
    kinds = label_set("paper-21").table().set_index("label").category
    for row in made.tables["harm"].itertuples():
        if row.category in set(kinds): assert row.k == ((best.map(kinds) == row.category) & (gender == row.group)).sum()


def test_other_pictures_are_compared_without_pairs(model, made, plan):
    other = audit(*model, emoji_people("twemoji"), plan, progress=False)
    found = compare_audits(made, other)
    assert set(found.how) == {"other pictures"}
    for row in found.sample(12, random_state=0).itertuples():
        by_hand = difference(row.k_2, row.n_2, row.k_1, row.n_1)
        assert (row.difference, row.low, row.high) == pytest.approx((by_hand.value, by_hand.low, by_hand.high)) and row.p == pytest.approx(fisher(row.k_2, row.n_2, row.k_1, row.n_1).p)


def test_an_audit_beside_itself_differs_nowhere(made):
    found = compare_audits(made, made, thresholds=True)
    assert (found.difference == 0).all() and (found.p_adjusted == 1).all() and set(found[found.threshold == 0].how) == {"paired"}


def test_audits_without_a_common_question_are_not_compared(model, few, made):
    two = audit(*model, few, Plan([label_set("occupations"), label_set("paper-21-child")], by=["gender"]), progress=False)
    with pytest.raises(ValueError, match="no label set in common"): compare_audits(made, two)
    with pytest.raises(ValueError, match="no group in common"): compare_audits(made, audit(*model, few, Plan([label_set("paper-21")], by=["role"]), progress=False))


@pytest.mark.parametrize("spoil, message", [(lambda f: (f / "tables" / "harm.csv").write_text("k\n1\n"), "harm.csv was changed"), (lambda f: (f / "tables" / "harm.csv").unlink(), "harm.csv was removed"),
                                            (lambda f: (f / "more.txt").write_text("x"), "more.txt was added")])
def test_a_seal_names_what_was_done_to_a_folder(tmp_path, made, spoil, message):
    folder = write_audit(made, tmp_path / "report")
    check_seal(folder)
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=folder).returncode == 0
    spoil(folder)
    with pytest.raises(ValueError, match=message): read_audit(folder)


def test_a_question_that_was_changed_is_found_even_under_a_new_seal(tmp_path, made):
    folder = write_audit(made, tmp_path / "report")
    file = folder / "audit.json"
    content = json.loads(file.read_text())
    content["asked"]["plan"]["label_sets"][0]["labels"][0]["words"] = "a friendly man"
    file.write_text(json.dumps(content))
    card.seal(folder)
    with pytest.raises(ValueError, match="the question of audit"): read_audit(folder)


def test_another_model_cannot_repeat_an_audit(model, few, made):
    other, preprocess = load()
    with torch.no_grad(): other.logit_scale.add_(0.1)
    with pytest.raises(ValueError, match="weights_hash"): repeat(made, other, preprocess, few, progress=False)


def test_a_full_folder_is_left_alone(tmp_path, made):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and no audit"): write_audit(made, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.fixture(scope="module")
def hostile(model, few):
    labels = LabelSet("mine", "1", "a test", (Label(EVIL, "a jolly <b>", "base"), Label("person", "a person", "base"), Label("thief", "a thief", "crime")), {"base": Category(False), "crime": Category(True)})
    table = few.data.table.assign(gender=few.data.table.gender.astype(str).replace("woman", EVIL))
    people = People(Labelled(few.data.name, few.data.pictures, table), ["gender"], few.provenance)
    return audit(*model, people, Plan([labels]), progress=False)


def test_names_cannot_run_in_a_spreadsheet(tmp_path, hostile):
    folder = write_audit(hostile, tmp_path / "report")
    for file in (folder / "tables").glob("*.csv"):
        cells = pd.read_csv(file, dtype=str, keep_default_na=False)
        texts = [c for c in [*cells.columns, *cells.to_numpy().ravel()] if c[:1] in tuple("=+@\t\r") or c[:1] == "-" and not c[1:2].isdigit()]
        assert not texts, (file.name, texts[:3])


@pytest.mark.browser
def test_the_page_is_quiet_at_both_widths_and_runs_nothing(tmp_path, hostile):
    sync = pytest.importorskip("playwright.sync_api", reason="needs Playwright")
    if not Path("/usr/bin/chromium").exists(): pytest.skip("needs /usr/bin/chromium")
    pages = {"audit.html": audit_html(hostile), "both.html": comparison_html(hostile, hostile)}
    for name, text in pages.items(): (tmp_path / name).write_text(text, encoding="utf-8")
    with sync.sync_playwright() as p:
        browser = p.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"])
        for width in (1280, 390):
            for name in pages:
                page, asked = browser.new_page(viewport={"width": width, "height": 900}), []
                page.on("request", lambda r: asked.append(r.url))
                page.goto(f"file://{tmp_path / name}")
                assert "owned" not in page.title() and page.locator("main h1").count() == 1
                assert [u for u in asked if not u.startswith(("file:", "data:"))] == []
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0 && i.alt.length > 30)")
                page.close()
        browser.close()


@pytest.fixture
def command(monkeypatch, capsys):
    "`clip-lab audit` in this process: exit code, standard output, standard error."
    from clip_lab.__main__ import main
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["clip-lab", "audit", *map(str, words)])
        with pytest.raises(SystemExit) as left: main()
        said = capsys.readouterr()
        return left.value.code or 0, said.out, said.err
    return run


def test_a_folder_of_ones_own_from_the_shell(tmp_path, few, command):
    data, report = tmp_path / "people", tmp_path / "report"
    data.mkdir()
    for i in range(len(few)): (data / f"{i}.png").write_bytes(few.data.pictures.encoded(i))
    pd.DataFrame({"file": [f"{i}.png" for i in range(len(few))], "gender": few.data.table.gender.astype(str)}).to_csv(data / "table.csv", index=False)
    code, out, err = command("--data", data, "--out", report)
    assert code == 1 and "provenance.yaml is not there" in err and not report.exists()
    (data / "provenance.yaml").write_text("\n".join(f"{k}: drawn" for k in ("shows", "source", "attributes", "consent", "limits")))
    own = save_labels(label_set("paper-21").add("juggler", "base", "a person juggling"), tmp_path / "mine.yaml")
    code, out, err = command("--data", data, "--labels", own, "--minimum", 10, "--out", report)
    assert code == 0 and "woman" in out and (report / "index.html").is_file() and "bias-audit" in (report / "model_card.md").read_text(), err
    code, out, err = command("--again", report)
    assert code == 0 and "came out the same" in out, err
    code, out, err = command("--compare", report, report)
    assert code == 0 and "both asked the same" in out, err
    Image.new("RGB", (64, 64)).save(data / "0.png")
    code, out, err = command("--again", report)
    assert code == 1 and "pictures and attributes" in err
    code, out, err = command("--labels", "paper-22")
    assert code == 1 and "no label set 'paper-22'; shipped are" in err


def test_a_source_that_is_nothing_says_what_is_possible():
    with pytest.raises(ValueError, match="Expected emoji, emoji:noto"): open_people("nowhere")
