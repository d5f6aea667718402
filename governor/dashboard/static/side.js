// Beside the plans: outstanding permits, the last disarm with its proof, incidents, health.

import { bar } from "./bar.js";
import { clockText, stamp, time } from "./clock.js";
import { attr, byId, el, icon, keyed, show, text } from "./dom.js";
import { about, bytes, flat, milliseconds, number, usd } from "./format.js";

const CLOCK_OFF_S = 2;

export function renderPermits({ status }) {
  const permits = [...status.permits].sort((a, b) => a.expires_at - b.expires_at);
  text(byId("permits-count"), permits.length);
  show(byId("permits-empty"), permits.length === 0);
  keyed(byId("permits-list"), permits, (permit) => permit.plan_id, makePermit);
}

function makePermit({ plan_id: plan }) {
  const symbol = el("b");
  const amount = el("span", { class: "muted" });
  const left = el("time", { class: "left" });
  const link = el("button", { type: "button", class: "link", "data-plan": plan }, plan);
  const node = el("li", { class: "permit-row" }, el("span", {}, symbol, " ", amount), left, link);
  const update = (permit) => {
    text(symbol, permit.symbol);
    text(amount, `${number(permit.qty)} · ${permit.notional === null ? "no price" : `${usd(permit.notional)} USD`}`);
    stamp(left, permit.expires_at, "left");
  };
  return { node, update };
}

export function renderIncidents({ incidents }) {
  text(byId("incidents-count"), incidents.length || "");
  show(byId("incidents-empty"), incidents.length === 0);
  show(byId("incidents-list"), incidents.length > 0);
  keyed(byId("incidents-list"), incidents.slice(0, 100), (row) => row.seq, makeIncident);
}

const LEVELS = { info: "info", warning: "warning", alarm: "warning" };

function makeIncident(row) {
  const node = el(
    "li",
    { class: `incident ${row.level in LEVELS ? row.level : "info"}` },
    icon(LEVELS[row.level] ?? "info"),
    el("div", {}, el("b", {}, row.event), time(row.at, "clock"), el("p", {}, row.told)),
  );
  return { node, update: () => {} };
}

let shown = "";

export function renderLastDisarm({ last_disarm: last }) {
  const key = JSON.stringify(last);
  if (key === shown) return;
  shown = key;
  byId("disarm-body").replaceChildren(...(last === null ? [el("p", { class: "empty" }, "It never was disarmed.")] : disarmParts(last)));
}

