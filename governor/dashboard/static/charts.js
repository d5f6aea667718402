// The day as charts: what was decided, what was moved, how long it took; each with a table for who cannot see it.

import { minuteText, fullText } from "./clock.js";
import { byId, el, text } from "./dom.js";
import { milliseconds, number, usd } from "./format.js";

const { uPlot } = globalThis;
const HEIGHT = 170;
const BAND = 6;

const CHARTS = [
  {
    title: "Verdicts",
    note: "a bar is half an hour; the line on top is the state",
    stacked: true,
    every: 6,
    format: number,
    series: [
      ["allowed", "allowed"],
      ["blocked", "blocked"],
      ["skipped", "skipped"],
      ["rejected", "rejected"],
    ],
    summary: "sum",
  },
  {
    title: "Notional permitted, USD since midnight UTC",
    note: "",
    format: usd,
    series: [["notional", "permitted"]],
    limit: (snapshot) => snapshot.status.total_daily_notional?.limit,
    summary: "last",
  },
  {
    title: "Latency, plan to verdict",
    note: "",
    format: milliseconds,
    series: [
      ["latency_ms", "median"],
      ["latency_max_ms", "most"],
    ],
    points: true,
    summary: "last",
  },
];

let latest = null;
let drawn = [];

export function startCharts() {
  drawn = CHARTS.map(makeChart);
  byId("charts-body").replaceChildren(...drawn.map((one) => one.node));
  new ResizeObserver(() => drawn.forEach((one) => one.resize())).observe(byId("charts-body"));
  document.addEventListener("zone", redrawCharts);
}

export function renderCharts(snapshot) {
  latest = snapshot;
  for (const one of drawn) one.update(snapshot);
}

/** Colours and times are drawn into a canvas: another theme or zone needs another drawing. */
export function redrawCharts() {
  for (const one of drawn) one.forget();
  if (latest !== null) renderCharts(latest);
}

const colour = (node) => getComputedStyle(node).color;

function makeChart(spec) {
  const swatches = spec.series.map(([name]) => el("i", { class: `swatch ${name}`, "aria-hidden": "true" }));
  const values = spec.series.map(() => el("b"));
  const at = el("span", { class: "at" });
  const legend = el("p", { class: "legend" }, ...spec.series.map(([, label], n) => el("span", {}, swatches[n], `${label} `, values[n])), at);
  const host = el("div", { class: "plot", "aria-hidden": "true" });
  const table = el("tbody");
  const limitSwatch = el("i", { class: "swatch limit-line", "aria-hidden": "true" });
  const limitWord = el("b");
  const limitLegend = spec.limit ? el("span", {}, limitSwatch, "limit ", limitWord) : null;
  if (limitLegend) legend.insertBefore(limitLegend, at);
  const names = ["from", ...spec.series.map(([, label]) => label), "state"];
  const head = el("tr", {}, ...names.map((name, n) => el("th", { scope: "col", class: n > 0 && n < names.length - 1 && "right" }, name)));
  const details = el("details", {}, el("summary", {}, "As a table, by the hour"), el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": spec.title }, el("table", {}, el("thead", {}, head), table)));
  const node = el("figure", { class: "chart" }, el("figcaption", {}, el("h3", {}, spec.title), spec.note ? el("p", { class: "hint" }, spec.note) : null), legend, host, details);
  let plot = null;
  let chart = null;
  let columns = [];
  let from = [];

  const readout = (index) => {
    if (chart === null) return;
    columns.forEach((column, n) => text(values[n], index === null ? overall(spec, column) : spec.format(column[index])));
    text(at, index === null ? (spec.summary === "sum" ? "in 24 h" : "latest") : `at ${minuteText(from[index])}`);
  };

  const update = (snapshot) => {
    chart = snapshot.chart;
    from = everyNth(chart.t, spec.every);
    columns = spec.series.map(([name]) => summed(chart[name], spec.every));
    const data = [from, ...(spec.stacked ? stack(columns) : spec.points ? columns.map(positive) : columns)];
    const limit = spec.limit?.(snapshot) ?? null;
    if (limitLegend) {
      limitLegend.hidden = false;
      text(limitWord, limit === null ? "off" : spec.format(limit));
      data.push(from.map(() => limit));
    }
    if (plot === null) plot = new uPlot(options(spec, host, swatches, limitSwatch, () => chart, readout), data, host);
    else plot.setData(data);
    readout(null);
    if (details.open) fillTable(table, spec, chart);
  };
  details.addEventListener("toggle", () => details.open && chart !== null && fillTable(table, spec, chart));
  return {
    node,
    update,
    resize: () => plot?.setSize({ width: host.clientWidth, height: HEIGHT }),
    forget: () => {
      plot?.destroy();
      plot = null;
    },
  };
}

function overall(spec, values) {
  if (spec.summary === "sum") return spec.format(values.reduce((sum, each) => sum + (each ?? 0), 0));
  const known = values.filter((each) => each !== null);
  return known.length ? spec.format(known.at(-1)) : "–";
}

const everyNth = (values, step = 1) => values.filter((_, index) => index % step === 0);

function summed(values, step = 1) {
  if (step === 1) return values;
  return everyNth(values, step).map((_, index) => values.slice(index * step, (index + 1) * step).reduce((sum, each) => sum + (each ?? 0), 0));
}

/** A logarithmic scale has no zero. */
const positive = (values) => values.map((each) => (each === null ? null : Math.max(each, 0.1)));

/** Each series on top of those before it; the highest first, so that the lower ones are drawn over it. */
function stack(columns) {
  const total = columns[0].map(() => 0);
  return columns.map((column) => column.map((value, index) => (total[index] += value))).reverse();
}

function options(spec, host, swatches, limitSwatch, chart, readout) {
  const muted = colour(host);
  const grid = getComputedStyle(host).borderTopColor;
  const bars = uPlot.paths.bars({ align: 1, size: [0.86, Infinity] });
  const stepped = uPlot.paths.stepped({ align: 1 });
  const paths = { bars, stepped, dots: () => null };
  const axis = { stroke: muted, grid: { stroke: grid, width: 1 }, ticks: { show: false }, font: "11px Inter, system-ui, sans-serif" };
  const lines = spec.series.map(([, label], n) => ({
    label,
    stroke: colour(swatches[n]),
    width: spec.stacked ? 0 : 1.5,
    paths: spec.stacked ? paths.bars : spec.points ? (n ? paths.dots : undefined) : paths.stepped,
    spanGaps: false,
    points: spec.points ? { show: true, size: n ? 3 : 2, width: 0, fill: colour(swatches[n]) } : { show: false },
    fill: spec.stacked ? colour(swatches[n]) : spec.limit && faded(colour(swatches[n]), 0.18),
  }));
  if (spec.stacked) lines.reverse();
  if (spec.limit) lines.push({ label: "limit", stroke: colour(limitSwatch), width: 1.5, dash: [6, 4], points: { show: false } });
  return {
    width: host.clientWidth || 300,
    height: HEIGHT,
    padding: [BAND + 6, 16, 0, 0],
    legend: { show: false },
    cursor: { y: false, points: { show: !spec.stacked, size: 6 }, drag: { x: false, y: false } },
    scales: { x: { time: true }, y: spec.points ? { distr: 3, range: decades } : { range: (_, __, high) => [0, Math.max(high ?? 0, 4) * 1.08] } },
    axes: [
      { ...axis, values: (_, ticks) => ticks.map(minuteText), space: 60, size: 26, grid: { show: false } },
      { ...axis, values: (_, ticks) => ticks.map((tick) => compact(tick, spec)), size: 52, space: 32, splits: spec.points ? powers : undefined, filter: (__, splits) => splits },
    ],
    series: [{}, ...lines],
    hooks: {
      setCursor: [(plot) => readout(plot.cursor.idx ?? null)],
      draw: spec.stacked ? [(plot) => drawStates(plot, chart())] : [],
    },
  };
}

const short = new Intl.NumberFormat("en-US", { notation: "compact", maximumFractionDigits: 1 });

/** From one power of ten to another, and at least from 1 to 100 ms. */
const decades = (_, low, high) => [10 ** Math.floor(Math.log10(Math.min(low ?? 1, 1))), 10 ** Math.ceil(Math.log10(Math.max(high ?? 1, 100)))];

function powers(plot) {
  const { min, max } = plot.scales.y;
  const found = [];
  for (let each = min; each <= max * 1.01; each *= 10) found.push(each);
  return found;
}

function compact(value, spec) {
  if (spec.format !== milliseconds) return short.format(value);
  return value >= 1000 ? `${value / 1000} s` : `${value} ms`;
}

const faded = (rgb, alpha) => rgb.replace(/^rgba?\(([^),]+,[^),]+,[^),]+).*\)$/, `rgba($1, ${alpha})`);

