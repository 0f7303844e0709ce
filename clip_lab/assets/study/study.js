"use strict";
// The participant's page. What is shown comes from the server and is written as text, never as HTML. An answer is shown as given only after the server stored it; until then the page keeps it and tries again.
const $ = id => document.getElementById(id);
const main = $("main"), notice = $("notice"), bar = $("bar"), spoken = $("spoken");
const STORED = "clip_lab study " + location.pathname;            // where this browser remembers the link
const fine = matchMedia("(hover: hover) and (pointer: fine)").matches;   // a keyboard is likely
const sleep = ms => new Promise(done => setTimeout(done, ms));
let study, key = null, state, screen = null, examples = {}, language = null;

function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter(child => child != null));
  return element;
}

// ---- the server

class Refusal extends Error { constructor(reply, status) { super(reply.text || "The server did not accept that."); this.kind = reply.error; this.status = status; } }

function say(text) { notice.textContent = text || ""; notice.hidden = !text; }

async function call(name, body) {
  const headers = {"Content-Type": "application/json"};
  if (key) headers.Authorization = `Bearer ${key}`;
  for (let tries = 0; ; tries++) {
    let problem = "The server does not answer.", pause = Math.min(8000, 400 * 2 ** tries) * (0.75 + Math.random() / 2);
    try {
      const options = name === "study" ? {} : {method: "POST", headers, body: JSON.stringify({language, ...body})};
      const response = await fetch(name === "study" ? `/api/study?language=${encodeURIComponent(language || "")}` : `/api/${name}`, {...options, cache: "no-store"});
      const reply = await response.json();
      if (response.ok) { say(""); return reply; }
      if (response.status < 500 && response.status !== 429) throw new Refusal(reply, response.status);
      problem = reply.text || problem;
      pause = Math.max(pause, 1000 * Math.min(60, Number(response.headers.get("Retry-After")) || 0));
    } catch (error) { if (error instanceof Refusal) throw error; }
    if (tries) say(name === "answer" ? `${problem} Your last answer is not stored yet; it is kept on this page, and the page keeps trying.` : `${problem} The page keeps trying.`);
    await sleep(pause);
  }
}

// ---- screens

function show(...children) {
  screen = null;
  $("undo").hidden = true;
  main.replaceChildren(h("div", {class: "prose"}, ...children));
  const title = main.querySelector("h1");
  title.tabIndex = -1;
  title.focus({preventScroll: true});
  scrollTo(0, 0);
}

function paragraphs(text) { return text.split(/\n\s*\n/).filter(Boolean).map(part => h("p", {}, part)); }

function go(text, act) { return h("div", {class: "row"}, h("button", {type: "button", class: "main", onclick: act}, text), fine ? h("span", {class: "small"}, "or press ", h("kbd", {}, "Enter")) : null); }

function toKeep(title, value, why, large = false) {
  const copy = h("button", {type: "button"}, "Copy");
  copy.addEventListener("click", async () => {
    try { await navigator.clipboard.writeText(value); copy.textContent = "Copied"; }
    catch { copy.textContent = "Please mark it and copy it yourself"; }
  });
  return h("section", {class: "keep" + (large ? " large" : "")}, h("h2", {}, title), h("p", {class: "small"}, why), h("code", {}, value), copy);
}

const link = () => `${location.origin}${location.pathname}#k=${key}`;

function remember(value) {
  key = value;
  history.replaceState(null, "", value ? `#k=${value}` : location.pathname);
  try { value ? localStorage.setItem(STORED, value) : localStorage.removeItem(STORED); } catch { /* private window: the link is enough */ }
  $("foot").hidden = false;
}

function remembered() { try { return localStorage.getItem(STORED); } catch { return null; } }