function disarmParts(last) {
  const done = last.done_at !== null && last.done_at !== undefined;
  const proof = last.proof ?? {};
  const head = done ? "Proven: the Apply Layer was in dry run" : "Not proven: the Apply Layer may still trade";
  const rows = [
    ["Reason", last.manual ? `${last.reason} (by hand, ${last.operator ?? "somebody"})` : last.reason],
    ["Context", last.context && Object.keys(last.context).length && !last.manual ? flat(last.context) : null],
    ["Started", time(last.at, "full")],
    ["Done", done ? el("span", {}, time(last.done_at, "clock"), ` (${milliseconds((last.done_at - last.at) * 1000)} later)`) : `not yet, attempt ${last.attempts}`],
    ["Error", done ? null : last.error],
    ["Action", last.action_taken],
    ["File", proof.apply_mode ? `APPLY_MODE=${proof.apply_mode}, read back` : null],
    ["Service", proof.service ? [proof.service, proof.active_state].filter(Boolean).join(", ") : null],
    ["Invocation", proof.invocation_after ? `${short(proof.invocation_before)} → ${short(proof.invocation_after)}` : null],
    ["Process", proof.environ_mode ? `runs with ${proof.environ_mode} (pid ${proof.main_pid})` : null],
    ["Backup", proof.backup],
    ["Notes", [...(last.notes ?? []), ...(proof.notes ?? [])].join("; ") || null],
    ["Epoch", last.epoch],
    ["Re-armed", last.rearmed ? el("span", {}, time(last.rearmed.at, "full"), ` by ${last.rearmed.operator}: ${last.rearmed.reason}`) : "not yet"],
  ];
  return [
    el("p", { class: `verified ${done}` }, icon(done ? "check" : "warning"), head),
    el("dl", { class: "facts" }, ...rows.filter(([, value]) => value !== null && value !== undefined).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
  ];
}

const short = (invocation) => {
  const tail = (invocation ?? "").replace(/^0+(?=.)/, "");
  return tail ? tail.slice(0, 8) : "unknown";
};

const HEALTH = ["Events", "Daemon", "Redis", "Exchange", "Journal"];

export function renderHealth(snapshot) {
  const found = { Events: eventsHealth(snapshot), ...health(snapshot.health) };
  const rows = HEALTH.map((name) => ({ name, ...found[name] }));
  keyed(byId("health-list"), rows, (row) => row.name, makeHealth);
}

const verdicts = { true: "OK", false: "NOT OK", null: "UNKNOWN" };
const icons = { true: "check", false: "cross", null: "dash" };

function makeHealth({ name }) {
  const state = el("span", { class: "health-word" });
  const words = el("p");
  const since = el("time");
  const weight = bar("Weight used this minute");
  const node = el("li", { class: "health-row" }, el("b", {}, name), state, words, since, weight.node);
  let ok;
  const update = (row) => {
    if (ok !== row.ok) {
      ok = row.ok;
      state.replaceChildren(icon(icons[ok]), verdicts[ok]);
      attr(node, "data-ok", String(ok));
    }
    text(words, row.words.filter(Boolean).join(" · "));
    show(since, Boolean(row.at));
    if (row.at) stamp(since, row.at, "ago");
    show(weight.node, Boolean(row.weight));
    if (row.weight) weight.update(row.weight);
  };
  return { node, update };
}

function eventsHealth({ health: { events }, status }) {
  const words = [events.error, status.seq ? `the last one is event ${number(status.seq)}` : "there are none yet"];
  if (events.began_again) words.push(`read again from the stream at ${clockText(events.began_again.at)}: ${events.began_again.why}`);
  return { ok: events.reachable && !events.error, words, at: events.last_event_at };
}

/** What there is to say of a clock that is not Redis': the seconds shown are off by as much. */
function clockOff({ clock_ahead_s: ahead }) {
  if (ahead === null || Math.abs(ahead) < CLOCK_OFF_S) return null;
  return `the dashboard's clock is ${about(Math.abs(ahead))} ${ahead > 0 ? "ahead of" : "behind"} its clock: times, windows and seconds here are off by as much`;
}

function health({ daemon, redis, exchange, journal }) {
  const ready = daemon.ready === null ? null : daemon.ready ? "ready" : "not ready";
  const asked = exchange.weight_used !== null && exchange.weight_limit !== null;
  return {
    Daemon: {
      ok: daemon.asked_at === null ? null : daemon.answers && daemon.ready !== false,
      words: [daemon.answers ? ready : daemon.error ?? "does not answer", ...daemon.problems, ...daemon.notes],
    },
    Redis: {
      ok: redis.latency_ms === null ? null : redis.durable !== "bad" && !clockOff(redis),
      words: [clockOff(redis), redis.latency_ms !== null && `answers in ${milliseconds(redis.latency_ms)}`, redis.memory_bytes !== null && bytes(redis.memory_bytes), redis.durable && `durability ${redis.durable}`],
    },
    Exchange: {
      ok: exchange.configured ? (exchange.errors_1h === null ? null : exchange.errors_1h === 0) : null,
      words: exchange.configured
        ? [exchange.latency_ms !== null && `answers in ${milliseconds(exchange.latency_ms)}`, exchange.errors_1h !== null && `${number(exchange.errors_1h)} errors in 1 h`]
        : ["no credentials: it is not asked"],
      weight: asked ? { used: exchange.weight_used, limit: exchange.weight_limit } : null,
    },
    Journal: { ok: journal.ok, words: [journal.note] },
  };
}
