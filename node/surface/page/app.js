// The page of a node: takes what /events pushes, keeps it, and shows it. Nothing here asks for anything else.
//
//   history   all points, records and events       point, record, event   one more
//   now       status and peers, once a second: the sign of life too

import { showApplicants } from "./applicants.js";
import { Charts } from "./charts.js";
import { bytes, el, number, seconds, short, shortId } from "./format.js";
import { linked, pill, showEvents, showMembers, showNode, showRecords } from "./tables.js";

const SILENCE_MS = 6000; // after which the node counts as gone: it speaks each second
const AGAIN_MS = 3000;
const POINTS_MAX = 2000; // history.py thins to half as many; a page that stays open for weeks must not grow
const RECORDS_MAX = 32; // history.py
const EVENTS_MAX = 200;

const page = { points: new Map(), records: [], events: [], now: null, axis: "epoch", heardAt: 0, lostAt: 0 };
const byId = (id) => document.getElementById(id);
const charts = new Charts(byId("charts"));

// --- the stream ---------------------------------------------------------------------------------------

let source = null;

function listen() {
  source?.close();
  source = new EventSource("/events");
  const on = (name, take) =>
    source.addEventListener(name, (message) => {
      page.heardAt = Date.now();
      take(JSON.parse(message.data));
    });
  on("history", takeHistory);
  on("point", takePoint);
  on("record", takeRecord);
  on("event", (event) => {
    page.events = [...page.events, event].slice(-EVENTS_MAX);
    changed("events");
  });
  on("now", (now) => {
    page.now = now;
    changed("now");
  });
  source.addEventListener("error", () => changed("now"));
}

function takeHistory(history) {
  page.points = new Map(history.points.map((point) => [point.epoch, point]));
  page.records = history.records;
  page.events = history.events;
  changed("points", "records", "events");
}

/** A point of an epoch before the last is more of one that is there, or a fork was left: what follows is void. */
function takePoint(point) {
  if (!page.points.has(point.epoch)) {
    for (const epoch of page.points.keys()) if (epoch > point.epoch) page.points.delete(epoch);
  }
  page.points.set(point.epoch, point);
  if (page.points.size > POINTS_MAX) listen(); // a new stream begins with all of them, thinned
  changed("points");
}

function takeRecord(record) {
  page.records = [...page.records.filter((r) => r.epoch < record.epoch), record].slice(-RECORDS_MAX);
  changed("records");
}

/** The browser calls again by itself after a break, but not after a refusal, nor when all is merely silent. */
setInterval(() => {
  const silent = Date.now() - page.heardAt;
  if (silent > SILENCE_MS) changed("now");
  const closed = source.readyState === EventSource.CLOSED;
  if (silent > SILENCE_MS && (closed || source.readyState === EventSource.OPEN)) listen();
}, AGAIN_MS);

// --- showing ------------------------------------------------------------------------------------------

let due = new Set();

/** Show it with the next frame: many things may come at once. */
function changed(...parts) {
  if (!due.size) requestAnimationFrame(show);
  for (const part of parts) due.add(part);
}

function show() {
  const parts = due;
  due = new Set();
  showStream();
  if (parts.has("points")) charts.draw([...page.points.values()], page.axis);
  if (parts.has("events")) showEvents(page.events);
  if (page.now) {
    if (parts.has("now") || parts.has("points")) showTiles();
    if (parts.has("now")) {
      showHead();
      showNode(page.now.status);
      showApplicants(page.now.status.applicants ?? []);
    }
    if (parts.has("now") || parts.has("records")) showMembers(page.now, page.records);
  }
  if (parts.has("records") || parts.has("now")) showRecords(page.records, names());
}

/** Peer id -> what it is called; of two that bear one name, with the end of the id beside it. */
function names() {
  const named = (page.now?.status.roll ?? []).filter((p) => p.name);
  const bearers = (name) => named.filter((p) => p.name === name).length;
  const known = new Map(named.map((p) => [p.peer_id, bearers(p.name) > 1 ? `${p.name} (${shortId(p.peer_id)})` : p.name]));
  const own = page.now?.status.peer_id;
  if (own) known.set(own, page.now.status.name || "this node");
  return known;
}

