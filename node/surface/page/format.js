// Numbers, sizes, times and names as people read them; and `el`, which makes elements without markup.

const UNKNOWN = "–";

export function number(value, digits = 0) {
  if (value === null || value === undefined || !Number.isFinite(value)) return UNKNOWN;
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

/** 1234567 -> "1.23 M" */
export function short(value, unit = "") {
  if (value === null || value === undefined || !Number.isFinite(value)) return UNKNOWN;
  const steps = ["", "k", "M", "G", "T", "P"];
  let step = 0;
  while (Math.abs(value) >= 999.5 && step < steps.length - 1) [value, step] = [value / 1000, step + 1];
  const digits = step === 0 && Number.isInteger(value) ? 0 : Math.abs(value) < 9.995 ? 2 : Math.abs(value) < 99.95 ? 1 : 0;
  const suffix = steps[step] + unit;
  return value.toFixed(digits) + (suffix ? " " + suffix : "");
}

export const bytes = (value) => short(value, "B");

/** Seconds -> "0.42 s", "12 s", "3 min 5 s", "2 h 10 min", "3 days 1 h" */
export function seconds(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return UNKNOWN;
  if (value < 9.95) return value.toFixed(value < 0.995 ? 2 : 1) + " s";
  const [whole, minutes, hours] = [Math.round(value), Math.round(value / 60), Math.round(value / 3600)];
  if (whole < 60) return whole + " s";
  if (whole < 3600) return Math.floor(whole / 60) + " min " + (whole % 60) + " s";
  if (minutes < 1440) return Math.floor(minutes / 60) + " h " + (minutes % 60) + " min";
  return Math.floor(hours / 24) + (hours < 48 ? " day " : " days ") + (hours % 24) + " h";
}

/** How long ago, in steps that do not change each second. */
export function ago(unixS) {
  const past = Date.now() / 1000 - unixS;
  if (past < 10) return "just now";
  if (past < 60) return Math.floor(past / 10) * 10 + " s ago";
  if (past < 3600) return Math.floor(past / 60) + " min ago";
  if (past < 86400) return Math.floor(past / 3600) + " h ago";
  return Math.floor(past / 86400) + " days ago";
}

/** The time of day, and the date where it is not today's. */
export function clock(unixS) {
  const then = new Date(unixS * 1000);
  const time = then.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });
  if (then.toDateString() === new Date().toDateString()) return time;
  return then.toLocaleDateString([], { month: "short", day: "numeric" }) + " " + time.slice(0, 5);
}

/** Peer ids begin alike: their end tells them apart. */
export const shortId = (peer) => "…" + peer.slice(-6);

/** "/ip4/203.0.113.7/tcp/4001/p2p/12D3…" -> "203.0.113.7:4001" */
export function hostPort(address) {
  const found = /^\/(ip4|ip6|dns|dns4|dns6)\/([^/]+)\/(tcp|udp)\/(\d+)/.exec(address);
  if (!found) return address;
  return (found[1] === "ip6" ? "[" + found[2] + "]" : found[2]) + ":" + found[4];
}

/** An element with properties (class, text, data-*, aria-*) and children. Text is text, never markup. */
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "text") made.textContent = value;
    else if (name === "on") for (const [event, f] of Object.entries(value)) made.addEventListener(event, f);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

export function svg(tag, properties = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(properties)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
