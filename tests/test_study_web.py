"""The study over HTTP: what the page is told, what strangers and mistakes get, faults, and a server that is killed while people answer."""
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("sqlalchemy", reason="the study's database needs SQLAlchemy: pip install 'clip_lab[study]'")
pytest.importorskip("starlette", reason="the study's server needs Starlette: pip install 'clip_lab[apps]'")
pytest.importorskip("httpx", reason="Starlette's test client needs httpx")
import sqlalchemy as sa
from starlette.testclient import TestClient

from clip_lab.humans.design import DONT_KNOW, demo_design, open_study, save_design
from clip_lab.humans.exports import EXPORTS
from clip_lab.humans.store import Store, answers_table, delete_code
from clip_lab.humans import web
from clip_lab.humans.web import Door, Limit, study_app

ROOT = Path(__file__).parents[1]
TOKEN = "the token of these tests"
CLASSES = ("Brazil", "Canada", "Japan", "United Kingdom", "Bhutan", "Kiribati")
DESIGN = dict(classes=CLASSES, shots=(0, 1), pictures_per_participant=6, practice=1, repeats=5)
EVIL = "<img src=x onerror=alert(1)>'; DROP TABLE answers; --"


@pytest.fixture(scope="module")
def study(): return open_study(demo_design(**DESIGN))


@pytest.fixture
def store(tmp_path, study):
    store = Store(f"sqlite:///{tmp_path}/study.db", study)
    yield store
    store.close()


@pytest.fixture
def client(store): return TestClient(study_app(store, TOKEN), base_url="http://127.0.0.1", raise_server_exceptions=False)


class Someone:
    "A participant over the test client."
    def __init__(self, client):
        self.client, self.key = client, client.get("/api/study").json()["key"]
        self.state = self.post("enrol", consent=True).json()

    def post(self, name, **body): return self.client.post(f"/api/{name}", json=body, headers={"Authorization": f"Bearer {self.key}"})

    def answer(self, value="Japan", **more):
        reply = self.post("answer", **{"trial": self.state["trial"]["id"], "answer": value, "seconds": 0.0} | more)
        if reply.status_code == 200: self.state = reply.json()
        return reply


# ---- what the page is told

def test_a_participant_goes_through_and_the_truth_never_travels(client, store, study):
    someone, heard, seat_trials = None, [], None
    someone = Someone(client)
    heard.append(someone.state)
    while someone.state["trial"]:
        trial = someone.state["trial"]
        seat_trials = seat_trials or study.trials(int(trial["id"][1:].split("-")[0]))
        assert set(trial) == {"id", "picture", "practice", "instructed"}
        heard.append(someone.answer(trial["instructed"]["value"] if trial["instructed"] else DONT_KNOW).json())
    assert someone.state["finish_code"] and len(answers_table(store)) == len(seat_trials)
    for reply, trial in zip(heard[1:], seat_trials):
        assert ("solution" in reply) == (trial.kind == "practice")
    plain = [{k: v for k, v in reply.items() if k not in ("instructions", "examples", "solution")} for reply in heard]
    for reply in plain:
        if reply["trial"]: reply["trial"] = reply["trial"] | {"instructed": None}
        assert not any(word in json.dumps(reply) for word in (*CLASSES, "truth", "attention", "obvious", "right", "correct"))


def test_examples_come_only_in_the_blocks_that_show_them(client, study):
    someone, seen = Someone(client), {}
    while someone.state["trial"]:
        state = someone.state
        assert bool(state.get("examples")) == (state["first"] and state["block"] >= 0 and state["shots"] > 0)
        if state["block"] == 0: assert set(study.examples(1)["Japan"]).isdisjoint(json.dumps(state).split('"'))
        back = someone.post("state").json()
        assert bool(back["examples"]) == (state["block"] >= 0 and state["shots"] > 0) and back["instructions"] == study.instructions(state["block"])
        if state["first"]: seen[state["block"]] = back["examples"]
        someone.answer()
    assert seen[1] == study.examples(1) and seen[0] == {} == seen[-1]


def test_coming_back_gives_the_same_trial_and_the_same_order(client):
    someone = Someone(client)
    for _ in range(4): someone.answer()
    left = someone.state["trial"]
    back = someone.post("state").json()
    assert back["trial"] == left and back["done"] == 4 and someone.post("enrol", consent=True).json()["trial"] == left