function consent() {
  bar.hidden = true;
  const about = {who: "Who asks", stored: "What is stored", kept: "For how long", delete: "Deleting it", contact: "Questions"};
  const box = h("input", {type: "checkbox", id: "agree"});
  const begin = h("button", {type: "button", class: "main", disabled: true}, "Take part");
  box.addEventListener("change", () => { begin.disabled = !box.checked; });
  begin.addEventListener("click", async () => {
    begin.disabled = true;
    key = study.key;
    try { state = await call("enrol", {consent: true}); remember(key); keepThese(); }
    catch (refusal) { key = null; stop(refusal); }
  });
  const languages = study.languages.length < 2 ? null : h("label", {class: "field"}, "Language", h("select", {onchange: event => { language = event.target.value; start(true); }},
    study.languages.map(name => h("option", {value: name, lang: name, selected: name === study.language}, name))));
  show(h("h1", {}, study.title), h("p", {class: "lead"}, `${study.question} You will see ${study.trials} pictures, one at a time. You may stop at any time and come back later.`), languages,
    h("dl", {}, Object.entries(about).filter(([name]) => study.consent[name]).map(([name, title]) => h("div", {}, h("dt", {}, title), h("dd", {}, study.consent[name])))),
    h("label", {class: "agree"}, box, h("span", {}, "I have read this, and I take part of my own free will.")), h("div", {class: "row"}, begin));
  $("foot").hidden = false;
}

function welcomeBack(old) {
  show(h("h1", {}, study.title), h("p", {class: "lead"}, "Somebody began here on this device, and has not finished."),
    h("div", {class: "row"}, h("button", {type: "button", class: "main", onclick: async () => { remember(old); await resume(); }}, "Go on where I stopped"),
      h("button", {type: "button", onclick: () => { remember(null); consent(); }}, "I am somebody else")));
}

function keepThese() {
  show(h("h1", {}, "Keep these two"), h("p", {class: "lead"}, "Copy them, or write the code down. They are the only way back: we do not know who you are."),
    toKeep("Your link", link(), "Brings you back to your next picture, on any device. Whoever has it can answer in your place."),
    toKeep("Your delete code", state.delete_code, "Deletes all of your answers, at any time."), go("Go on", next));
}

function instructions() {
  const title = state.block < 0 ? "First, some practice" : state.shots ? `Now with ${state.shots === 1 ? "an example" : state.shots + " examples"} of each` : "Now it counts";
  const shown = Object.entries(state.examples || {});
  show(h("h1", {}, title), ...paragraphs(state.instructions || ""), shown.length ? h("ul", {class: "gallery"}, shown.map(([value, pictures]) => h("li", {}, thumbs(value, pictures), h("div", {}, label(value))))) : null,
    fine && !shown.length ? h("p", {class: "small"}, study.choices.length <= 9 ? ["Keys: ", h("kbd", {}, "1"), " to ", h("kbd", {}, String(study.choices.length)), " for the answers, ", h("kbd", {}, "0"), ` for “${study.dont_know.label}”.`]
      : ["Keys: type the beginning of an answer and press ", h("kbd", {}, "Enter"), "; ", h("kbd", {}, "0"), ` for “${study.dont_know.label}”.`]) : null,
    go("Begin", trial));
}

function rest() {
  show(h("h1", {}, "A short break"), h("p", {class: "lead"}, `${state.done} of ${state.of} are done and stored. Look out of the window for a moment; go on when you like.`), go("Go on", trial));
}

function finish() {
  bar.hidden = true;
  const own = key;
  show(h("h1", {}, "Thank you"), h("p", {class: "lead"}, "All of your answers are stored. You can close this page."),
    toKeep("Finish code", state.finish_code, "Shows that you took part to the end. It says nothing about your answers.", true),
    toKeep("Delete code", state.delete_code, "Deletes all of your answers, at any time."));
  try { localStorage.removeItem(STORED); } catch { /* nothing was remembered */ }
  key = own;
  if (study.scores) scores();
}

async function scores() {
  const examples = shots => shots === 0 ? "without examples" : shots === 1 ? "with an example of each" : `with ${shots} examples of each`;
  const told = (await call("scores", {})).scores;
  if (!told.length) return;
  main.firstChild.append(h("h2", {}, "And the model?"), h("p", {class: "small"}, "Right answers to the same pictures. Without examples it compares the picture with each name; with examples it takes the most similar one."),
    h("dl", {}, told.map(row => h("div", {}, h("dt", {}, examples(row.shots)), h("dd", {}, `you ${row.you} of ${row.of}, the model ${row.model} of ${row.of}`)))));
}