/** Whether what stands here is what is. */
function showStream() {
  const lost = Date.now() - page.heardAt > SILENCE_MS || source.readyState !== EventSource.OPEN;
  if (lost && !page.lostAt) page.lostAt = Date.now();
  if (!lost) page.lostAt = 0;
  const text = !lost ? "live" : page.now ? `the node does not answer since ${new Date(page.lostAt).toLocaleTimeString()}` : "connecting";
  const stream = byId("stream");
  if (stream.textContent !== text) stream.textContent = text;
  stream.className = "stream " + (!lost ? "live" : page.now ? "lost" : "quiet");
}

function showHead() {
  const { status, reason } = page.now; // of a node that is ready: what it has waited for too long
  byId("run").textContent = status.run_name || "Tapestry node";
  byId("me").textContent = [status.name, status.peer_id && shortId(status.peer_id)].filter(Boolean).join(" ");
  document.title = `${status.phase} · epoch ${status.epoch} · ${status.run_name || "Tapestry"}`;
  const phase = byId("phase");
  if (phase.textContent !== status.phase) {
    phase.textContent = status.phase;
    phase.className = pill(status.phase).className;
  }
  const notice = byId("reason");
  const told = reason || status.trainer_trouble || status.loss_trouble || "";
  notice.hidden = !told;
  notice.classList.toggle("bad", status.phase === "degraded");
  if (notice.textContent !== told) notice.textContent = told;
}

function showTiles() {
  const { status } = page.now;
  const peers = linked(page.now);
  const points = [...page.points.values()];
  const last = points.at(-1) ?? {};
  const timed = points.findLast((p) => p.round_s !== undefined);
  const record = page.records.at(-1);
  const contributed = record ? record.members.filter(([, weight]) => weight).length : 0;
  const ownLoss = points.findLast((p) => p.loss !== undefined)?.loss ?? status.loss;
  const validated = Object.entries(status.val_losses).filter(([, loss]) => loss !== null);
  const saved = status.bytes.sent_float32 - status.bytes.sent;
  const tiles = [
    ["epoch", "Epoch", number(status.epoch), stage(status)],
    ["loss", "Loss of this node", number(ownLoss, 3), "mean of its last epoch"],
    ["validation", "Validation loss", number(status.val_loss, 3), validated.length > 1 ? validated.map(([n, l]) => `${n} ${number(l, 3)}`).join(", ") : "of the shared base"],
    ["speed", "Tokens per second", short(status.tokens_per_second), last.tokens ? `${short(last.tokens)} tokens in the run` : ""],
    ["members", "Members", number(status.members || peers.length + 1), record ? `${contributed} in the last record` : "no record yet"],
    ["round", "Averaging", seconds(timed?.round_s), "of the last round"],
    ["sent", "Sent", bytes(status.bytes.sent), saved > 0 ? `${bytes(saved)} less than float32` : ""],
    ["passes", "Data passes", number(status.data_passes, 2), "over this node's data"],
  ];
  byId("tiles").replaceChildren(...tiles.map(([id, name, value, more]) =>
    el("div", { id: "tile-" + id }, el("dt", { text: name }), el("dd", { class: "value", text: value }), el("dd", { class: "more", text: more || "\u00a0" }))));
}

function stage(status) {
  const round = status.round;
  if (!round) return status.phase === "training" ? "" : status.phase;
  const waiting = round.waiting_on?.length;
  if (round.stage === "training") return `round ${round.epoch + 1}: inner steps`;
  return `round ${round.epoch + 1}: ${round.stage}` + (waiting ? `, waits for ${waiting}` : "");
}

// --- what a person may choose -------------------------------------------------------------------------

for (const button of document.querySelectorAll("[data-axis]")) {
  button.addEventListener("click", () => {
    page.axis = button.dataset.axis;
    for (const other of document.querySelectorAll("[data-axis]")) other.setAttribute("aria-pressed", String(other === button));
    changed("points");
  });
}

const THEMES = { "": "as the system has them", light: "light", dark: "dark" };

function paint(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  byId("theme").setAttribute("aria-label", `Colours: ${THEMES[theme]}`);
  byId("theme").title = `Colours: ${THEMES[theme]}`;
  charts.recolour();
}

let theme = localStorage.getItem("theme") ?? "";
byId("theme").addEventListener("click", () => {
  const order = Object.keys(THEMES);
  theme = order[(order.indexOf(theme) + 1) % order.length];
  localStorage.setItem("theme", theme);
  paint(theme);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.recolour());
paint(theme in THEMES ? theme : "");

listen();
changed("events", "records");
