// Plans and their verdicts as they come; a row opens to the full explanation.

import { stamp } from "./clock.js";
import { attr, byId, code, el, icon, keyed, show, text } from "./dom.js";
import { milliseconds, number, usd } from "./format.js";
import { fate, verdict } from "./words.js";

const FEW = matchMedia("(max-width: 720px)").matches ? 12 : 60;
const ICONS = { EXECUTE: "check", BLOCK: "cross", SKIP: "dash", REJECTED: "warning" };
let most = FEW;
let paused = null;
let latest = [];
let unseen = 0;

export function startPlans() {
  for (const [id, event] of [["plans-text", "input"], ["plans-verdict", "change"], ["plans-symbol", "change"]]) {
    byId(id).addEventListener(event, draw);
  }
  byId("plans-pause").addEventListener("click", togglePause);
  byId("plans-more").addEventListener("click", () => {
    most = most === FEW ? Infinity : FEW;
    draw();
  });
  byId("plans-list").addEventListener("keydown", move);
}

export function togglePause() {
  paused = paused === null ? latest : null;
  attr(byId("plans-pause"), "aria-pressed", String(paused !== null));
  unseen = 0;
  draw();
}

export function renderPlans({ plans }) {
  if (paused !== null && latest.length) unseen += plans.filter((row) => row.seq > latest[0].seq).length;
  latest = plans;
  draw();
}

function draw() {
  const rows = paused ?? latest;
  const word = unseen ? `Go on (${unseen} new)` : "Go on";
  text(byId("plans-pause"), paused === null ? "Pause" : word);
  const found = rows.filter(wanted());
  keyed(byId("plans-list"), found.slice(0, most), (row) => row.seq, makeRow);
  rove();
  text(byId("plans-count"), found.length === rows.length ? rows.length : `${found.length} of ${rows.length}`);
  show(byId("plans-more"), found.length > FEW);
  text(byId("plans-more"), most === FEW ? `Show all ${found.length}` : `Show only the latest ${FEW}`);
  show(byId("plans-empty"), found.length === 0);
  text(byId("plans-empty"), rows.length ? "No plan matches the filters." : "No plan was seen yet.");
  symbolOptions(rows);
}

function wanted() {
  const words = byId("plans-text").value.trim().toLowerCase().split(/\s+/).filter(Boolean);
  const chosen = byId("plans-verdict").value;
  const symbol = byId("plans-symbol").value;
  return (row) => {
    if ((chosen && row.verdict !== chosen) || (symbol && row.symbol !== symbol)) return false;
    if (!words.length) return true;
    const line = [row.plan_id, row.symbol, row.action, row.reason, verdict(row.verdict), row.permit && fate(row.permit.status)].join(" ").toLowerCase();
    return words.every((word) => line.includes(word));
  };
}

let offered = "";

function symbolOptions(rows) {
  const select = byId("plans-symbol");
  const names = [...new Set(rows.map((row) => row.symbol).filter(Boolean))].sort();
  if (select.value && !names.includes(select.value)) names.push(select.value);
  if (names.join() === offered) return;
  offered = names.join();
  const chosen = select.value;
  select.replaceChildren(select.options[0], ...names.map((name) => el("option", { value: name }, name)));
  select.value = chosen;
}

function makeRow(row) {
  const cell = (name) => el("span", { class: name });
  const cells = Object.fromEntries(["symbol", "plan", "action", "reason", "qty right", "notional right", "latency right", "permit"].map((name) => [name.split(" ")[0], cell(name)]));
  const when = el("time", { class: "when" });
  const word = el("span", { class: `verdict ${row.verdict}` }, icon(ICONS[row.verdict] ?? "dash"), el("b"));
  const button = el("button", { type: "button", class: "plan-row", "data-plan": row.plan_id, tabindex: "-1" }, when, word, ...Object.values(cells));
  const node = el("li", {}, button);
  if (!row.plan_id) button.disabled = true;
  return { node, update: (each) => fill(each, when, word, cells) };
}

function fill(row, when, word, cells) {
  stamp(when, row.at, "clock");
  text(word.lastChild, verdict(row.verdict));
  text(cells.symbol, row.symbol ?? "–");
  text(cells.plan, row.plan_id ?? "–");
  attr(cells.plan, "title", row.plan_id ?? null);
  code(cells.action, row.action ?? "–");
  code(cells.reason, row.reason);
  text(cells.qty, row.qty === null ? "" : number(row.qty));
  text(cells.notional, row.notional === null ? "" : usd(row.notional));
  text(cells.latency, milliseconds(row.latency_ms));
  const { permit } = row;
  attr(cells.permit, "class", `permit ${permit?.status ?? ""}`);
  if (permit?.status !== "outstanding") return text(cells.permit, permit ? fate(permit.status) : "");
  if (!cells.permit.firstElementChild) cells.permit.replaceChildren("outstanding ", el("time"));
  stamp(cells.permit.firstElementChild, permit.expires_at, "left");
}

/** One row is in the tab order; the arrow keys move from there. */
function rove() {
  const list = byId("plans-list");
  if (!list.querySelector('button[tabindex="0"]')) list.querySelector("button:not(:disabled)")?.setAttribute("tabindex", "0");
}

function move(event) {
  const rows = [...event.currentTarget.querySelectorAll("button:not(:disabled)")];
  const at = rows.indexOf(document.activeElement);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: rows.length - 1 }[event.key];
  if (at < 0 || to === undefined || !rows[to]) return;
  event.preventDefault();
  rows[at].setAttribute("tabindex", "-1");
  rows[to].setAttribute("tabindex", "0");
  rows[to].focus();
}
