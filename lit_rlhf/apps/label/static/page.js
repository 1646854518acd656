"use strict";
// The server knows what comes next and what was judged; this page shows it and says what the person did.
// Text of prompts and answers goes into the page as text (textContent), never as HTML.

const LABELS = "1234567890abcdef"; // the key of each place
const $ = (id) => document.getElementById(id);
let about, state, annotator;
let busy = false; // a step is on its way to disk: keys that come meanwhile belong to nothing on the screen
let tiers = []; // rank: places from best to worst, equal ones together
let joins = false; // rank: the next place is equal to the last one
let rating = null;
let watch; // seconds on this item while the page was in view

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}
const show = (id, visible) => { $(id).hidden = !visible; };
const say = (text) => { $("said").textContent = text; };
const ordinal = (n) => n + (n % 10 === 1 && n !== 11 ? "st" : n % 10 === 2 && n !== 12 ? "nd" : n % 10 === 3 && n !== 13 ? "rd" : "th");

// Asks until there is an answer: a step may be sent twice, and the server counts it once.
async function ask(path, body) {
  for (;;) {
    let response;
    try {
      const post = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
      response = await fetch(path, body ? post : {});
    } catch {
      show("offline", true);
      await new Promise((done) => setTimeout(done, 700));
      continue;
    }
    show("offline", false);
    const answer = await response.json().catch(() => ({ detail: `the server failed (${response.status})` }));
    if (!response.ok) throw new Error(typeof answer.detail === "string" ? answer.detail : JSON.stringify(answer.detail));
    return answer;
  }
}

// ---- drafts: what was begun and not submitted survives a reload of the page

const draftName = () => `lit-rlhf ${about.mode} ${annotator} ${state.item.id} ${state.item.again}`;
function keepDraft() {
  try { localStorage.setItem(draftName(), JSON.stringify({ verdict: begun(), note: $("note").value })); } catch { /* no room: the page works without */ }
}
function readDraft() {
  try { return JSON.parse(localStorage.getItem(draftName())); } catch { return null; }
}
function dropDraft() {
  try { localStorage.removeItem(draftName()); } catch { /* as above */ }
}

// ---- what the person has said so far

function begun() {
  if (about.mode === "rank") return tiers;
  return about.mode === "rate" ? rating : $("text").value;
}
function verdict() {
  if (about.mode !== "rank") {
    if (about.mode === "rate" && rating === null) throw new Error("Rate the answer first");
    return begun();
  }
  const left = unplaced();
  if (left.length === 1) { place(left[0]); return verdict(); } // whoever is left comes last
  if (left.length) throw new Error(`Rank the others too: ${left.map((p) => LABELS[p]).join(", ")}`);
  const ranks = [];
  tiers.forEach((tier, i) => tier.forEach((p) => { ranks[p] = i + 1; }));
  return ranks;
}
function restore(saved) {
  tiers = []; rating = null; joins = false;
  if (about.mode === "rank") tiers = saved ?? [];
  else if (about.mode === "rate") rating = saved ?? null;
  else $("text").value = saved ?? state.item.answers[0] ?? "";
}
function tiersOf(ranks) {
  const found = [];
  ranks.forEach((rank, p) => (found[rank - 1] ??= []).push(p));
  return found;
}
const unplaced = () => state.item.answers.map((_, p) => p).filter((p) => !tiers.flat().includes(p));

function place(p) {
  if (tiers.flat().includes(p)) {
    take(p);
    say(`Answer ${LABELS[p]} taken out`);
  } else {
    if (joins && tiers.length) tiers[tiers.length - 1].push(p); else tiers.push([p]);
    say(`Answer ${LABELS[p]}: ${ordinal(tiers.length)}${joins ? ", equal" : ""}`);
    joins = false;
  }
  changed();
}
function take(p) { tiers = tiers.map((tier) => tier.filter((q) => q !== p)).filter((tier) => tier.length); }
function changed() {
  $("error").textContent = "";
  keepDraft();
  if (about.mode === "rank") drawRanking();
  if (about.mode === "rate") drawRatings();
}