def test_breaks_are_offered_where_the_design_says(tmp_path):
    store = Store(f"sqlite:///{tmp_path}/s.db", open_study(demo_design(**DESIGN | {"break_every": 3})))
    someone, breaks = Someone(TestClient(study_app(store, TOKEN))), []
    while someone.state["trial"]:
        if someone.state["break"]: breaks.append(someone.state["done"])
        someone.answer()
    firsts = {i for i, t in enumerate(store.plan(1)[0]) if i and store.plan(1)[0][i - 1].block != t.block}
    assert breaks == [n for n in range(1, len(store.plan(1)[0])) if n > 1 and (n - 1) % 3 == 0 and n not in firsts] and breaks


def test_another_language_changes_what_is_shown_and_not_what_is_stored(tmp_path):
    design = demo_design(**DESIGN, translations={"de": {"title": "Flaggen", "question": "Welches Land?", "dont_know": "Weiß nicht", "instructions": "Bitte antworten.", "classes": {"Brazil": "Brasilien"}}})
    store = Store(f"sqlite:///{tmp_path}/s.db", open_study(design))
    client = TestClient(study_app(store, TOKEN))
    texts = client.get("/api/study?language=de").json()
    assert texts["title"] == "Flaggen" and {"value": "Brazil", "label": "Brasilien"} in texts["choices"] and texts["dont_know"] == {"value": DONT_KNOW, "label": "Weiß nicht"}
    someone = Someone(client)
    assert someone.post("state", language="de").json()["instructions"] == "Bitte antworten."
    assert someone.answer("Brasilien", language="de").status_code == 422 and someone.answer("Brazil", language="de").status_code == 200
    assert client.get("/api/study?language=xx").json()["title"] == design.title


# ---- what strangers and mistakes get

def test_forged_and_replayed_answers(client, store):
    one, two = Someone(client), Someone(client)
    first = one.state["trial"]["id"]
    kept = one.answer("Japan").json()
    assert one.post("answer", trial=first, answer="Japan").json() == kept                               # a retry: the same reply
    for body, status, kind in [(dict(trial=first, answer="Canada"), 409, "answered"), (dict(trial=two.state["trial"]["id"], answer="Japan"), 404, "trial"), (dict(trial=first[:-1] + "9", answer="Japan"), 409, "turn"),
                               (dict(trial=kept["trial"]["id"], answer="Atlantis"), 422, "choice"), (dict(trial=kept["trial"]["id"], answer=EVIL), 422, "choice"), (dict(trial=EVIL, answer="Japan"), 404, "trial")]:
        reply = one.post("answer", **body)
        assert (reply.status_code, reply.json()["error"]) == (status, kind), body
        assert not any(c in reply.text for c in CLASSES) and "<img" not in reply.text
    assert answers_table(store)[["trial", "answer"]].values.tolist() == [[first, "Japan"]]


@pytest.mark.parametrize("content, kind, status", [
    (b"", "application/json", 400), (b"[1]", "application/json", 400), (b"{" * 5000, "application/json", 400), (b"\xff\xfe", "application/json", 400), (b"{}", "text/plain", 415), (b"a=b", "application/x-www-form-urlencoded", 415),
    (b'{"trial": "' + b"x" * 9000 + b'"}', "application/json", 413), (b'{"trial": 1, "answer": "Japan"}', "application/json", 422), (b'{"trial": "s1-000"}', "application/json", 422),
    (b'{"trial": "s1-000", "answer": null}', "application/json", 422), (b'{"trial": "s1\\u0000", "answer": "Japan"}', "application/json", 422), (b'{"trial": "' + b"x" * 65 + b'", "answer": "Japan"}', "application/json", 422)])
def test_bodies_that_are_no_answers(client, store, content, kind, status):
    someone = Someone(client)
    reply = client.post("/api/answer", content=content, headers={"Authorization": f"Bearer {someone.key}", "Content-Type": kind})
    assert reply.status_code == status and reply.json()["text"] and "Traceback" not in reply.text
    assert len(answers_table(store)) == 0