/** The state as a band over the plot: the higher, the worse, so that colour is not all that tells. */
function drawStates(plot, chart) {
  const { ctx, bbox } = plot;
  const ratio = devicePixelRatio;
  const heights = { ARMED: 2, THROTTLED: 4, DISARMED: BAND };
  const probe = plot.root.closest(".plot");
  ctx.save();
  chart.t.forEach((from, index) => {
    const state = chart.state[index];
    if (!(state in heights)) return;
    ctx.fillStyle = getComputedStyle(probe).getPropertyValue(`--band-${state.toLowerCase()}`);
    const left = plot.valToPos(from, "x", true);
    const right = plot.valToPos(from + chart.step_s, "x", true);
    const high = heights[state] * ratio;
    ctx.fillRect(left, bbox.top - 3 * ratio - high, Math.min(right, bbox.left + bbox.width) - left + 1, high);
  });
  ctx.restore();
}

const BAD = ["ARMED", "THROTTLED", "DISARMED"];

function fillTable(body, spec, chart) {
  const perRow = Math.max(1, Math.round(3600 / chart.step_s));
  const rows = [];
  for (let from = 0; from < chart.t.length; from += perRow) {
    const part = (values) => values.slice(from, from + perRow);
    const worst = BAD[Math.max(...part(chart.state).map((state) => BAD.indexOf(state)))] ?? "–";
    const cells = spec.series.map(([name]) => overTheHour(spec, part(chart[name])));
    rows.unshift(el("tr", {}, el("th", { scope: "row" }, fullText(chart.t[from]).slice(5, 16)), ...cells.map((value) => el("td", { class: "right" }, value)), el("td", {}, worst)));
  }
  body.replaceChildren(...rows);
}

function overTheHour(spec, values) {
  if (spec.summary === "sum") return spec.format(values.reduce((sum, each) => sum + (each ?? 0), 0));
  const known = values.filter((each) => each !== null);
  return known.length ? spec.format(Math.max(...known)) : "–";
}
