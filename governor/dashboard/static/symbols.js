// Per symbol: windows and totals against their limits, the nearest to a limit first.

import { bar, level, share } from "./bar.js";
import { due, everySecond, stamp } from "./clock.js";
import { attr, byId, code, el, keyed, show, text } from "./dom.js";
import { number, usd } from "./format.js";
import { verdict } from "./words.js";

const FEW = 6;
const LIMITS = [
  ["exec_1h", "1 h", number],
  ["exec_5min", "5 min", number],
  ["daily_notional", "USD today", usd],
  ["daily_qty", "Quantity today", number],
];
let all = false;
let latest = null;

export const nearness = (values) => Math.max(...LIMITS.map(([name]) => share(values[name])));

export function startSymbols() {
  byId("symbols-filter").addEventListener("input", () => latest && renderSymbols(latest));
  byId("symbols-more").addEventListener("click", () => {
    all = !all;
    renderSymbols(latest);
  });
  // What counts down to "now" has to end with the word that keeps it shut, not a message later.
  everySecond(() => latest && renderSymbols(latest));
}

export function renderSymbols(snapshot) {
  latest = snapshot;
  const wanted = byId("symbols-filter").value.trim().toUpperCase();
  const everything = Object.entries(snapshot.status.symbols);
  const closed = shut(snapshot.status);
  const rows = everything
    .filter(([symbol]) => symbol.includes(wanted))
    .map(([symbol, values]) => ({ symbol, values, near: nearness(values), closed }))
    .sort((a, b) => b.near - a.near || b.values.throttled - a.values.throttled || (a.symbol < b.symbol ? -1 : 1));
  text(byId("symbols-count"), everything.length);
  keyed(byId("symbols-list"), all ? rows : rows.slice(0, FEW), (row) => row.symbol, makeRow);
  const more = byId("symbols-more");
  show(more, rows.length > FEW);
  text(more, all ? "Show only the nearest to a limit" : `Show all ${rows.length}`);
  show(byId("symbols-empty"), rows.length === 0);
  text(byId("symbols-empty"), everything.length ? "No symbol matches the filter." : "No symbol was seen yet.");
}

function makeRow({ symbol }) {
  const mark = el("span", { class: "mark THROTTLED", hidden: true }, "THROTTLED");
  const bars = LIMITS.map(([name, label, format]) => [name, bar(label, format)]);
  const next = el("span", { class: "next" }, el("span", { class: "bar-label" }, "Next allowed "), el("time"), el("span", { class: "words" }));
  const last = el("button", { type: "button", class: "link last" });
  const none = el("span", { class: "muted last" }, "no verdict yet");
  const node = el(
    "li",
    { class: "symbol-row" },
    el("span", { class: "symbol" }, el("b", {}, symbol), mark),
    ...bars.map(([, each]) => each.node),
    next,
    last,
    none,
  );
  const update = ({ values, near, closed }) => {
    attr(node, "data-level", level(near));
    show(mark, values.throttled);
    for (const [name, each] of bars) each.update(values[name]);
    renderNext(next, values.next_allowed, closed);
    renderLast(last, none, values.last);
  };
  return { node, update };
}

/** What keeps a plan back that its limits would let pass; empty: nothing. */
function shut({ state, halted, hold_until: hold }) {
  if (state === "DISARMED") return "once re-armed";
  if (halted !== null && halted !== undefined) return "the brake is set";
  return hold ? "permits are held back" : "";
}

function renderNext(node, at, closed) {
  const [, when, words] = node.children;
  const told = at === null ? "never under these limits" : due(at) ? closed : "";
  show(when, told === "");
  text(words, told);
  if (told === "") stamp(when, at, "in");
}

function renderLast(button, none, last) {
  show(button, Boolean(last));
  show(none, !last);
  if (!last) return;
  attr(button, "data-plan", last.plan_id);
  if (!button.firstChild) button.append(el("b"), " ", el("span", { class: "muted" }));
  const [word, reason] = button.children;
  attr(word, "class", `verdict ${last.verdict}`);
  text(word, verdict(last.verdict));
  code(reason, last.reason);
}