// ---- steps

async function step(path, body) {
  if (busy) return;
  busy = true;
  document.body.classList.add("busy");
  $("error").textContent = "";
  try {
    const next = await ask(path, body);
    if (path !== "api/undo") dropDraft();
    await draw(next);
  } catch (error) {
    $("error").textContent = error.message;
  } finally {
    busy = false;
    document.body.classList.remove("busy");
  }
}
const what = () => ({ annotator, item: state.item.id, again: state.item.again, note: $("note").value, seconds: seconds() });
function submit() {
  if (!state.item || busy) return;
  try { step("api/judge", { ...what(), verdict: verdict() }); } catch (error) { $("error").textContent = error.message; }
}
function skip() { if (state.item) step("api/skip", what()); }
function undo() { step("api/undo", { annotator, turn: state.turn }); }
function note() { show("note-row", true); $("note").focus(); }

function seconds() { return (watch.before + (watch.since === null ? 0 : performance.now() - watch.since)) / 1000; }
document.addEventListener("visibilitychange", () => {
  if (!watch) return;
  if (document.hidden) watch = { before: seconds() * 1000, since: null };
  else watch.since ??= performance.now();
});

// ---- drawing

async function draw(next) {
  state = next;
  drawFigures();
  show("message", Boolean(state.message));
  $("message").textContent = state.message ?? "";
  const item = state.item;
  for (const id of ["prompt", "ask", "answers"]) show(id, item);
  show("finished", !item);
  for (const id of ["skip", "note-button", "submit"]) show(id, item);
  $("undo").disabled = state.turn === 0;
  show("strip", item && about.mode === "rank");
  show("ratings", item && about.mode === "rate");
  show("note-row", false);
  document.body.dataset.item = item ? item.id : "";
  document.body.dataset.turn = state.turn;
  if (!item) return;
  const draft = readDraft();
  $("note").value = draft?.note ?? item.before?.note ?? "";
  show("note-row", $("note").value !== "");
  drawPrompt(item.prompt, item.tools);
  drawAnswers(item.answers);
  const before = item.before && (about.mode === "rank" ? tiersOf(item.before.verdict) : item.before.verdict);
  restore(draft?.verdict ?? before);
  if (about.mode === "rank") drawRanking();
  if (about.mode === "rate") drawRatings();
  watch = { before: 0, since: document.hidden ? null : performance.now() };
  window.scrollTo(0, 0);
  if (about.mode === "write") $("text").focus({ preventScroll: true });
  else document.activeElement?.blur();
}

function drawFigures() {
  const { done, total, per_hour: speed, agreed, compared, skipped } = state;
  $("done").textContent = `${done.toLocaleString("en")} of ${total.toLocaleString("en")}`;
  $("speed").textContent = speed ? `${Math.round(speed).toLocaleString("en")} per hour` : "";
  $("agreement").textContent = compared ? `self-agreement ${Math.round((100 * agreed) / compared)}% (${agreed} of ${compared}${about.mode === "rank" ? " pairs" : ""})` : "";
  $("agreement").title = "Some items come a second time: how often you judged them as you did at first";
  $("skipped").textContent = skipped ? `${skipped} skipped` : "";
  $("who").textContent = state.annotator;
  $("bar").firstElementChild.style.width = `${total ? (100 * done) / total : 0}%`;
  $("bar").setAttribute("aria-valuenow", total ? Math.round((100 * done) / total) : 0);
}

function drawPrompt(messages, tools) {
  const names = { user: "Person", assistant: "Assistant", system: "Setting", developer: "Setting", tool: "Tool", tools: "Tools" };
  const described = tools ? [{ role: "tools", content: JSON.stringify(tools, null, 1) }] : [];
  $("prompt").replaceChildren(...[...described, ...messages].map((message) => make("div", { class: `turn ${message.role}` },
    make("span", { class: "role" }, names[message.role]), make("div", { class: "text", dir: "auto" }, message.content))));
  $("prompt").scrollTop = $("prompt").scrollHeight; // the last turn is the one that is answered
}

