// Who asks to join, and the button that lets one in. The node takes it only with the token of its home, which a
// person types here; it is kept in the field and nowhere else.

import { ago, el, shortId } from "./format.js";

const byId = (id) => document.getElementById(id);
const asked = new Map(); // peer -> what the node said

byId("admit-form").addEventListener("submit", (event) => event.preventDefault()); // Enter sends nothing

/** The section is there only while somebody waits. */
export function showApplicants(applicants) {
  byId("applicants-section").hidden = !applicants.length;
  const rows = applicants.map((one) => ({ ...one, since: ago(one.since), said: asked.get(one.peer) ?? "" }));
  const root = byId("applicants");
  const key = JSON.stringify(rows);
  if (root.shownContent === key) return;
  root.shownContent = key;
  root.replaceChildren(...rows.map(row));
}

function row(one) {
  const button = el("button", { type: "button", "aria-label": `Admit ${one.name || shortId(one.peer)}`, text: "Admit" });
  button.addEventListener("click", () => admit(one));
  return el(
    "li",
    { "data-peer": one.peer },
    el("span", { class: "who", text: one.name || shortId(one.peer) }),
    el("span", { class: "mono quiet", title: one.peer, text: shortId(one.peer) }),
    el("span", { class: "quiet", text: `first asked ${one.since}` }),
    el("span", { class: "said", role: "status", text: one.said }),
    button,
  );
}

async function admit({ peer, name }) {
  const token = byId("admit-token");
  if (!token.value.trim()) {
    token.focus();
    return say(peer, "type the token first");
  }
  try {
    const answer = await fetch("/admit", {
      method: "POST",
      headers: { Authorization: `Bearer ${token.value.trim()}`, "Content-Type": "application/json" },
      body: JSON.stringify({ peer, name }),
    });
    say(peer, answer.ok ? "asked for: the next record takes it up" : (await answer.text()).trim());
  } catch {
    say(peer, "the node does not answer");
  }
}

function say(peer, text) {
  asked.set(peer, text);
  byId("applicants").querySelector(`[data-peer="${CSS.escape(peer)}"] .said`).textContent = text;
}