function stop(refusal) {
  bar.hidden = true;
  const words = {full: "Every place is taken", gone: "Your place was given away", link: "This link is not known"};
  show(h("h1", {}, words[refusal.kind] || "That did not work"), h("p", {class: "lead"}, refusal.message),
    h("div", {class: "row"}, h("button", {type: "button", onclick: () => { remember(null); start(); }}, "To the first page")));
}

function remove() {
  const code = h("input", {id: "code", autocomplete: "off", autocapitalize: "none", spellcheck: "false", maxlength: "100"});
  const reply = h("p", {role: "status"});
  if (state && state.delete_code) code.value = state.delete_code;
  const press = h("button", {type: "submit", class: "main"}, "Delete everything of mine");
  const form = h("form", {onsubmit: async event => {
    event.preventDefault();
    press.disabled = true;
    try {
      const done = await call("delete", {code: code.value});
      const mine = state && state.delete_code && key;
      if (mine) { remember(null); state = null; }
      bar.hidden = true;
      show(h("h1", {}, "Deleted"), h("p", {class: "lead"}, `${done.deleted} answer${done.deleted === 1 ? " was" : "s were"} deleted, with everything that belonged to ${done.deleted === 1 ? "it" : "them"}. Nothing of yours is left.`));
    } catch (refusal) { reply.textContent = refusal.message; press.disabled = false; code.focus(); }
  }}, h("label", {class: "field", for: "code"}, "Delete code"), code, reply, h("div", {class: "row"}, press, h("button", {type: "button", onclick: () => state ? next() : start()}, "Back")));
  show(h("h1", {}, "Delete my data"), h("p", {class: "lead"}, "All of your answers are removed from the study, and your link stops working. This cannot be undone."), form);
}

// ---- a trial

function label(value) { return value === study.dont_know.value ? study.dont_know.label : study.choices.find(choice => choice.value === value).label; }

function thumbs(value, pictures) { return h("div", {class: "thumbs"}, pictures.map(picture => h("img", {src: `/picture/${picture}.png`, alt: `Example: ${label(value)}`, loading: "lazy"}))); }

// The screen of a block is built once; from trial to trial only the picture, the progress and the notes change.
function build() {
  const shots = state.shots && state.block >= 0 ? examples[state.shots] || {} : {};
  const few = study.choices.length <= 9, plain = !Object.keys(shots).length;
  const image = h("img", {alt: ""}), frame = h("figure", {class: "frame"}, image), asks = h("p", {class: "asks", hidden: true}), solution = h("div", {class: "solution"}), clock = h("div", {class: "time", hidden: true}, h("i"));
  const items = study.choices.map((choice, i) => {
    const hint = few && fine ? h("kbd", {"aria-hidden": "true"}, String(i + 1)) : null;
    const inside = plain ? [hint, h("span", {}, choice.label)] : [thumbs(choice.value, shots[choice.value] || []), h("div", {class: "words"}, hint, h("span", {}, choice.label))];
    return {choice, item: h("li", {}, h("button", {type: "button", class: plain ? null : "shown", "data-value": choice.value, onclick: () => give(choice.value)}, inside))};
  });
  const filter = few ? null : h("input", {type: "search", placeholder: fine ? "Type to find an answer" : "Find an answer", "aria-label": "Find an answer", autocomplete: "off", autocapitalize: "none", spellcheck: "false", oninput: narrow});
  const list = h("ul", {class: "choices" + (few && plain ? " few" : "") + (study.searchable ? " long" : "")}, items.map(entry => entry.item)), none = h("p", {class: "none", hidden: true}, "No answer on the page contains that.");
  const dont = h("button", {type: "button", class: "dont", "data-value": study.dont_know.value, onclick: () => give(study.dont_know.value)}, fine ? h("kbd", {"aria-hidden": "true"}, "0") : null, h("span", {}, study.dont_know.label));
  const title = h("h1", {id: "question", tabindex: "-1"}, study.question);
  main.replaceChildren(h("div", {class: "trial"}, title, h("div", {class: "look"}, frame, clock, asks, solution),
    h("div", {role: "group", "aria-labelledby": "question"}, filter ? h("div", {class: "filter"}, filter, dont) : null, list, none, filter ? null : dont)));
  screen = {block: state.block, image, frame, asks, solution, clock, items, filter, list, none, dont, title, open: false, from: 0, timer: 0};
}