function drawAnswers(answers) {
  const asks = { rank: `Which answer is best? Take them from best to worst.`, rate: "How good is this answer?", write: "Write the ideal answer." };
  $("ask").textContent = asks[about.mode];
  $("answers").className = about.mode;
  $("answers").dataset.count = answers.length;
  if (about.mode === "write") {
    const text = make("textarea", { id: "text", dir: "auto", "aria-label": "the ideal answer", oninput: changed, spellcheck: "true" });
    $("answers").replaceChildren(text);
    return;
  }
  $("answers").replaceChildren(...answers.map((answer, p) => {
    const text = make("div", { class: "text", dir: "auto", tabindex: "0", "aria-label": `text of answer ${LABELS[p]}` });
    if (answer.trim()) text.textContent = answer;
    else text.append(make("em", {}, "(empty)"));
    const head = make("button", { type: "button", class: "head", "aria-label": `answer ${LABELS[p]}`, onclick: () => place(p) },
      make("kbd", {}, LABELS[p]), make("span", { class: "place" }));
    return make("article", { class: "card", "data-place": p }, ...(about.mode === "rank" ? [head] : []), text);
  }));
}

function drawRanking() {
  for (const card of $("answers").children) {
    const p = Number(card.dataset.place);
    const tier = tiers.findIndex((t) => t.includes(p));
    card.classList.toggle("placed", tier >= 0);
    card.querySelector(".place").textContent = tier < 0 ? "" : ordinal(tier + 1) + (tiers[tier].length > 1 ? ", equal" : "");
  }
  const chip = (p) => make("button", { type: "button", class: "chip", "data-place": p, title: "Drag to its rank; tap to place or take out" }, LABELS[p]);
  const group = (tier, i) => make("span", { class: "tier", "data-tier": i }, ...tier.flatMap((p, n) => (n ? [make("i", {}, "="), chip(p)] : [chip(p)])));
  const left = unplaced();
  $("strip").replaceChildren(
    make("span", { class: "end" }, "best"),
    ...tiers.flatMap((tier, i) => (i ? [make("i", {}, "›"), group(tier, i)] : [group(tier, i)])),
    ...(joins ? [make("i", { class: "joins" }, "= ?")] : []),
    ...(left.length ? [make("span", { class: "slot" }, tiers.length ? "…" : matchMedia("(pointer: coarse)").matches ? "tap the answers, best first" : "press the keys, or drag here")] : []),
    make("span", { class: "end" }, "worst"),
    make("span", { class: "tray", "data-tray": true }, ...(left.length ? [make("span", { class: "end" }, "to place"), ...left.map(chip)] : [])),
  );
}

function drawRatings() {
  const thumbs = about.ratings.length === 2;
  const words = thumbs ? ["Bad", "Good"] : about.ratings.map(String);
  $("ratings").replaceChildren(
    ...(thumbs ? [] : [make("span", { class: "end" }, "worst")]),
    ...about.ratings.map((value, i) => make("button", { type: "button", class: `rating ${thumbs ? `thumb ${words[i].toLowerCase()}` : ""}`,
      "aria-pressed": String(rating === value), onclick: () => rate(i) }, words[i], ...(thumbs ? [" ", make("kbd", {}, LABELS[i])] : []))),
    ...(thumbs ? [] : [make("span", { class: "end" }, "best")]),
  );
}
function rate(i) { rating = about.ratings[i]; say(`Rated ${rating}`); changed(); }

// ---- dragging: pointer events, which fingers, pens and mice share

