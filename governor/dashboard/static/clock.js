// Times: the server's clock, UTC or local, and what counts up or down once a second.

import { about, span } from "./format.js";
import { attr, byId, text } from "./dom.js";

const ZONE = "governor.zone";
let offset = 0;
let local = false;

try {
  local = localStorage.getItem(ZONE) === "local";
} catch { /* storage is off */ }

/** The server's time in unix seconds, going on by itself between messages. */
export const now = () => Date.now() / 1000 + offset;

/** Whether a moment counts as come: our clock may be a quarter of a second behind the server's, see below. */
export const due = (at) => at <= now() + 0.5;

export function heard(serverNow) {
  const found = serverNow - Date.now() / 1000;
  // A message that took long says less than the clock did: only a real difference is followed.
  if (Math.abs(found - offset) > 0.25) offset = found;
}

const options = { hour12: false, hourCycle: "h23" };
const zone = () => (local ? undefined : "UTC");
const two = { hour: "2-digit", minute: "2-digit" };
const cached = new Map();

function formatter(name, wanted) {
  const key = `${name}|${local}`;
  if (!cached.has(key)) cached.set(key, new Intl.DateTimeFormat("en-GB", { ...options, ...wanted, timeZone: zone() }));
  return cached.get(key);
}

const zoneName = () => (local ? "local time" : "UTC");
export const clockText = (at) => formatter("clock", { ...two, second: "2-digit" }).format(at * 1000);
export const minuteText = (at) => formatter("minute", two).format(at * 1000);
const dayText = (at) => formatter("day", { year: "numeric", month: "2-digit", day: "2-digit" }).format(at * 1000).split("/").reverse().join("-");
export const fullText = (at) => `${dayText(at)} ${clockText(at)} ${zoneName()}`;

/** The time of day, with the date in front when it is not today's. */
const shortText = (at) => (dayText(at) === dayText(now()) ? clockText(at) : `${dayText(at).slice(5)} ${clockText(at)}`);

const KINDS = {
  clock: shortText,
  full: fullText,
  ago: (at) => `${about(now() - at)} ago`,
  span: (at) => about(now() - at),
  left: (at) => (at > now() ? span(Math.ceil(at - now())) : "0 s"),
  in: (at) => (!due(at) ? `in ${span(Math.ceil(at - now()))}` : "now"),
};

function render(node) {
  const at = Number(node.dataset.at);
  text(node, KINDS[node.dataset.kind](at));
  attr(node, "title", fullText(at));
}

/** Make `node` (a <time>) show a moment; kinds: clock, full, ago, span, left, in. */
export function stamp(node, at, kind) {
  if (node.dataset.at === String(at) && node.dataset.kind === kind) return node;
  node.dataset.at = at;
  node.dataset.kind = kind;
  node.dateTime = new Date(at * 1000).toISOString();
  render(node);
  return node;
}

export const time = (at, kind) => stamp(document.createElement("time"), at, kind);

const tickers = [];
export const everySecond = (work) => tickers.push(work);

function tick(all) {
  const kinds = all ? "" : ":is([data-kind=ago],[data-kind=span],[data-kind=left],[data-kind=in])";
  for (const node of document.querySelectorAll(`time[data-at]${kinds}`)) render(node);
}

export function startClock() {
  const word = byId("zone-word");
  const tell = () => {
    text(word, local ? "Local" : "UTC");
    tick(true);
    document.dispatchEvent(new Event("zone"));
  };
  byId("zone").addEventListener("click", () => {
    local = !local;
    try {
      localStorage.setItem(ZONE, local ? "local" : "utc");
    } catch { /* storage is off */ }
    tell();
  });
  tell();
  setInterval(() => {
    tick(false);
    tickers.forEach((work) => work());
  }, 1000);
}
