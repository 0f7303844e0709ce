"""The store of a study, the same tests on SQLite and PostgreSQL: exactly once, balanced seats, deletion, faults, migrations."""
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
import json
import os
import subprocess
import sys

import pandas as pd
import pytest

sa = pytest.importorskip("sqlalchemy", reason="the study's database needs SQLAlchemy: pip install 'clip_lab[study]'")
import clip_lab
from clip_lab.humans.analysis import apply_exclusions
from clip_lab.humans.design import DONT_KNOW, Exclusion, demo_design, open_study
from clip_lab.humans.models import model_answers
from clip_lab.humans import store as room
from clip_lab.humans.store import ANSWERS, METADATA, PEOPLE, SEATS, STUDY, WITHDRAWN, Refused, Store, Unavailable, answers_table, balance_table, check_finish_codes, delete_code, people_table, recruitment
from clip_lab.ui.researcher import results_html
from databases import new_database, postgres_server, why_no_postgres

CLASSES = ("Brazil", "Canada", "Japan", "United Kingdom", "Bhutan", "Kiribati")
SMALL = dict(classes=CLASSES, shots=(0, 1), pictures_per_participant=6, practice=1)


@pytest.fixture(scope="session")
def study(): return open_study(demo_design(**SMALL, repeats=5))


@pytest.fixture(scope="session")
def postgres():
    if reason := why_no_postgres(): pytest.skip(reason)
    with postgres_server() as folder: yield folder


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    return f"sqlite:///{tmp_path}/study.db" if request.param == "sqlite" else new_database(request.getfixturevalue("postgres"))


@pytest.fixture
def store(url, study):
    store = Store(url, study)
    yield store
    store.close()


def run_through(store, key, answer=lambda trial: trial.wanted, seconds=0.0):
    person = store.enrol(key)
    while person.current: person = store.answer(key, person.current.id, answer(person.current), seconds)
    return person


# ---- exactly once

def test_an_answer_is_kept_once_whatever_is_pressed(store):
    key = store.ticket()
    person = store.enrol(key)
    first, second = person.trials[:2]
    done = store.answer(key, first.id, "Japan", 0.0)
    assert store.answer(key, first.id, "Japan", 9.0) == done and done.done == 1
    for wrong, kind in ((("Canada", first), "answered"), (("Japan", person.trials[2]), "turn"), (("Atlantis", second), "choice")):
        with pytest.raises(Refused) as refused: store.answer(key, wrong[1].id, wrong[0])
        assert refused.value.kind == kind
    table = answers_table(store)
    assert table.answer.tolist() == ["Japan"] and table.trial.tolist() == [first.id] and table.seconds.tolist() == [0.0]
    assert store.come_back(key) == done


def test_many_windows_at_once_leave_one_answer(store):
    key = store.ticket()
    trial = store.enrol(key).current
    def press(answer):
        try: return store.answer(key, trial.id, answer).done
        except Refused as refused: return refused.kind
    with ThreadPoolExecutor(12) as pool: replies = list(pool.map(press, list(CLASSES) * 4))
    assert replies.count(1) == 4 and replies.count("answered") == 20            # the stored one, four times; the others are told
    assert len(answers_table(store)) == 1


def test_the_database_itself_refuses_a_second_answer(store):
    key = store.ticket()
    person = store.enrol(key)
    store.answer(key, person.current.id, "Japan")
    with pytest.raises(sa.exc.IntegrityError), store.engine.begin() as c:
        row = dict(c.execute(sa.select(ANSWERS)).mappings().one())
        c.execute(ANSWERS.insert().values({k: v for k, v in row.items() if k != "id"} | {"answer": "Canada"}))
    with pytest.raises(sa.exc.IntegrityError), store.engine.begin() as c: c.execute(ANSWERS.insert().values({k: v for k, v in row.items() if k != "id"} | {"participant": "nobody"}))
    assert answers_table(store).answer.tolist() == ["Japan"]