@pytest.mark.parametrize("header, status", [({}, 401), ({"Authorization": "Basic abc"}, 401), ({"Authorization": "Bearer "}, 401), ({"Authorization": "Bearer " + "x" * 48}, 404), ({"Authorization": "Bearer ' OR 1=1 --"}, 404)])
def test_keys_that_are_none(client, header, status):
    for name in ("state", "enrol", "answer", "undo"):
        reply = client.post(f"/api/{name}", json={"consent": True, "trial": "s1-000", "answer": "Japan"}, headers=header)
        assert reply.status_code == status and reply.json()["text"]


def test_a_ticket_is_no_participant_and_without_consent_nobody_is(client, store):
    key = client.get("/api/study").json()["key"]
    me = {"Authorization": f"Bearer {key}"}
    assert client.post("/api/state", json={}, headers=me).status_code == 404
    for consent in (False, None, "true", 1): assert client.post("/api/enrol", json={"consent": consent}, headers=me).status_code == 422
    assert client.post("/api/enrol", json={}, headers=me).status_code == 422
    with store.reading() as c: assert c.scalar(sa.text("SELECT count(*) FROM participants")) == 0


def test_pictures_hold_nothing_but_pixels_and_others_are_not_there(client, store):
    someone = Someone(client)
    reply = client.get(f"/picture/{someone.state['trial']['picture']}.png")
    assert reply.headers["content-type"] == "image/png" and "immutable" in reply.headers["cache-control"]
    assert not re.search(rb"tEXt|iTXt|zTXt|eXIf", reply.content)
    for wrong in ("nothing", "..%2f..%2fetc%2fpasswd", "%00", "x" * 3000): assert client.get(f"/picture/{wrong}.png").status_code == 404


def test_too_many_enrolments_and_codes_wait(store):
    client = TestClient(study_app(store, TOKEN, enrolments=3))
    tries = [client.post("/api/enrol", json={"consent": True}, headers={"Authorization": f"Bearer {store.ticket()}"}) for _ in range(5)]
    assert [t.status_code for t in tries] == [200, 200, 200, 429, 429] and 0 < int(tries[-1].headers["retry-after"]) <= 61
    codes = [client.post("/api/delete", json={"code": f"wrong-{i}"}).status_code for i in range(12)]
    assert codes == [404] * 10 + [429] * 2


def test_deleting_over_http(client, store):
    one, two = Someone(client), Someone(client)
    for someone in (one, two): someone.answer(); someone.answer()
    code = one.state["delete_code"]
    assert code == delete_code(one.key)
    assert client.post("/api/delete", json={"code": code.upper()}).json() == {"deleted": 2}
    assert one.post("state").status_code == 404 and one.answer().status_code == 404
    assert set(answers_table(store).participant) == {two.state["participant"]}


def test_scores_are_told_only_to_who_finished_and_only_when_they_are_on(store, study):
    silent, telling = Someone(TestClient(study_app(store, TOKEN))), Someone(TestClient(study_app(store, TOKEN, scores=lambda person: [{"who": person.id}])))
    assert telling.post("scores").json() == {"scores": []}
    for someone in (silent, telling):
        while someone.state["trial"]: someone.answer()
    assert silent.post("scores").json() == {"scores": []} and telling.post("scores").json() == {"scores": [{"who": telling.state["participant"]}]}
    assert telling.client.get("/api/study").json()["scores"] is True and silent.client.get("/api/study").json()["scores"] is False


def test_a_full_study_says_so(tmp_path):
    study = open_study(demo_design(**DESIGN | {"repeats": 1}))
    client = TestClient(study_app(Store(f"sqlite:///{tmp_path}/s.db", study), TOKEN))
    for _ in range(study.seats): Someone(client)
    key = client.get("/api/study").json()["key"]
    reply = client.post("/api/enrol", json={"consent": True}, headers={"Authorization": f"Bearer {key}"})
    assert reply.status_code == 409 and "All places of this study are taken" in reply.json()["text"]


# ---- the page's rules

def test_every_reply_carries_the_rules(client):
    for path in ("/", "/study.js", "/study.css", "/api/study", "/nowhere", "/picture/x.png", "/api/answer"):
        reply = client.get(path)
        assert "default-src 'none'" in reply.headers["content-security-policy"] and "unsafe" not in reply.headers["content-security-policy"], path
        assert reply.headers["x-content-type-options"] == "nosniff" and reply.headers["x-frame-options"] == "DENY" and reply.headers["referrer-policy"] == "no-referrer"
    assert client.get("/nowhere").status_code == 404 and client.get("/api/answer").status_code == 405