// What is typed fits an answer of which it is all, the beginning, or the beginning of a later word; in this order one of them is taken by Enter.
function fit(text, wanted) {
  if (text === wanted) return 3;
  if (text.startsWith(wanted)) return 2;
  const words = text.split(/[\s(-]+/);
  return words.some((_, i) => words.slice(i).join(" ").startsWith(wanted)) ? 1 : 0;
}

function narrow() {
  const wanted = screen.filter.value.trim().toLocaleLowerCase();
  let best = null, most = 0;
  for (const entry of screen.items) {
    const how = wanted === "" ? 1 : fit(entry.choice.label.toLocaleLowerCase(), wanted);
    entry.item.hidden = !how;
    entry.item.classList.remove("first");
    if (how > most) { most = how; best = entry; }
  }
  screen.none.hidden = best !== null;
  screen.match = wanted === "" ? null : best && best.choice;
  if (screen.match) { best.item.classList.add("first"); spoken.textContent = `${screen.match.label}: Enter`; }
}

function buttons(disabled) { for (const button of main.querySelectorAll(".choices button, .dont")) button.disabled = disabled; }

async function trial() {
  if (!screen || screen.block !== state.block) build();
  const here = screen, mine = state.trial;
  here.open = false;
  buttons(true);
  here.solution.replaceChildren();
  here.asks.hidden = !mine.instructed;
  here.asks.replaceChildren(...(mine.instructed ? ["For this one, please choose ", h("b", {}, mine.instructed.label), ", whatever it shows."] : []));
  $("undo").hidden = !state.undo;
  for (const button of main.querySelectorAll(".chosen")) button.classList.remove("chosen");
  if (here.filter) { here.filter.value = ""; narrow(); }
  here.frame.classList.add("waiting");
  clearTimeout(here.timer);
  here.clock.hidden = true;
  progress();
  scrollTo(0, 0);
  spoken.textContent = `${mine.practice ? "Practice. " : ""}Picture ${state.done + 1} of ${state.of}. ${mine.instructed ? `Please choose ${mine.instructed.label}.` : ""}`;
  here.image.alt = `The picture to name, number ${state.done + 1} of ${state.of}. It is not described, because its name is the answer.`;
  await painted(here.image, `/picture/${mine.picture}.png`);
  if (screen !== here || state.trial !== mine) return;
  here.frame.classList.remove("waiting");
  await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
  here.from = performance.now();                        // from here on the picture can be seen
  here.open = true;
  buttons(false);
  if (here.filter && fine) here.filter.focus({preventScroll: true}); else here.title.focus({preventScroll: true});
  if (study.time_limit && !mine.practice) limit(here, mine);
  if (state.next_picture) new Image().src = `/picture/${state.next_picture}.png`;
}

async function painted(image, source) {
  for (let tries = 0; ; tries++) {
    image.src = tries ? `${source}?${tries}` : source;
    try { await image.decode(); if (tries > 1) say(""); return; }
    catch { if (tries) say("The picture does not arrive. The page keeps trying."); await sleep(Math.min(8000, 400 * 2 ** tries)); }
  }
}

function limit(here, mine) {
  here.clock.hidden = false;
  here.clock.firstChild.animate([{transform: "scaleX(1)"}, {transform: "scaleX(0)"}], {duration: 1000 * study.time_limit, fill: "forwards"});
  here.timer = setTimeout(() => { if (screen === here && state.trial === mine && here.open) give(study.dont_know.value); }, 1000 * study.time_limit);
}

function progress() {
  bar.hidden = false;
  $("place").textContent = state.trial.practice ? `Practice, ${state.done + 1} of ${state.of}` : `${state.done + 1} of ${state.of}`;
  $("progress").max = state.of;
  $("progress").value = state.done;
}

async function give(value) {
  const here = screen, mine = state.trial;
  if (!here || !here.open) return;                      // pressed twice, or the picture is not there yet
  const seconds = (performance.now() - here.from) / 1000;
  here.open = false;
  clearTimeout(here.timer);
  buttons(true);
  for (const button of main.querySelectorAll("[data-value]")) button.classList.toggle("chosen", button.dataset.value === value);
  try { state = await call("answer", {trial: mine.id, answer: value, seconds}); }
  catch (refusal) {
    if (["turn", "answered"].includes(refusal.kind)) { await resume(); say("Another window was ahead of this one. The answer that was given first is kept; here is your next picture."); return; }
    stop(refusal);
    return;
  }
  if (state.solution === undefined) { next(); return; }
  const right = label(value) === state.solution;
  const on = h("button", {type: "button", class: "main", onclick: next}, "Go on");
  here.solution.replaceChildren(h("p", {role: "status"}, right ? "Yes: " : value === study.dont_know.value ? "This is " : `Not ${label(value)}; this is `, h("b", {}, state.solution), "."), on);
  on.focus();
}

async function takeBack() {
  const last = state && state.undo;
  if (!last || !screen || !screen.open) return;
  screen.open = false;
  buttons(true);
  try { state = await call("undo", {trial: last}); trial(); }
  catch { await resume(); }
}

function next() {
  if (state.examples && state.shots) examples[state.shots] = state.examples;
  if (!state.trial) { finish(); return; }
  if (state.shots && state.block >= 0 && !examples[state.shots]) { resume(); return; }
  if (state.first) instructions(); else if (state.break) rest(); else trial();
}

async function resume() {
  try { state = await call("state", {}); screen = null; next(); }
  catch (refusal) { stop(refusal); }
}

// ---- the keyboard

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.isComposing) return;
  const typing = event.target.closest("input, select, textarea"), inFilter = screen && event.target === screen.filter, empty = !screen || !screen.filter || screen.filter.value === "";
  if (event.key === "Enter" && !event.repeat && !event.target.closest("button, a, input:not([type=search]), select")) {
    if (screen && screen.open) { if (screen.match) { event.preventDefault(); give(screen.match.value); } }
    else main.querySelector("button.main:not(:disabled)")?.click();
    return;
  }
  if (!screen || !screen.open || event.repeat || (typing && !inFilter)) return;
  if (event.key === "0" && empty) { event.preventDefault(); give(study.dont_know.value); }
  else if (event.key === "Backspace" && empty) { if (state.undo) { event.preventDefault(); takeBack(); } }
  else if (event.key === "Escape" && screen.filter) { screen.filter.value = ""; narrow(); }
  else if (!screen.filter && /^[1-9]$/.test(event.key) && screen.items[event.key - 1]) { event.preventDefault(); give(screen.items[event.key - 1].choice.value); }
  else if (["ArrowDown", "ArrowUp"].includes(event.key)) {
    const shown = [...screen.items.filter(entry => !entry.item.hidden).map(entry => entry.item.firstChild), screen.dont], at = shown.indexOf(document.activeElement);
    event.preventDefault();
    shown[(at + (event.key === "ArrowDown" ? 1 : at < 0 ? 0 : -1) + shown.length) % shown.length].focus();
  }
  else if (screen.filter && !inFilter && event.key.length === 1 && event.key !== " ") screen.filter.focus();      // typing anywhere searches
});

// ---- the start

async function start(again = false) {
  study = await call("study");
  language = study.language;
  document.documentElement.lang = study.language;
  document.title = study.title;
  const given = new URLSearchParams(location.hash.slice(1)).get("k"), old = remembered();
  if (given) { remember(given); await resume(); }
  else if (old && !again) welcomeBack(old);
  else consent();
}

$("delete").addEventListener("click", remove);
$("undo").addEventListener("click", takeBack);
if (fine) $("undo").append(" ", h("kbd", {"aria-hidden": "true"}, "⌫"));
window.addEventListener("hashchange", () => { const given = new URLSearchParams(location.hash.slice(1)).get("k"); if (given && given !== key) location.reload(); });
start();
