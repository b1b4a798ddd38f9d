// What stands below the curves: members, events, records, this node. Each is built anew only when it says
// something else than before, so that a selection or a focus is not lost each second.

import { ago, bytes, clock, el, hostPort, number, seconds, short, shortId, svg } from "./format.js";

const PHASES = {
  training: "good", averaging: "busy", joining: "busy", starting: "warn", degraded: "bad", stopping: "warn",
};

export const pill = (phase, kind = PHASES[phase] ?? "") => el("span", { class: "pill " + kind, text: phase });

/** Fill `root` with what `make` makes, if `content` is another than the last time. */
function refill(root, content, make) {
  const key = JSON.stringify(content);
  if (root.shownContent === key) return;
  root.shownContent = key;
  root.replaceChildren(...make());
}

// --- members ----------------------------------------------------------------------------------------

/** The run's members, linked or not; its guests too, while they are linked or in the last record. */
export function showMembers(now, records) {
  const rows = members(now, records);
  const there = rows.filter((row) => row.phase).length;
  const total = rows.length;
  refill(document.getElementById("members-note"), [there, total], () => [`${there} of ${total} are here`]);
  refill(document.getElementById("members"), rows, () => rows.map(memberRow));
}

function members(now, records) {
  const { status } = now;
  const peers = linked(now);
  const last = records.at(-1);
  const total = last ? last.members.reduce((sum, [, weight]) => sum + weight, 0) : 0;
  const found = new Map();
  const put = (peer, more) => found.set(peer, { ...found.get(peer), peer, ...more });
  for (const record of records) {
    for (const [peer, weight] of record.members) {
      put(peer, { heardAt: record.at });
      if (weight) put(peer, { epoch: record.epoch, at: record.at });
    }
  }
  for (const [peer, weight] of last?.members ?? []) put(peer, { voice: total ? weight / total : null, inLast: true });
  const roll = status.roll ?? [];
  for (const { peer_id: peer, name, last_epoch } of roll) {
    put(peer, { name, member: true, epoch: found.get(peer)?.epoch ?? last_epoch });
  }
  for (const peer of peers) {
    const behind = peer.epoch === null ? null : Math.max(0, status.epoch - peer.epoch);
    put(peer.peer_id, { name: peer.name, phase: peer.phase || "linked", behind, address: best(peer.addresses), relayed: relayed(peer), version: peer.same_version === false ? peer.version : "" });
  }
  if (status.peer_id) {
    put(status.peer_id, { name: status.name, own: true, phase: status.phase, behind: 0, address: best(status.addresses) });
  }
  const here = [...found.values()].filter((row) => !roll.length || row.member || row.phase || row.inLast);
  const rows = here.map((row) => ({ ...row, contributed: row.at ? ago(row.at) : "", at: undefined, heardAt: undefined }));
  return rows.sort((a, b) => Boolean(b.own) - Boolean(a.own) || Boolean(b.phase) - Boolean(a.phase) || (a.peer < b.peer ? -1 : 1));
}

/** Not a loopback address, where there is another. */
const best = (addresses) => addresses?.find((a) => !/^\/ip4\/127\.|^\/ip6\/::1\//.test(a)) ?? addresses?.[0] ?? "";

/** Peers that are up; without those that are turned away for a while, of which nothing else is known. */
export const linked = (now) => now.peers.filter((peer) => peer.phase !== "banned");

function relayed(peer) {
  if (typeof peer.relayed === "boolean") return peer.relayed;
  return peer.addresses.length > 0 && peer.addresses.every((a) => a.includes("/p2p-circuit"));
}

function memberRow(row) {
  const who = el("td", { class: "who", title: row.peer }, el("span", { text: row.name || shortId(row.peer) }));
  if (row.own) who.append(el("span", { class: "tag", text: "this node" }));
  else if (row.name) who.append(" ", el("small", { class: "mono", text: shortId(row.peer) }));
  if (row.version) who.append(el("span", { class: "tag", text: `version ${row.version}` }));
  const behind = row.behind === null || row.behind === undefined ? "–" : row.behind ? `${number(row.behind)} ${row.behind === 1 ? "epoch" : "epochs"}` : "at the head";
  const address = el("td", { "data-label": "Address" });
  if (row.address) {
    address.append(el("span", { class: "mono", title: row.address, text: hostPort(row.address) }));
    if (!row.own) address.append(el("span", { class: "tag", text: row.relayed ? "relayed" : "direct" }));
  } else {
    address.append("–");
  }
  return el(
    "tr",
    { class: row.phase ? "" : "gone", "data-peer": row.peer },
    who,
    el("td", {}, row.phase ? pill(row.phase) : pill("not heard", "bad")),
    el("td", { "data-label": "Voice" }, row.voice === undefined || row.voice === null ? "–" : meter(row.voice)),
    el("td", { "data-label": "Behind", text: row.phase ? behind : "–" }),
    el("td", { "data-label": "Last contribution", text: last(row) }),
    address,
  );
}

function last(row) {
  if (!row.epoch) return "none of late";
  return `epoch ${number(row.epoch)}` + (row.contributed ? `, ${row.contributed}` : "");
}

function meter(share) {
  const bar = svg("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" });
  bar.append(svg("rect", { width: share * 100, height: 10 }));
  return el("span", { class: "meter" }, bar, number(share * 100) + " %");
}