def test_texts_of_a_design_are_text(tmp_path):
    store = Store(f"sqlite:///{tmp_path}/s.db", open_study(demo_design(**DESIGN | {"title": EVIL, "question": EVIL})))
    page = TestClient(study_app(store, TOKEN)).get("/").text
    assert "<img" not in page and "&lt;img src=x" in page
    assert "innerHTML" not in (ROOT / "clip_lab/assets/study/study.js").read_text()


def test_scripts_carry_their_hash(client):
    page = client.get("/").text
    for name in ("study.js", "study.css"):
        link = re.search(rf'"(/{name}\?[0-9a-f]{{12}})"', page)[1]
        assert "immutable" in client.get(link).headers["cache-control"] and client.get(f"/{name}").headers["cache-control"] == "no-cache"


def test_the_page_has_the_colours_of_the_other_apps():
    theme = pytest.importorskip("clip_lab.ui.theme", reason="needs Gradio", exc_type=ImportError)
    css = (ROOT / "clip_lab/assets/study/study.css").read_text()
    light, dark = [dict(re.findall(r"--([\w-]+): (#\w+)", block)) for block in re.findall(r":root \{([^}]*)\}", css)]
    assert {role: (light[role], dark[role]) for role in theme.COLOURS} == theme.COLOURS


# ---- the researcher's door

def test_the_door_is_closed_without_the_token(client):
    for path in ("/researcher", "/researcher/", "/researcher/config", "/researcher/gradio_api/info", "/researcher/export/answers.csv", "/researcher/queue/data", "/researcher/logout"):
        for method in ("GET", "POST"): assert client.request(method, path).status_code == 401, path
    page = client.get("/researcher/", headers={"accept": "text/html"})
    assert page.status_code == 401 and "Token" in page.text and "default-src 'none'" in page.headers["content-security-policy"]
    for path in ("//researcher/export/answers.csv", "/Researcher/export/answers.csv", "/researcher%2fexport%2fanswers.csv", "/x/../researcher/export/answers.csv"): assert client.get(path).status_code in (401, 404)


def test_the_right_token_opens_and_the_cookie_is_kept_from_scripts(client, store):
    Someone(client).answer("Japan")
    reply = client.post("/researcher/login", json={"token": TOKEN})
    cookie = reply.headers["set-cookie"].lower()
    assert reply.status_code == 200 and all(word in cookie for word in ("httponly", "samesite=strict", "path=/researcher", "max-age=43200")) and TOKEN not in cookie
    for name in EXPORTS:
        reply = client.get(f"/researcher/export/{name}")
        assert reply.status_code == 200 and f"{store.study.design.name}-{name}" in reply.headers["content-disposition"] and reply.headers["cache-control"] == "no-store"
    assert client.get("/researcher/export/..%2f..%2fsecret").status_code == 404
    client.get("/researcher/logout")
    assert client.get("/researcher/export/answers.csv").status_code == 401


def test_wrong_tokens_are_limited_and_lock_nobody_else_out(store):
    client, elsewhere = TestClient(study_app(store, TOKEN)), None
    app = client.app
    tries = [client.post("/researcher/login", json={"token": wrong}).status_code for wrong in ("", "x", TOKEN[:-1], TOKEN + " ", TOKEN.upper(), "ä", EVIL, "0", "1", "2", TOKEN, TOKEN)]
    assert tries == [403] * 10 + [429] * 2
    elsewhere = TestClient(app, client=("10.0.0.9", 5000))
    assert elsewhere.post("/researcher/login", json={"token": TOKEN}).status_code == 200
    assert client.post("/researcher/login", json={"token": "x" * 2000}).status_code == 422


def test_cookies_that_are_forged_or_old(client, store):
    door, later = Door(None, TOKEN, store), int(time.time()) + 1000
    good = door.cookie(later)
    assert door.known(good) and not Door(None, TOKEN + "2", store).known(good)
    for wrong in ("", ".", "abc", f"{later}.", f"{later}.{'0' * 64}", good[:-1], f"{later + 1}.{good.split('.')[1]}", door.cookie(int(time.time()) - 1), "٣.x", "9" * 5000 + ".x", "ä.b"): assert not door.known(wrong), wrong
    client.cookies.set("clip_lab_researcher", f"{later}.{'0' * 64}")
    assert client.get("/researcher/export/answers.csv").status_code == 401