let drag = null;
$("strip").addEventListener("pointerdown", (event) => {
  const chip = event.target.closest(".chip");
  if (!chip || event.button > 0 || busy) return;
  drag = { chip, p: Number(chip.dataset.place), x: event.clientX, y: event.clientY, moved: false };
  chip.setPointerCapture(event.pointerId);
});
$("strip").addEventListener("pointermove", (event) => {
  if (!drag) return;
  const [dx, dy] = [event.clientX - drag.x, event.clientY - drag.y];
  if (!drag.moved && Math.hypot(dx, dy) < 6) return;
  drag.moved = true;
  drag.chip.classList.add("dragged");
  drag.chip.style.transform = `translate(${dx}px, ${dy}px)`;
  mark(target(event.clientX, event.clientY));
});
$("strip").addEventListener("pointerup", (event) => {
  if (!drag) return;
  const { p, moved } = drag;
  const there = moved ? target(event.clientX, event.clientY) : null;
  drag = null;
  if (moved) drop(p, there); else place(p);
});
$("strip").addEventListener("pointercancel", () => { drag = null; drawRanking(); });
// A click by Space comes without a pointer.
$("strip").addEventListener("click", (event) => {
  const chip = event.target.closest(".chip");
  if (chip && event.detail === 0) place(Number(chip.dataset.place));
});

// Where a chip would land: on a tier (equal), before or after it, or back among those to place.
function target(x, y) {
  const inside = (box, slack) => x >= box.left - slack && x <= box.right + slack && y >= box.top - slack && y <= box.bottom + slack;
  const tray = $("strip").querySelector("[data-tray]");
  if (inside(tray.getBoundingClientRect(), 0) && tray.children.length) return { tray: true };
  const alone = (node) => { const at = node.querySelectorAll(".chip"); return at.length === 1 && at[0] === drag?.chip; };
  let best = null;
  for (const node of $("strip").querySelectorAll(".tier")) {
    if (alone(node)) continue; // its own place
    const box = node.getBoundingClientRect();
    const distance = Math.hypot(Math.max(box.left - x, 0, x - box.right), 2 * Math.max(box.top - y, 0, y - box.bottom));
    if (best && best.distance <= distance) continue;
    const i = Number(node.dataset.tier);
    const edge = Math.min(14, box.width / 4);
    if (distance === 0 && x > box.left + edge && x < box.right - edge) best = { distance, node, equal: i };
    else best = { distance, node, before: x < (box.left + box.right) / 2 ? i : i + 1 };
  }
  return best ?? { before: 0 };
}
function mark(there) {
  for (const node of $("strip").querySelectorAll(".tier")) {
    const i = Number(node.dataset.tier);
    node.classList.toggle("onto", there.equal === i);
    node.classList.toggle("left", there.node === node && there.before === i);
    node.classList.toggle("right", there.node === node && there.before === i + 1);
  }
}
function drop(p, there) {
  tiers = tiers.map((tier) => tier.filter((q) => q !== p)); // empty tiers keep the others' numbers until the end
  if (there.equal !== undefined) tiers[there.equal].push(p);
  else if (!there.tray) tiers.splice(there.before, 0, [p]);
  tiers = tiers.filter((tier) => tier.length);
  joins = false;
  changed();
}

// ---- keys

function drawKeys() {
  const count = about.mode === "rate" ? about.ratings.length : null;
  const rows = {
    rank: [["1 2 3 …", "from best to worst"], ["=", "next one is equal"], ["Backspace", "take the last out"]],
    rate: [[`1 … ${count}`, "from worst to best"]],
    write: [["Esc", "leave the text, for:"], ["e", "back to the text"]],
  }[about.mode];
  const enter = about.mode === "write" ? "Ctrl Enter" : "Enter";
  const all = [...rows, [enter, "submit"], ["u", "undo the last one"], ["s", "skip"], ["n", "note"], ...(about.mode === "write" ? [] : [["Tab", "scroll an answer"]])];
  $("keys").replaceChildren(...all.flatMap(([keys, means]) => [make("dt", {}, ...keys.split(" ").flatMap((k, i) => (k === "…" ? [" … "] : [i ? " " : "", make("kbd", {}, k)]))), make("dd", {}, means)]));
  $("submit").querySelector("kbd").textContent = enter;
}

