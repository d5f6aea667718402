// The state: word, icon, colour, since when, why; what else a person has to know at once; the figures of the day.

import { bar } from "./bar.js";
import { stamp, time } from "./clock.js";
import { attr, byId, el, icon, keyed, show, text, useIcon } from "./dom.js";
import { flat, milliseconds, number, usd } from "./format.js";
import { meaning } from "./words.js";

const ICONS = { ARMED: "armed", THROTTLED: "throttled", DISARMED: "disarmed" };

export function renderState(snapshot) {
  const { status } = snapshot;
  const word = status.state ?? "NO EVENTS YET";
  const known = status.state in ICONS ? status.state : "UNKNOWN";
  attr(document.body, "data-state", known);
  text(byId("state-word"), word);
  useIcon(byId("state-icon"), known);
  renderSince(status);
  text(byId("state-why"), why(snapshot));
  renderProof(snapshot);
  keyed(byId("notices"), notices(status), (notice) => notice.key, makeNotice);
  show(byId("chip"), true);
  text(byId("chip-word"), word);
  useIcon(byId("chip").querySelector("use"), known);
}

function renderSince({ state, since }) {
  const line = byId("state-since");
  if (!state || !since) return text(line, "");
  if (!line.firstElementChild) line.replaceChildren("for ", el("time"), " · since ", el("time"));
  const [span, full] = line.querySelectorAll("time");
  stamp(span, since, "span");
  stamp(full, since, "full");
}

function why({ status }) {
  const { disarm } = status;
  if (status.state === "DISARMED" && disarm) {
    const context = flat(disarm.context);
    if (disarm.manual) return `By hand, by ${disarm.operator ?? "somebody"}: ${disarm.reason}`;
    return [`${disarm.reason}.`, meaning(disarm.reason), context && `(${context})`].filter(Boolean).join(" ");
  }
  if (status.state === "THROTTLED") return "Fewer permits where the cause lies. A full close never waits.";
  if (status.state === "ARMED") return `${permitting(status)}${status.reason ? ` Armed again: ${status.reason}` : ""}`;
  return "There are no events at all: no governor ever ran on this stream.";
}

function permitting({ halted, hold_until: hold }) {
  if (halted !== null && halted !== undefined) return "No plan is permitted: the emergency brake is set.";
  return hold ? "No plan is permitted until the hold is over." : "Plans within the limits are permitted.";
}

function renderProof({ status, last_disarm: last }) {
  const box = byId("proof");
  const { disarm } = status;
  show(box, status.state === "DISARMED" && Boolean(disarm));
  if (status.state !== "DISARMED" || !disarm) return;
  attr(box, "data-done", String(disarm.done));
  useIcon(byId("proof-icon"), disarm.done ? "check" : "warning");
  text(byId("proof-head"), disarm.done ? "PROVEN: the Apply Layer is in dry run." : "NOT YET PROVEN: the Apply Layer may still trade.");
  text(byId("proof-text"), disarm.done ? proven(last, status) : unproven(disarm));
}

function unproven(disarm) {
  if (!disarm.attempts) return "It is being forced to dry run now. Every permit is revoked.";
  return `Attempt ${disarm.attempts} did not work: ${disarm.error ?? "no reason is known"}. It is tried again.`;
}

function proven(last, status) {
  const proof = last !== null && last.epoch === status.epoch ? last.proof ?? {} : {};
  return [
    proof.apply_mode && `The file says APPLY_MODE=${proof.apply_mode}`,
    proof.service && `${proof.service} was restarted${proof.active_state ? ` and is ${proof.active_state}` : ""}`,
    proof.environ_mode && `its process runs with ${proof.environ_mode}`,
    `epoch ${status.epoch}`,
  ].filter(Boolean).join("; ").concat(".");
}

/** What has to be known beside the state: {key, level, words, until}. */
function notices(status) {
  const found = [];
  if (status.halted !== null && status.halted !== undefined) {
    found.push({ level: "alarm", words: `The emergency brake is set, no permits: ${brake(status.halted)}` });
  }
  if (status.drift) {
    found.push({ level: "alarm", words: `Drift: while DISARMED, the Apply Layer's file says APPLY_MODE=${flat(status.drift)}.` });
  }
  if (status.throttle) {
    for (const { symbol, reason } of status.throttle.causes) {
      found.push({ level: "warning", words: `Throttled: ${symbol ?? "all symbols"}, ${reason}, until `, until: status.throttle.until });
    }
  }
  if (status.hold_until) found.push({ level: "warning", words: "History hold: no permits until ", until: status.hold_until });
  if (status.state === "DISARMED") {
    for (const note of status.disarm?.notes ?? []) found.push({ level: "warning", words: note });
  }
  return found.map((notice) => ({ ...notice, key: `${notice.level} ${notice.words}` }));
}