def test_short_tokens_are_refused(store):
    with pytest.raises(ValueError, match="expected at least 16"): TestClient(study_app(store, "short")).get("/")


def test_limits_forget():
    now = [0.0]
    limit = Limit(2, 10, clock=lambda: now[0])
    for _ in range(2): limit.count("a")
    assert limit.wait("a") == 11 and limit.wait("b") == 0
    now[0] = 10.0
    assert limit.wait("a") == 0
    for i in range(10_050): limit.count(str(i))
    assert len(limit.seen) < 10_002


# ---- faults

def test_a_full_disk_is_503_and_nothing_is_acknowledged(client, store):
    someone = Someone(client)
    someone.answer("Japan")
    with store.engine.connect() as c: pages = c.exec_driver_sql("PRAGMA page_count").scalar()
    store.engine.dispose()
    limit = lambda connection, _: connection.execute(f"PRAGMA max_page_count={pages}").close()
    sa.event.listen(store.engine, "connect", limit)
    crowd, done = [someone], 1
    for _ in range(2000):
        reply = crowd[-1].answer("Japan")
        if reply.status_code != 200: break
        done += 1
        if crowd[-1].state["trial"] is None: 
            key = store.ticket()
            reply = client.post("/api/enrol", json={"consent": True}, headers={"Authorization": f"Bearer {key}"})
            if reply.status_code != 200: break
            new = Someone.__new__(Someone)
            new.client, new.key, new.state = client, key, reply.json()
            crowd.append(new)
    assert reply.status_code == 503 and "disk of the study's server is full. Nothing was stored" in reply.json()["text"] and int(reply.headers["retry-after"]) > 0
    assert len(answers_table(store)) == done
    assert client.get("/api/study").status_code == 200                         # reading goes on
    sa.event.remove(store.engine, "connect", limit)
    store.engine.dispose()
    last = crowd[-1]
    if last.state["trial"]: assert last.answer("Japan").status_code == 200 and len(answers_table(store)) == done + 1


def test_an_unforeseen_fault_says_nothing_of_the_inside(client, store, monkeypatch):
    someone = Someone(client)
    monkeypatch.setattr(store, "answer", lambda *_: 1 / 0)
    reply = someone.answer("Japan")
    assert reply.status_code == 500 and "please try again" in reply.json()["text"] and "division" not in reply.text


@pytest.mark.parametrize("words, message", [(["--study", "bad.yaml"], "bad.yaml.*needs title"), (["--study", "missing.yaml"], "missing.yaml"), (["--db", "mysql://x/y"], "expected sqlite:///study.db or postgresql"),
                                            (["--db", "sqlite:////nowhere/at/all/study.db"], "cannot be written"), (["--db", "postgresql://x@/y?host=/nowhere"], "does not answer")])