def test_the_rows_say_what_was_asked(store, study):
    key = store.ticket()
    person = run_through(store, key)
    table = answers_table(store)
    assert table.trial.tolist() == [t.id for t in study.trials(person.seat)]
    for column in ("number", "block", "shots", "kind", "picture", "truth"): assert table[column].tolist() == [getattr(t, column) for t in study.trials(person.seat)]
    assert [None if pd.isna(x) else x for x in table.instructed] == [t.instructed for t in study.trials(person.seat)]
    assert set(table.participant) == {person.id} and set(table.seat) == {person.seat} and (table["at"].diff().dropna() >= timedelta(0)).all()
    assert str(table["at"].dt.tz) == "UTC"


@pytest.mark.parametrize("seconds, whose", [(0.0, "browser"), (4.9, "browser"), (None, "server"), (-1, "server"), (1e9, "server"), (float("nan"), "server"), (True, "server"), ("1", "server")])
def test_impossible_times_are_replaced_by_the_servers(tmp_path, study, seconds, whose):
    store = Store(f"sqlite:///{tmp_path}/s.db", study)
    key = store.ticket()
    store.answer(key, store.enrol(key).current.id, "Japan", seconds)
    row = answers_table(store).iloc[0]
    assert row.timed_by == whose and (row.seconds == seconds if whose == "browser" else 0 <= row.seconds < 60)


# ---- taking back

def test_undo_keeps_the_history(store):
    key = store.ticket()
    person = store.enrol(key)
    while person.current.kind == "practice": person = store.answer(key, person.current.id, "Japan")
    with pytest.raises(Refused, match="no answer that can be taken back"): store.undo(key, person.trials[person.done - 1].id)      # practice has shown its solution
    trial, following = person.trials[person.done:person.done + 2]
    assert store.answer(key, trial.id, "Japan").undoable
    back = store.undo(key, trial.id)
    assert back.current == trial and not back.undoable and store.undo(key, trial.id) == back
    store.answer(key, trial.id, "Canada")
    with pytest.raises(Refused): store.undo(key, following.id)
    store.undo(key, trial.id)
    store.answer(key, trial.id, DONT_KNOW)
    assert answers_table(store).answer.tolist()[-1] == DONT_KNOW
    assert answers_table(store, withdrawn=True).answer.tolist() == ["Japan", "Canada"] and people_table(store)["taken back"].tolist() == [2]


def test_nothing_is_taken_back_across_blocks_or_after_the_end_or_against_the_design(url):
    store = Store(url, open_study(demo_design(**SMALL, repeats=1)))
    key = store.ticket()
    person = store.enrol(key)
    while person.current.block < 1: last, person = person.current, store.answer(key, person.current.id, "Japan")
    with pytest.raises(Refused, match="taken back"): store.undo(key, last.id)
    person = run_through(store, key)
    assert person.finished and not person.undoable
    with pytest.raises(Refused, match="taken back"): store.undo(key, person.trials[-1].id)
    store.close()


def test_a_design_without_undo(tmp_path):
    store = Store(f"sqlite:///{tmp_path}/s.db", open_study(demo_design(**SMALL, repeats=1, undo=False)))
    key = store.ticket()
    person = store.enrol(key)
    for _ in range(3): last, person = person.current, store.answer(key, person.current.id, "Japan")
    assert not person.undoable
    with pytest.raises(Refused, match="taken back"): store.undo(key, last.id)


# ---- seats

def test_seats_are_dealt_once_and_the_plan_comes_out(store, study):
    with ThreadPoolExecutor(8) as pool: people = list(pool.map(lambda _: run_through(store, store.ticket()), range(study.seats)))
    assert sorted(p.seat for p in people) == list(range(1, study.seats + 1))
    with pytest.raises(Refused) as refused: store.enrol(store.ticket())
    assert refused.value.kind == "full"
    balance = balance_table(store)
    assert (balance.planned == balance.answered).all() and balance.planned.min() >= 5
    assert recruitment(store).finished.tolist() == [study.seats]
    codes = [store.finish_code(p) for p in people]
    assert len(set(codes)) == study.seats and check_finish_codes(store, [*codes, "", "x" * 999]).good.tolist() == [True] * study.seats + [False] * 2


