// Puts the page together: who renders what when something changed.

import { startCharts, renderCharts, redrawCharts } from "./charts.js";
import { everySecond, heard, startClock } from "./clock.js";
import { openDisarm, renderControl, startControl } from "./control.js";
import { byId, el, text } from "./dom.js";
import { explain, followAddress } from "./explain.js";
import { renderPlans, startPlans, togglePause } from "./plans.js";
import { renderHealth, renderIncidents, renderLastDisarm, renderPermits } from "./side.js";
import { renderStale } from "./stale.js";
import { renderOutside, renderState, renderTiles } from "./state.js";
import { listen, told } from "./stream.js";
import { renderSymbols, startSymbols } from "./symbols.js";

const THEMES = { auto: "Auto", light: "Light", dark: "Dark" };

function render(snapshot, has) {
  heard(snapshot.now);
  const stale = renderStale();
  if (has("tick") || has("plans")) renderTiles(snapshot);
  if (has("tick")) {
    renderState(snapshot);
    renderControl(snapshot);
    renderSymbols(snapshot);
    renderPermits(snapshot);
    renderLastDisarm(snapshot);
    renderHealth(snapshot);
  }
  if (has("plans")) renderPlans(snapshot);
  if (has("incidents")) renderIncidents(snapshot);
  if (has("chart")) renderCharts(snapshot);
  if (has("all")) renderAbout(snapshot.about);
  renderOutside(snapshot, stale);
}

function renderAbout(about) {
  const exchange = about.exchange ? new URL(about.exchange).host : "no exchange";
  byId("where").replaceChildren(...[about.host, about.prefix, exchange].filter(Boolean).map((each) => el("span", {}, each)));
  text(byId("about"), `Governor ${about.version} · Redis ${about.redis} · ${about.apply_service} · ${about.apply_config_path}`);
}

function startTheme() {
  const root = document.documentElement;
  const chosen = () => root.dataset.theme ?? "auto";
  const tell = () => text(byId("theme-word"), THEMES[chosen()]);
  byId("theme").addEventListener("click", () => {
    const names = Object.keys(THEMES);
    const next = names[(names.indexOf(chosen()) + 1) % names.length];
    if (next === "auto") delete root.dataset.theme;
    else root.dataset.theme = next;
    try {
      localStorage.setItem("governor.theme", next);
    } catch { /* storage is off */ }
    tell();
    redrawCharts();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawCharts);
  tell();
}

const KEYS = {
  "?": () => byId("help").click(),
  "/": () => byId("plans-text").focus(),
  s: () => byId("symbols-filter").focus(),
  p: togglePause,
  u: () => byId("zone").click(),
  t: () => byId("theme").click(),
  d: openDisarm,
};

function startKeys() {
  const box = byId("keys-on");
  try {
    box.checked = localStorage.getItem("governor.keys") !== "off";
  } catch {
    box.checked = true;
  }
  box.addEventListener("change", () => {
    try {
      localStorage.setItem("governor.keys", box.checked ? "on" : "off");
    } catch { /* storage is off */ }
  });
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input, select, textarea, dialog");
    if (!box.checked || typing || event.ctrlKey || event.metaKey || event.altKey || !(event.key in KEYS)) return;
    event.preventDefault();
    KEYS[event.key]();
  });
}

function startDialogs() {
  document.addEventListener("click", (event) => {
    const { target } = event;
    const plan = target.closest("[data-plan]");
    if (plan) explain(plan.dataset.plan);
    else if (target.closest("[data-close]")) target.closest("dialog").close();
    else if (target.matches("dialog")) target.close(); // beside it: the backdrop
  });
  byId("help").addEventListener("click", () => byId("help-dialog").showModal());
  addEventListener("hashchange", followAddress);
  followAddress();
}

startClock();
startTheme();
startKeys();
startDialogs();
startSymbols();
startPlans();
startControl();
startCharts();
everySecond(() => renderOutside(told.snapshot, renderStale()));
listen(render);