// --- events and records -------------------------------------------------------------------------------

const EVENTS_SHOWN = 100;

export function showEvents(events) {
  const root = document.getElementById("events");
  const shown = events.slice(-EVENTS_SHOWN).reverse();
  refill(root, shown, () =>
    shown.length
      ? shown.map((e) => el("li", { class: e.level }, el("time", { datetime: iso(e.at), text: clock(e.at) }), el("span", { text: e.text })))
      : [el("li", { class: "nothing", text: "nothing yet" })]);
}

export function showRecords(records, names) {
  const root = document.getElementById("records");
  const shown = records.slice().reverse();
  refill(root, [shown, [...names]], () =>
    shown.length ? shown.map((record) => recordItem(record, names)) : [el("li", { class: "nothing", text: "no epoch is committed yet" })]);
}

function recordItem(record, names) {
  const who = record.members.map(([peer, weight]) =>
    el("span", { class: weight ? "" : "idle", title: peer, text: (names.get(peer) ?? shortId(peer)) + (weight ? "" : " (voted only)") }));
  if (record.count > record.members.length) who.push(el("span", { text: `and ${record.count - record.members.length} more` }));
  return el(
    "li",
    {},
    el("span", { class: "epoch", text: number(record.epoch) }),
    el("span", { class: "names" }, ...who),
    record.forced ? pill("without a majority", "warn") : null,
    record.ballot ? el("span", { class: "quiet", text: `decided in ballot ${record.ballot + 1}` }) : null,
    el("span", { class: "mono quiet", title: record.head, text: record.head.slice(0, 12) }),
    el("time", { class: "quiet", datetime: iso(record.at), text: clock(record.at) }),
  );
}

const iso = (unixS) => new Date(unixS * 1000).toISOString();

// --- this node --------------------------------------------------------------------------------------

export function showNode(status) {
  const address = status.addresses[0];
  const join = address ? `tapestry start --peer ${address} --run-id ${status.run_id} --data <their data>` : "";
  const ratio = status.bytes.sent ? status.bytes.sent_float32 / status.bytes.sent : 1;
  const facts = [
    ["Others join with", join, true],
    ["Peer id", status.peer_id, true],
    ["Run id", status.run_id, true],
    ["Head", status.head, true],
    ["State digest", status.state_digest, true],
    ["Listens at", status.addresses.join("\n"), false],
    ["Parameters trained", status.params ? number(status.params) : ""],
    ["Sent since the start", `${bytes(status.bytes.sent)} (as float32: ${bytes(status.bytes.sent_float32)}, ${number(ratio, 1)} times)`],
    ["Received since the start", `${bytes(status.bytes.received)} (as float32: ${bytes(status.bytes.received_float32)})`],
    ["Data passes", number(status.data_passes, 2)],
    ["Given up at forks", status.dropped_records ? `${number(status.dropped_records)} epochs, ${short(status.dropped_weight)} tokens` : ""],
    ["Kept as branches", (status.branches || []).join("\n"), true],
  ].filter(([, value]) => value);
  refill(document.getElementById("node"), facts, () => facts.flatMap(fact));
  document.getElementById("version").textContent = `Tapestry ${status.version}, up ${seconds(status.uptime_s)}`;
}

function fact([name, value, code]) {
  const lines = value.split("\n").map((line) => (code === undefined ? el("div", { text: line }) : el("div", { class: "mono", text: line })));
  if (code && navigator.clipboard) lines[0].append(copyButton(name, value));
  return [el("dt", { text: name }), el("dd", {}, ...lines)];
}

function copyButton(name, value) {
  const button = el("button", { type: "button", class: "copy", "aria-label": `Copy: ${name}`, text: "copy" });
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(value);
    button.textContent = "copied";
    setTimeout(() => (button.textContent = "copy"), 1500);
  });
  return button;
}
