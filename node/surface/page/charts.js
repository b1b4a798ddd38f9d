// The curves: what each shows of the history's points, drawn by uPlot (vendor/).
//
// A chart is a table in CHARTS: title, unit, and `lines`, which takes the points and gives its lines. Where a
// line is not known at a point it has null. Points that stand for several epochs (history.py thins them out)
// carry bytes of all of them, which are divided by their number.

import { bytes, el, number, seconds, short, svg } from "./format.js";

const HEIGHT = 210;
const PHASES = [
  ["training", "inner steps", 1],
  ["ready", "waiting for members", 6],
  ["exchanging", "exchange", 2],
  ["gate", "measuring the result", 4],
  ["accepted", "deciding", 3],
];

const CHARTS = [
  {
    id: "loss", title: "Loss", unit: "nats per token", format: (v) => number(v, 3),
    lines: (points) => [
      { label: "this node's steps", color: 1, values: points.map((p) => p.loss) },
      ...sets(points).map((name, i) => ({
        label: "validation" + (name ? " " + name : ""), color: 2 + (i % 5), dash: i > 4 ? [2, 3] : undefined,
        values: points.map((p) => p.validation?.[name]),
      })),
    ],
  },
  {
    id: "speed", title: "Speed", unit: "tokens per second", format: (v) => short(v), zero: true,
    lines: (points) => [
      { label: "this node", color: 1, fill: true, values: points.map((p) => p.tokens_per_second) },
    ],
  },
  {
    id: "phases", title: "Time of a round", unit: "by phase", format: seconds, zero: true, stacked: true,
    lines: (points) => phases(points).map(([phase, label, color]) => ({
      label, color, values: points.map((p) => (p.phases ? (p.phases[phase] ?? 0) : null)),
    })),
  },
  {
    id: "bytes", title: "Bytes of a round", unit: "with all peers", format: bytes, zero: true,
    lines: (points) => [
      { label: "sent", color: 1, values: perEpoch(points, "sent") },
      { label: "received", color: 3, values: perEpoch(points, "received") },
      { label: "sent, were it float32", color: 6, dash: [5, 4], values: perEpoch(points, "sent_float32") },
    ],
  },
  {
    id: "agreement", title: "Agreement of contributions", unit: "1: all alike", format: (v) => number(v, 3), zero: true,
    optional: (points) => points.some((p) => p.agreement),
    lines: (points) => [
      { label: "cosine to the mean", color: 4, values: points.map((p) => p.agreement?.cosine) },
      { label: "same sign", color: 3, values: points.map((p) => p.agreement?.sign) },
      { label: "norm kept", color: 2, values: points.map((p) => p.agreement?.norm_kept) },
    ],
  },
];

/** Only in runs with a gate is a result measured. */
const phases = (points) => PHASES.filter(([phase]) => phase !== "gate" || points.some((p) => p.phases?.gate));

const sets = (points) => [...new Set(points.flatMap((p) => Object.keys(p.validation ?? {})))].sort();

function perEpoch(points, name) {
  return points.map((p, i) => {
    if (p.contributions === undefined) return null;
    return (p[name] ?? 0) / (i ? Math.max(1, p.epoch - points[i - 1].epoch) : 1);
  });
}