document.addEventListener("keydown", (event) => {
  if ($("work").hidden || !state || event.isComposing || event.altKey || event.metaKey) return;
  const { key, target: at } = event;
  const typing = at.id === "note" || at.id === "text";
  if (key === "Enter" && event.ctrlKey) { event.preventDefault(); if (!event.repeat) submit(); return; }
  if (event.ctrlKey) return;
  if (typing) {
    if (key === "Escape" || (key === "Enter" && at.id === "note")) { event.preventDefault(); at.blur(); }
    return;
  }
  if (event.repeat || busy) { if (key === "Enter") event.preventDefault(); return; }
  if (key === "Enter" && (at.tagName === "SUMMARY" || at.id === "leave" || about.mode === "write")) return;
  if (act(event)) event.preventDefault();
});

// Does what a key stands for; returns whether it stands for something.
function act({ key, code, shiftKey }) {
  const simple = { u: undo, s: skip, n: note, Enter: submit, e: about.mode === "write" ? () => $("text").focus() : null };
  if (key === "u") { undo(); return true; }
  if (!state.item) return false;
  if (about.mode === "rank" && key === "=") {
    if (tiers.length) { joins = !joins; drawRanking(); }
    return true;
  }
  if (about.mode === "rank" && key === "Backspace") {
    if (tiers.length) { place(tiers.at(-1).at(-1)); joins = false; }
    return true;
  }
  // On keyboards whose digits need Shift, the key's place says which digit it is.
  const digit = /^Digit\d$/.test(code) && !shiftKey && !LABELS.includes(key) ? code.slice(5) : key;
  const p = digit.length === 1 ? LABELS.indexOf(digit) : -1;
  if (about.mode === "rank" && p >= 0 && p < state.item.answers.length) { place(p); return true; }
  if (about.mode === "rate" && p >= 0 && p < about.ratings.length) { rate(p); return true; }
  if (!simple[key]) return false;
  simple[key]();
  return true;
}

$("undo").addEventListener("click", undo);
$("skip").addEventListener("click", skip);
$("note-button").addEventListener("click", note);
$("note").addEventListener("input", () => keepDraft());
$("submit").addEventListener("click", submit);
$("leave").addEventListener("click", () => { localStorage.removeItem("lit-rlhf annotator"); location.reload(); });

// ---- start

$("start").addEventListener("submit", (event) => { event.preventDefault(); begin($("name").value); });

async function begin(name) {
  try {
    const first = await ask(`api/state?annotator=${encodeURIComponent(name)}`);
    annotator = first.annotator;
    localStorage.setItem("lit-rlhf annotator", annotator);
    show("start", false);
    show("work", true);
    await draw(first);
  } catch (error) {
    show("start", true);
    show("start-error", true);
    $("start-error").textContent = error.message;
  }
}

function drawInstructions(text) {
  const nodes = text.split("\n").filter((line) => line.trim()).map((line) => {
    const heading = line.match(/^(#+) +(.*)/);
    if (!heading) return make("p", { dir: "auto" }, line);
    return make(heading[1].length === 1 ? "h3" : "h4", { dir: "auto" }, heading[2]);
  });
  $("instructions").replaceChildren(...nodes);
  const closed = localStorage.getItem("lit-rlhf guide") === "closed";
  $("guide").open = !closed;
  $("guide").addEventListener("toggle", () => localStorage.setItem("lit-rlhf guide", $("guide").open ? "open" : "closed"));
}

(async () => {
  about = await ask("api/about");
  drawInstructions(about.instructions);
  drawKeys();
  document.body.dataset.mode = about.mode;
  $("records").textContent = about.records;
  $("next").textContent = about.next;
  $("people").replaceChildren(...about.annotators.map((name) => make("option", { value: name })));
  // One window a person: a second person on this computer opens the page with ?annotator=.
  const name = new URLSearchParams(location.search).get("annotator") ?? localStorage.getItem("lit-rlhf annotator");
  if (name) { await begin(name); } else { show("start", true); $("name").focus(); }
})();