def test_enrolling_again_costs_no_seat(store):
    key = store.ticket()
    with ThreadPoolExecutor(6) as pool: people = set(pool.map(lambda _: store.enrol(key).id, range(6)))
    assert len(people) == 1 and {store.enrol(key).id for _ in range(5)} == people
    assert recruitment(store).free[0] == store.study.seats - 1


@pytest.mark.parametrize("unfinished", [False, True])
def test_who_left_is_judged_by_the_declared_rule_for_the_unfinished(tmp_path, unfinished):
    "Half a study, then the seat is given again: the answers count unless the design said beforehand that unfinished ones do not."
    declared = open_study(demo_design(**SMALL, repeats=5, exclude=Exclusion(unfinished=unfinished)))
    store = Store(f"sqlite:///{tmp_path}/study.db", declared)
    keys = [store.ticket() for _ in range(declared.seats)]
    people = [store.enrol(key) for key in keys]
    half = next(i for i, trial in enumerate(people[0].trials) if trial.block == 1)
    for trial in people[0].trials[:half]: store.answer(keys[0], trial.id, trial.wanted, 5.0)
    for key in keys[1:]: run_through(store, key, seconds=5.0)
    store.release_after = timedelta(0)
    newcomer = store.ticket()
    assert store.enrol(newcomer).seat == people[0].seat                  # the same trials once more, by somebody else
    run_through(store, newcomer, seconds=5.0)
    store.release_after = timedelta(minutes=30)
    assert recruitment(store).left[0] == 1
    kept, judged = apply_exclusions(answers_table(store), declared)
    left = judged.set_index("participant").loc[people[0].id]
    assert left.excluded == unfinished and left.why == ("unfinished" if unfinished else "") and len(judged) == declared.seats + 1
    assert (people[0].id in set(kept.participant)) != unfinished
    page = results_html(store, model_answers(declared, *clip_lab.load()), "emoji")
    assert (f"1 of {declared.seats + 1} people are left out by the rules of the design: unfinished." if unfinished else "1 person counts with the answers they gave so far") in page
    store.close()


def test_results_where_the_rules_leave_nobody(tmp_path):
    declared = open_study(demo_design(**SMALL, repeats=5, exclude=Exclusion(unfinished=True)))
    store = Store(f"sqlite:///{tmp_path}/study.db", declared)
    person = store.enrol(key := store.ticket())
    for trial in person.trials[:6]: store.answer(key, trial.id, trial.wanted, 5.0)
    page = results_html(store, model_answers(declared, *clip_lab.load()), "emoji")
    assert "1 of 1 person is left out by the rules of the design: unfinished." in page and "No answers are left by the rules of the design." in page and "Table 2" not in page
    store.close()


def test_one_persons_answers_and_everybodys(store):
    keys = [store.ticket() for _ in range(2)]
    people = [store.enrol(key) for key in keys]
    for key, person in zip(keys, people): run_through(store, key)
    whole = answers_table(store)
    mine = answers_table(store, participant=people[1].id)
    assert mine.equals(whole[whole.participant == people[1].id].reset_index(drop=True)) and len(mine) == len(people[1].trials) and answers_table(store, participant="nobody").empty
    assert people_table(store, whole).equals(people_table(store))


def test_the_seat_of_the_longest_silent_is_given_again(store, study):
    keys = [store.ticket() for _ in range(study.seats)]
    people = [store.enrol(key) for key in keys]
    run_through(store, keys[0])
    store.answer(keys[1], people[1].current.id, "Japan")                 # the second is the one who was heard last
    store.release_after = timedelta(0)
    newcomer = store.enrol(store.ticket())
    assert newcomer.seat == people[2].seat and newcomer.done == 0
    with pytest.raises(Refused) as refused: store.come_back(keys[2])
    assert refused.value.kind == "gone"
    assert store.come_back(keys[0]).finished                             # who finished keeps the seat
    row = recruitment(store).iloc[0]
    assert row.left == 1 and row.finished == 1 and row.free == 0
    store.delete(delete_code(keys[2]))                                   # and may still delete
    assert recruitment(store).left[0] == 0