def test_the_command_says_what_is_wrong_with_its_words(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("name: x\n")
    with pytest.raises(SystemExit, match=f"error: .*{message}"): web.main(words)


# ---- a server that is killed

def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    "The real participants' server as a process of its own, to be killed."
    def __init__(self, design: Path, db: str, port: int):
        self.words, self.port, self.process = [sys.executable, "-m", "clip_lab.humans.web", "--study", str(design), "--db", db, "--port", str(port), "--admin-token", TOKEN, "--enrolments-per-minute", "1000"], port, None

    def start(self):
        self.process = subprocess.Popen(self.words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        deadline = time.time() + 120
        while time.time() < deadline:
            if self.process.poll() is not None: raise AssertionError(self.process.stderr.read()[-3000:])
            try:
                if self.health(): return self
            except OSError: time.sleep(0.1)
        raise AssertionError("the server did not start within two minutes")

    def health(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        connection.request("GET", "/api/health")
        return connection.getresponse().status == 200

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


class Simulated(threading.Thread):
    "A participant who retries like the page, presses twice now and then, and remembers what was acknowledged."
    def __init__(self, port: int, seed: int, stop: threading.Event):
        super().__init__(daemon=True)
        self.port, self.random, self.stop, self.acknowledged, self.problems, self.order, self.key, self.finished = port, random.Random(seed), stop, {}, [], [], None, None

    def post(self, name, **body):
        while not self.stop.is_set():
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
                headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
                connection.request("GET" if name == "study" else "POST", f"/api/{name}", None if name == "study" else json.dumps(body), headers)
                reply = connection.getresponse()
                values = json.loads(reply.read())
                if reply.status < 500 and reply.status != 429: return reply.status, values
            except (OSError, http.client.HTTPException, ValueError): pass
            time.sleep(0.05)
        raise SystemExit

    def run(self):
        _, study = self.post("study")
        self.key = study["key"]
        _, state = self.post("enrol", consent=True)
        while state["trial"]:
            trial, answer = state["trial"]["id"], self.random.choice(study["choices"])["value"]
            for _ in range(1 + (self.random.random() < 0.2)):          # pressed twice
                status, reply = self.post("answer", trial=trial, answer=answer, seconds=0.0)
                if status != 200: self.problems.append((status, reply))
                else: self.acknowledged[trial] = answer
            self.order.append(trial)
            state = reply if status == 200 else self.post("state")[1]
            if self.random.random() < 0.1: state = self.post("state")[1]
            time.sleep(self.random.random() * 0.1)
        self.finished = state["finish_code"]


@pytest.mark.slow
def test_killed_in_the_middle_again_and_again_every_acknowledged_answer_is_there_once(tmp_path):
    design = demo_design(**DESIGN | {"pictures_per_participant": 10, "participants": 12})
    save_design(design, tmp_path / "study.yaml")
    study, db, port, stop, when = open_study(design), f"sqlite:///{tmp_path}/study.db", free_port(), threading.Event(), random.Random(7)
    server = Server(tmp_path / "study.yaml", db, port).start()
    people = [Simulated(port, seed, stop) for seed in range(study.seats)]
    try:
        for person in people: person.start()
        kills = 0
        while any(p.is_alive() for p in people) and kills < 4:
            before = sum(len(p.acknowledged) for p in people)
            while any(p.is_alive() for p in people) and sum(len(p.acknowledged) for p in people) < before + 25: time.sleep(0.005)
            time.sleep(when.random() * 0.1)
            server.kill()
            kills += 1
            server.start()
        for person in people: person.join(timeout=120)
        assert not any(p.is_alive() for p in people), "somebody did not get to the end"
    finally:
        stop.set()
        server.kill()
    assert kills == 4 and not [p.problems for p in people if p.problems]
    store = Store(db, study)
    table = answers_table(store)
    stored = {(row.seat, row.trial): row.answer for row in table.itertuples()}
    acknowledged = {(int(trial[1:].split("-")[0]), trial): answer for p in people for trial, answer in p.acknowledged.items()}
    assert acknowledged == stored and len(table) == len(stored) == sum(len(study.trials(s)) for s in range(1, study.seats + 1))
    assert max(Counter(zip(table.participant, table.trial)).values()) == 1 and table.participant.nunique() == study.seats
    for person in people:
        seat = int(person.order[0][1:].split("-")[0])
        assert person.order == [t.id for t in study.trials(seat)] and person.finished      # the same order, across every kill
    store.close()


@pytest.mark.slow
def test_two_servers_on_one_postgres_serve_one_study(tmp_path):
    from databases import new_database, postgres_server, why_no_postgres
    if reason := why_no_postgres(): pytest.skip(reason)
    design = demo_design(**DESIGN | {"repeats": 8})
    save_design(design, tmp_path / "study.yaml")
    study, stop = open_study(design), threading.Event()
    with postgres_server() as folder:
        url = new_database(folder)
        servers = [Server(tmp_path / "study.yaml", url, free_port()) for _ in range(2)]
        try:
            starting = [threading.Thread(target=s.start) for s in servers]
            for thread in starting: thread.start()
            for thread in starting: thread.join()
            people = [Simulated(servers[i % 2].port, i, stop) for i in range(study.seats)]
            for person in people: person.start()
            for person in people: person.join(timeout=120)
        finally:
            stop.set()
            for server in servers: server.kill()
        assert all(p.finished for p in people) and not [p.problems for p in people if p.problems]
        store = Store(url, study)
        table = answers_table(store)
        assert sorted(table.groupby("participant").seat.first()) == list(range(1, study.seats + 1))
        from clip_lab.humans.store import balance_table
        balance = balance_table(store)
        assert (balance.planned == balance.answered).all() and len(table) == sum(len(p.acknowledged) for p in people)
        store.close()
