// One plan's life: what `governor explain` tells, as a dialog.

import { time } from "./clock.js";
import { byId, el, icon } from "./dom.js";
import { flat, number } from "./format.js";
import { verdict } from "./words.js";

const dialog = byId("explain-dialog");
const body = byId("explain-body");
let asked = 0;

/** Open the dialog and fill it; the address tells which plan it is, so that it can be sent to somebody. */
export async function explain(planId) {
  const mine = ++asked;
  byId("explain-title").textContent = `Plan ${planId}`;
  body.replaceChildren(el("p", { class: "empty" }, "Looking…"));
  if (!dialog.open) dialog.showModal();
  history.replaceState(null, "", `#plan=${encodeURIComponent(planId)}`);
  const found = await fetched(planId);
  if (mine === asked) body.replaceChildren(...found);
}

dialog.addEventListener("close", () => {
  asked += 1;
  history.replaceState(null, "", location.pathname);
});

export function followAddress() {
  if (!location.hash.startsWith("#plan=")) return;
  const planId = location.hash.slice(6);
  try {
    explain(decodeURIComponent(planId));
  } catch {
    explain(planId); // a sign that no id may have: nobody knows it
  }
}

async function fetched(planId) {
  try {
    const response = await fetch(`/api/plans/${encodeURIComponent(planId)}`, { headers: { Accept: "application/json" } });
    const told = await response.json();
    return response.ok ? parts(told) : [el("p", { class: "problem" }, told.error ?? `error ${response.status}`)];
  } catch (error) {
    return [el("p", { class: "problem" }, `The dashboard does not answer: ${error.message}`)];
  }
}

function parts(told) {
  return [
    el("p", { class: "answer" }, told.answer),
    ...section("Asked", told.plan && asTold(told.plan)),
    ...section("Checks", told.decision?.checks?.length ? checks(told.decision) : null),
    ...section("Decision", told.decision && decision(told)),
    ...section("Permit", told.permit && permit(told.permit)),
    ...section("Results", told.results?.length ? facts(told.results.map(resultRow)) : null),
    ...section("Followed", told.followed?.length ? events(told.followed) : null),
    ...section("Errors", told.errors?.length ? facts(told.errors.map((each) => [time(each.at, "clock"), `${each.kind}: ${each.detail}`])) : null),
    ...section("Rejected", told.rejected?.length ? facts(told.rejected.map((each) => [time(each.at, "clock"), `${each.reason} (it said: ${flat(each.fields)})`])) : null),
    ...section("Events", told.events?.length ? events(told.events) : null),
    printed(told.lines),
  ].filter(Boolean);
}

const section = (title, content) => (content ? [el("h3", {}, title), content] : []);

const facts = (rows) =>
  el("dl", { class: "facts" }, ...rows.filter(([, value]) => value !== null && value !== undefined && value !== "").map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));

function asTold(plan) {
  const fields = Object.entries(plan.fields ?? {}).filter(([, value]) => value !== "");
  return el(
    "div",
    {},
    facts([["Written", time(plan.written_at, "full")], ["Received", time(plan.received_at, "full")], ["Entry", plan.entry_id]]),
    el("details", {}, el("summary", {}, `Every field (${fields.length})`), facts(fields.map(([name, value]) => [name, String(value)]))),
  );
}

const MARKS = { true: ["check", "PASS"], false: ["cross", "FAIL"], null: ["dash", "not asked"] };

function checks({ checks: rows }) {
  const head = ["", "Gate", "Used", "Limit", "Left", "Asks", "Next allowed"];
  const cell = (value) => el("td", { class: "right" }, value === null || value === undefined ? "" : number(value));
  const line = (check) => {
    const [mark, word] = MARKS[check.ok];
    const next = el("td", {}, check.next_allowed ? time(check.next_allowed, "clock") : null, check.next_allowed && check.note ? " " : null, check.note);
    return el(
      "tr",
      { class: `ok-${check.ok}` },
      el("td", { class: "ok" }, icon(mark), word),
      el("th", { scope: "row" }, check.gate),
      ...["used", "limit", "left", "asks"].map((name) => cell(check[name])),
      next,
    );
  };
  return el(
    "div",
    { class: "scroll-x", tabindex: "0", role: "region", "aria-label": "Checks" },
    el("table", {}, el("thead", {}, el("tr", {}, ...head.map((name, n) => el(name ? "th" : "td", name ? { scope: "col", class: n > 1 && n < 6 && "right" } : {}, name)))), el("tbody", {}, ...rows.map(line))),
  );
}

function decision({ decision: made, market }) {
  return facts([
    ["Verdict", el("b", { class: `verdict ${made.verdict}` }, [verdict(made.verdict), made.reason].filter(Boolean).join(", "))],
    ["At", time(made.at, "full")],
    ["Quantity", made.computed_qty === null ? null : number(made.computed_qty)],
    ["Notional", made.computed_notional === null ? null : `${number(made.computed_notional)} USD`],
    ["Position", market?.asked ? (market.position_error ?? flat(market.legs) + (market.position_amt === null ? "" : ` (${number(market.position_amt)})`)) : "exchange not asked"],
    ["Mark price", market?.asked ? (market.price_error ?? number(market.mark_price)) : null],
    ["State", `${made.mode}, epoch ${made.epoch}`],
    ["Apply mode", made.apply_mode],
    ["Error", made.error],
  ]);
}

const permit = (told) =>
  facts([["Granted", time(told.granted_at, "full")], ["Until", time(told.expires_at, "clock")], ["Became", told.told]]);

const resultRow = (each) => [
  time(each.at, "clock"),
  `${each.executed ? `executed ${each.executed_qty === null ? "an unknown quantity" : number(each.executed_qty)}` : "not executed"} (permit ${each.permit})${each.error ? `, error: ${each.error}` : ""}`,
];

function events(rows) {
  return el("ol", { class: "events" }, ...rows.map((each) => el("li", {}, el("details", {}, el("summary", {}, el("span", { class: "muted" }, `${each.seq}`), time(each.timestamp, "clock"), el("b", {}, each.event)), el("pre", { tabindex: "0" }, JSON.stringify(each.data, null, 2))))));
}

function printed(lines) {
  if (!lines?.length) return null;
  return el("details", {}, el("summary", {}, "As governor explain prints it"), el("pre", { tabindex: "0" }, lines.join("\n")));
}