/** What a person set it to; `governor disarm` sets it to a record. */
function brake(halted) {
  try {
    const { reason, operator } = JSON.parse(halted);
    return reason ? `${reason} (by ${operator ?? "somebody"})` : halted;
  } catch {
    return halted || "(empty)";
  }
}

function makeNotice({ level, words, until }) {
  const left = el("time");
  const node = el("li", { class: `notice ${level}` }, icon("warning"), el("span", {}, words));
  if (until) node.lastChild.append(time(until, "clock"), " (", left, ")");
  return { node, update: ({ until: at }) => at && stamp(left, at, "left") && stamp(node.querySelector("time"), at, "clock") };
}

const TILES = [
  ["Plans", planCounts],
  ["Notional today, USD", limitTile((status) => status.total_daily_notional, usd)],
  ["Errors", limitTile((status) => status.errors, number)],
  ["Latency, plan to verdict", latency],
];

function tile(label, body) {
  return el("div", { class: "tile" }, el("dt", {}, label), body);
}

function planCounts(label) {
  const total = el("b", { class: "figure" });
  const parts = ["allowed", "blocked", "skipped", "rejected"].map((name) => [name, el("b")]);
  const rest = el("span", { class: "parts" }, ...parts.map(([name, value]) => el("span", { class: name }, value, ` ${name}`)));
  return [tile(label, el("dd", {}, total, rest)), ({ status: { counts } }) => {
    if (!counts) return;
    text(total, number(counts.plans));
    for (const [name, value] of parts) text(value, number(counts[name]));
  }];
}

function limitTile(pick, format) {
  return (label) => {
    const one = bar("", format);
    return [tile(label, el("dd", {}, one.node)), ({ status }) => pick(status) && one.update(pick(status))];
  };
}

function latency(label) {
  const middle = el("b", { class: "figure" });
  const rest = el("span", { class: "parts" });
  return [tile(label, el("dd", {}, middle, rest)), ({ plans }) => {
    const found = plans.slice(0, 100).map((row) => row.latency_ms).filter((each) => each !== null).sort((a, b) => a - b);
    text(middle, found.length ? milliseconds(found[Math.floor(found.length / 2)]) : "–");
    text(rest, found.length ? `median of the last ${found.length}, at most ${milliseconds(found.at(-1))}` : "no plan yet");
  }];
}

let tiles = null;

export function renderTiles(snapshot) {
  if (tiles === null) {
    tiles = TILES.map(([label, make]) => make(label));
    byId("tiles").replaceChildren(...tiles.map(([node]) => node));
  }
  for (const [, update] of tiles) update(snapshot);
}

let said = null;

/** Title, favicon, and what a screen reader is told when the state changes. */
export function renderOutside(snapshot, stale) {
  const state = snapshot?.status.state ?? null;
  const name = stale ? "STALE" : state ?? "…";
  const mark = { ARMED: "●", THROTTLED: "◐", DISARMED: "■" }[name] ?? "⚠";
  const title = `${mark} ${name}${stale && state ? ` (${state})` : ""} · ${snapshot?.about.page_title ?? "Governor"}`;
  if (document.title !== title) document.title = title;
  attr(byId("favicon"), "href", `/static/icon-${(!stale && ICONS[state]) || "unknown"}.svg`);
  announce(state, stale, snapshot);
}

function announce(state, stale, snapshot) {
  const done = snapshot?.status.disarm?.done ?? null;
  const now = `${state} ${stale} ${state === "DISARMED" ? done : ""}`;
  if (now === said) return;
  const first = said === null;
  said = now;
  if (stale) return text(byId("shout"), `${byId("banner-head").textContent} ${byId("banner-text").textContent}`);
  if (state === "DISARMED") {
    text(byId("say"), "");
    return text(byId("shout"), `DISARMED. ${byId("state-why").textContent} ${byId("proof-head").textContent}`);
  }
  text(byId("shout"), "");
  if (state) text(byId("say"), `${first ? "" : "Now "}${state}. ${byId("state-why").textContent}`);
}