/** The colour as the page has it now: variables differ by theme, and a canvas knows none. */
function colour(name) {
  const probe = document.body.appendChild(el("i"));
  probe.style.color = `var(--${name})`;
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

const faint = (rgb, alpha) => rgb.replace("rgb(", "rgba(").replace(")", `, ${alpha})`);

/** All charts. `draw(points, axis)` shows them, `axis` being "epoch" or "tokens". */
export class Charts {
  constructor(root) {
    this.sync = uPlot.sync("run");
    this.charts = CHARTS.map((spec) => new Chart(spec, root, this.sync));
  }

  draw(points, axis) {
    const known = points.filter((p) => Number.isFinite(p[axis]));
    for (const chart of this.charts) chart.draw(known, axis);
  }

  /** The theme has changed. */
  recolour() {
    for (const chart of this.charts) chart.remake();
  }
}

class Chart {
  constructor(spec, root, sync) {
    this.spec = spec;
    this.sync = sync;
    this.plot = null;
    this.shape = "";
    this.legend = el("ul", { class: "legend" });
    this.empty = el("p", { class: "empty", text: "nothing yet" });
    this.area = el("div", { class: "plot", role: "img", "aria-label": spec.title + ": nothing yet" }, this.empty);
    const title = el("h3", { text: spec.title }, el("span", { class: "unit", text: spec.unit }));
    this.figure = el("figure", { class: "card chart", id: "chart-" + spec.id });
    this.figure.append(el("figcaption", {}, title, this.legend), this.area);
    this.figure.hidden = Boolean(spec.optional);
    root.append(this.figure);
    new ResizeObserver(() => this.resize()).observe(this.area);
  }

  draw(points, axis) {
    if (this.spec.optional) this.figure.hidden = !this.spec.optional(points);
    this.lines = this.spec.lines(points).map((line) => ({ ...line, values: line.values.map((v) => v ?? null) }));
    this.xs = points.map((p) => p[axis]);
    this.axis = axis;
    const any = this.lines.some((line) => line.values.some((v) => v !== null));
    this.empty.hidden = any;
    if (!any) return;
    const shape = JSON.stringify([axis, this.lines.map((line) => line.label)]);
    if (!this.plot || shape !== this.shape) {
      this.shape = shape;
      this.remake();
    } else {
      this.plot.setData(this.data());
    }
    this.showLegend(null);
    this.area.setAttribute("aria-label", this.words());
  }

  /** x, then each line; stacked ones as sums from the bottom. */
  data() {
    if (!this.spec.stacked) return [this.xs, ...this.lines.map((line) => line.values)];
    let below = this.xs.map(() => 0);
    const sums = this.lines.map((line) => (below = line.values.map((v, i) => (v === null ? null : (below[i] ?? 0) + v))));
    return [this.xs, ...sums];
  }

  remake() {
    if (!this.lines) return;
    this.plot?.destroy();
    this.plot = null;
    if (!this.area.clientWidth) return;
    this.colours = this.lines.map((line) => colour("series-" + line.color));
    this.plot = new uPlot(this.options(), this.data(), this.area);
    this.showLegend(null);
  }

  options() {
    const { spec, lines, colours } = this;
    const [quiet, grid] = [colour("quiet"), colour("grid")];
    const font = "11px " + getComputedStyle(document.body).fontFamily;
    const axis = { stroke: quiet, font, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1, size: 4 } };
    const few = this.xs.length < 40;
    return {
      width: this.area.clientWidth,
      height: HEIGHT,
      legend: { show: false },
      cursor: {
        sync: { key: this.sync.key },
        y: false,
        drag: { x: true, y: false },
        points: { size: 6 },
      },
      scales: { x: { time: false }, y: spec.zero ? { range: (_, __, max) => [0, (max || 1) * 1.08] } : {} },
      axes: [
        { ...axis, size: 28, space: 60, values: (_, ticks) => ticks.map((t) => (Number.isInteger(t) ? trimmed(short(t)) : "")) },
        { ...axis, size: 58, space: 34, values: (_, ticks) => ticks.map((t) => this.tick(t, ticks)) },
      ],
      series: [
        {},
        ...lines.map((line, i) => ({
          stroke: colours[i],
          width: 1.75,
          dash: line.dash,
          spanGaps: true,
          points: { show: few, size: 4, fill: colours[i] },
          fill: line.fill || (spec.stacked && i === 0) ? faint(colours[i], spec.stacked ? 0.35 : 0.12) : undefined,
        })),
      ],
      bands: spec.stacked
        ? lines.slice(1).map((_, i) => ({ series: [i + 2, i + 1], fill: faint(colours[i + 1], 0.35) }))
        : [],
      hooks: { setCursor: [(plot) => this.showLegend(plot.cursor.idx)] },
    };
  }

  tick(value, ticks) {
    if (this.spec.id === "loss") {
      const step = Math.abs(ticks[1] - ticks[0]) || 1;
      return value.toFixed(Math.min(4, Math.max(0, Math.ceil(-Math.log10(step)))));
    }
    if (value === 0) return "0";
    if (this.spec.id === "agreement") return String(Math.round(value * 1000) / 1000);
    return trimmed(this.spec.format(value));
  }

  /** Each line with its value where the cursor is, or its last one. */
  showLegend(index) {
    if (!this.plot) return;
    const items = this.lines.map((line, i) => {
      const at = index ?? lastKnown(line.values);
      const value = at < 0 ? null : nearest(line.values, at);
      const mark = svg("svg", { width: 16, height: 6, "aria-hidden": "true" });
      const dash = line.dash ? { "stroke-dasharray": "4 3" } : {};
      mark.append(svg("line", { x1: 0, x2: 16, y1: 3, y2: 3, stroke: this.colours[i], "stroke-width": 2.5, ...dash }));
      return el("li", {}, mark, line.label + " ", el("b", { text: this.spec.format(value) }));
    });
    if (index !== null && index !== undefined) {
      items.unshift(el("li", {}, el("b", { text: (this.axis === "epoch" ? "epoch " : "tokens ") + short(this.xs[index]) })));
    }
    this.legend.replaceChildren(...items);
  }

  words() {
    const parts = this.lines.map((line) => {
      const known = line.values.filter((v) => v !== null);
      if (!known.length) return null;
      return `${line.label} from ${this.spec.format(known[0])} to ${this.spec.format(known.at(-1))}`;
    });
    const range = `over ${this.axis === "epoch" ? "epochs" : "tokens"} ${short(this.xs[0])} to ${short(this.xs.at(-1))}`;
    return `${this.spec.title}: ${parts.filter(Boolean).join(", ")}, ${range}`;
  }

  resize() {
    const width = this.area.clientWidth;
    if (!width || !this.lines) return;
    if (this.plot) this.plot.setSize({ width, height: HEIGHT });
    else this.remake();
  }
}

/** "4.00 k" -> "4 k" */
const trimmed = (text) => text.replace(/\.0+(?= |$)|(\.\d*[1-9])0+(?= |$)/, "$1");

const lastKnown = (values) => values.findLastIndex((v) => v !== null);

/** The value at `index`, or the last one before it: not every epoch is measured. */
function nearest(values, index) {
  for (let i = index; i >= 0; i--) if (values[i] !== null) return values[i];
  return null;
}
