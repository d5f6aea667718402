// Server-sent events into one document, handed on at most four times a second.

const EVERY_MS = 250;
const SILENT_MS = 5000;
export const PLANS_KEPT = 500;
const INCIDENTS_KEPT = 200;

/** The document as the server last told it, and when anything was last heard (milliseconds, this machine's clock). */
export const told = { snapshot: null, heardAt: null, openedAt: Date.now() };

let source = null;
let render = () => {};
let changed = new Set();
let timer = null;
let lastRender = 0;

export function listen(work) {
  render = work;
  connect();
  setInterval(watch, 1000);
}

/** A new stream, for one that went silent, or after logging in: cookies are looked at when it opens. */
export function connect() {
  source?.close();
  told.openedAt = Date.now();
  source = new EventSource("/api/stream");
  source.addEventListener("snapshot", on((data) => {
    told.snapshot = data;
    changed = new Set(["all"]);
  }));
  source.addEventListener("tick", on((data) => {
    Object.assign(told.snapshot, data);
    changed.add("tick");
  }));
  source.addEventListener("plans", on(({ rows }) => {
    told.snapshot.plans = merged(told.snapshot.plans, rows, PLANS_KEPT);
    changed.add("plans");
  }));
  source.addEventListener("incidents", on(({ rows }) => {
    told.snapshot.incidents = merged(told.snapshot.incidents, rows, INCIDENTS_KEPT);
    changed.add("incidents");
  }));
  source.addEventListener("chart", on(({ chart }) => {
    told.snapshot.chart = chart;
    changed.add("chart");
  }));
}

function on(work) {
  return (message) => {
    const data = JSON.parse(message.data);
    // What comes before the first snapshot has nothing to change.
    if (message.type !== "snapshot" && told.snapshot === null) return;
    told.heardAt = Date.now();
    work(data);
    schedule();
  };
}

/** Rows newest first, a row that came again in place of the old one. */
export function merged(rows, news, most) {
  const bySeq = new Map(rows.map((row) => [row.seq, row]));
  for (const row of news) bySeq.set(row.seq, row);
  return [...bySeq.values()].sort((a, b) => b.seq - a.seq).slice(0, most);
}

function schedule() {
  if (timer !== null) return;
  const wait = Math.max(0, lastRender + EVERY_MS - Date.now());
  timer = setTimeout(() => {
    // A hidden page gets no frames; it must not collect work either.
    if (document.hidden) flush();
    else requestAnimationFrame(flush);
  }, wait);
}

function flush() {
  timer = null;
  lastRender = Date.now();
  const what = changed;
  changed = new Set();
  render(told.snapshot, (name) => what.has("all") || what.has(name));
}

/** The browser reconnects by itself after an error, but not when a connection just hangs, or was refused. */
function watch() {
  const since = Math.max(told.heardAt ?? 0, told.openedAt);
  if (Date.now() - since > SILENT_MS || (source.readyState === EventSource.CLOSED && Date.now() - told.openedAt > 1000)) connect();
}