SERVER = """
import json, sys, time
from clip_lab.humans.design import demo_design, open_study
from clip_lab.humans.store import Refused, Store
url, changes = sys.argv[1], json.loads(sys.argv[2])
study = open_study(demo_design(**changes))
print("ready", flush=True)
sys.stdin.readline()
store, seats = Store(url, study), []
while True:
    key = store.ticket()
    try: person = store.enrol(key)
    except Refused as refused: break
    seats.append(person.seat)
    store.answer(key, person.current.id, "Japan")
    time.sleep(0.02)
print(json.dumps(seats))
"""


@pytest.mark.slow
def test_two_servers_start_together_and_deal_every_seat_once(url):
    "Both find an empty database, both bring it to the newest schema, both deal."
    changes = json.dumps(SMALL | {"repeats": 5, "participants": 60})
    servers = [subprocess.Popen([sys.executable, "-c", SERVER, url, changes], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for server in servers: assert server.stdout.readline() == "ready\n"
    for server in servers: server.stdin.write("go\n"); server.stdin.flush()
    dealt = []
    for server in servers:
        out, problem = server.communicate(timeout=180)
        assert server.returncode == 0, problem[-3000:]
        dealt.append(json.loads(out))
    assert sorted(dealt[0] + dealt[1]) == list(range(1, 61))
    assert min(map(len, dealt)) > 0, "one server dealt everything: they did not run at the same time"


# ---- deleting

def test_deleting_takes_everything_of_one_person_and_nothing_else(store):
    keys = [store.ticket(), store.ticket()]
    people = [store.enrol(key) for key in keys]
    for key, person in zip(keys, people):
        for _ in range(3): last, person = person.current, store.answer(key, person.current.id, "Japan")
        store.undo(key, last.id)
    assert store.delete(delete_code(keys[0]).replace("-", "").upper()) == 2
    for table in (ANSWERS, WITHDRAWN):
        with store.reading() as c: assert c.scalars(sa.select(table.c.participant).distinct()).all() == [people[1].id]
    with store.reading() as c: assert c.scalar(sa.select(SEATS.c.participant).where(SEATS.c.seat == people[0].seat)) is None
    assert store.enrol(store.ticket()).seat == people[0].seat and recruitment(store).deleted[0] == 1
    for wrong in (delete_code(keys[0]), "", "0" * 19, "' OR 1=1 --", "x" * 100_000):
        with pytest.raises(Refused) as refused: store.delete(wrong)
        assert refused.value.kind == "code"
    assert len(answers_table(store)) == 2


def test_keys_and_codes_are_not_in_the_database(store):
    key = store.ticket()
    person = run_through(store, key)
    with store.engine.connect() as c: everything = str([c.execute(sa.select(table)).all() for table in METADATA.sorted_tables])
    for secret in (key, key[:32], delete_code(key), store.finish_code(person)): assert secret not in everything
    assert person.id not in key and person.id not in delete_code(key)


@pytest.mark.parametrize("key", ["", "x" * 48, "short", "ä" * 48, None, 7, "x" * 10_000])
def test_made_up_keys_are_refused_before_the_database_is_asked(tmp_path, study, key, monkeypatch):
    store = Store(f"sqlite:///{tmp_path}/s.db", study)
    monkeypatch.setattr(store, "_row", None)
    for act in (store.enrol, store.come_back, lambda k: store.answer(k, "s1-000", "Japan"), lambda k: store.undo(k, "s1-000")):
        with pytest.raises(Refused) as refused: act(key)
        assert refused.value.kind == "link"


# ---- faults

def test_a_full_disk_stores_nothing_and_says_so(tmp_path, study):
    store = Store(f"sqlite:///{tmp_path}/s.db", study)
    key = store.ticket()
    person, kept = store.enrol(key), 0
    with store.engine.connect() as c: pages = c.exec_driver_sql("PRAGMA page_count").scalar()
    store.engine.dispose()
    limit = lambda connection, _: connection.execute(f"PRAGMA max_page_count={pages}").close()     # SQLite then says what it says on a full disk
    sa.event.listen(store.engine, "connect", limit)
    with pytest.raises(Unavailable, match="disk of the study's server is full. Nothing was stored"):
        for _ in range(5):
            for key, person in [(key, person)] if not kept else [(k := store.ticket(), store.enrol(k))]:
                while person.current: person, kept = store.answer(key, person.current.id, person.current.wanted), kept + 1
    assert len(answers_table(store)) == kept > 0
    sa.event.remove(store.engine, "connect", limit)
    store.engine.dispose()                                               # somebody made room: the same answer goes through
    person = store.enrol(key)
    if person.current: store.answer(key, person.current.id, person.current.wanted)
    assert len(answers_table(store)) == kept + bool(person.current)


def test_a_locked_database_is_not_an_acknowledgement(tmp_path, study, monkeypatch):
    monkeypatch.setitem(room.PRAGMAS, "busy_timeout", "50")
    store = Store(f"sqlite:///{tmp_path}/s.db", study)
    key = store.ticket()
    person = store.enrol(key)
    import sqlite3
    other = sqlite3.connect(tmp_path / "s.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable, match="busy"): store.answer(key, person.current.id, "Japan")
    other.execute("ROLLBACK"); other.close()
    assert len(answers_table(store)) == 0 and store.answer(key, person.current.id, "Japan").done == 1


def test_postgres_going_away_and_coming_back(postgres, study):
    import psycopg
    store = Store(url := new_database(postgres), study)
    key = store.ticket()
    person = store.enrol(key)
    with psycopg.connect(host=str(postgres), user="clip_lab", dbname="postgres", autocommit=True) as c:
        c.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [url.split("/")[3].split("?")[0]])
    assert store.answer(key, person.current.id, "Japan").done == 1       # the pool looks before it uses a connection
    gone = Store.__new__(Store)
    with pytest.raises(Unavailable, match="does not answer"): gone.__init__("postgresql://clip_lab@/study?host=/nowhere", study)
    store.close()


# ---- the schema and the design

def test_the_migrations_make_the_schema_that_the_code_uses(store):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    with store.engine.connect() as c: assert compare_metadata(MigrationContext.configure(c), METADATA) == []
    names = {t.name for t in METADATA.sorted_tables} | {"alembic_version"}
    assert set(sa.inspect(store.engine).get_table_names()) == names
    for table in (ANSWERS, PEOPLE, SEATS): assert {tuple(u["column_names"]) for u in sa.inspect(store.engine).get_unique_constraints(table.name)} >= {
        "answers": {("participant", "trial")}, "participants": {("link_hash",), ("delete_hash",)}, "seats": {("participant",)}}[table.name]


def test_a_database_of_a_newer_version_is_refused(store, url, study):
    with store.engine.begin() as c: c.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(ValueError, match="newer version of clip_lab"): Store(url, study)


def test_another_design_or_other_pictures_are_refused(store, url, study):
    with pytest.raises(ValueError, match="A running study keeps its design"): Store(url, open_study(demo_design(**SMALL, repeats=5, seed=9)))
    with store.engine.begin() as c: c.execute(STUDY.update().values(materials_hash="0" * 16))
    with pytest.raises(ValueError, match="its pictures have changed"): Store(url, study)


@pytest.mark.parametrize("url, message", [("sqlite://", "in memory is lost"), ("sqlite:///:memory:", "in memory is lost"), ("mysql://x@y/z", "expected sqlite:///study.db or postgresql://")])
def test_other_databases_are_refused(url, message, study):
    with pytest.raises(ValueError, match=message): Store(url, study)


def test_sqlite_is_set_up_for_a_study(tmp_path, study):
    store = Store(f"sqlite:///{tmp_path}/s.db", study)
    with store.engine.connect() as c: assert [c.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous", "foreign_keys", "secure_delete")] == ["wal", 2, 1, 1]
    assert "hide_parameters=True" in repr(store.engine) or store.engine.hide_parameters      # no answer in a traceback


def test_missing_libraries_are_named():
    code = "import sys; sys.modules['sqlalchemy'] = None\ntry: import clip_lab.humans.store\nexcept ImportError as e: print(e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ)
    assert "pip install 'clip_lab[study]'" in done.stdout, done.stderr[-1000:]
