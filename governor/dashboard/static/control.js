// Logging in, disarming, re-arming. The server decides; this only asks.

import { byId, el, show, text } from "./dom.js";
import { connect, told } from "./stream.js";

const dialogs = { login: byId("login-dialog"), disarm: byId("disarm-dialog"), rearm: byId("rearm-dialog") };

async function ask(path, body) {
  try {
    const options = body === undefined ? {} : { method: "POST", body: JSON.stringify(body) };
    const headers = { "Content-Type": "application/json", "X-Governor": "1" };
    const response = await fetch(path, { ...options, headers, signal: AbortSignal.timeout(60_000) });
    const answer = await response.json().catch(() => ({}));
    return { ok: response.ok, answer, error: response.ok ? null : answer.error ?? `The dashboard answered ${response.status}.` };
  } catch (error) {
    return { ok: false, answer: {}, error: `The dashboard does not answer: ${error.message}` };
  }
}

export function renderControl({ control, status }) {
  const inside = control.enabled && control.logged_in;
  show(byId("control"), control.enabled);
  show(byId("login"), control.enabled && !control.logged_in);
  show(byId("logout"), inside);
  show(byId("disarm"), inside);
  show(byId("rearm"), inside && (status.state === "DISARMED" || Boolean(status.halted)));
  show(byId("control-hint"), !control.enabled);
}

function problem(dialog, message) {
  const line = dialog.querySelector("form .problem:not([id])");
  show(line, Boolean(message));
  text(line, message);
}

function outcome(dialog, message) {
  const line = dialog.querySelector(".outcome");
  if (!line) return;
  show(line, Boolean(message));
  text(line, message);
}

function open(dialog) {
  problem(dialog, null);
  outcome(dialog, null);
  const form = dialog.querySelector("form");
  form.reset();
  for (const node of form.querySelectorAll(".dialog-body input, button[type=submit]")) node.disabled = false;
  text(form.querySelector(".dialog-foot [data-close]"), "Cancel");
  if (!dialog.open) dialog.showModal();
}

/** Run a form's work once at a time, its errors shown in the form. */
function onSubmit(dialog, work) {
  const form = dialog.querySelector("form");
  const button = form.querySelector("button[type=submit]");
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    button.disabled = true;
    problem(dialog, null);
    outcome(dialog, "Asked; it can take a few seconds.");
    const { ok, answer, error } = await work(Object.fromEntries(new FormData(form)));
    button.disabled = false;
    outcome(dialog, null);
    if (!ok) problem(dialog, error);
    else finished(dialog, answer);
  });
}

/** What was done stays to be read; a login needs no words. */
function finished(dialog, answer) {
  if (dialog === dialogs.login) {
    dialog.close();
    if (answer.control) apply(answer.control);
    connect();
    return;
  }
  if (answer.code) problem(dialog, answer.message);
  else outcome(dialog, answer.message);
  for (const node of dialog.querySelectorAll(".dialog-body input, button[type=submit]")) node.disabled = true;
  const close = dialog.querySelector(".dialog-foot [data-close]");
  text(close, "Close");
  close.focus();
}

function apply(control) {
  if (told.snapshot === null) return;
  told.snapshot.control = control;
  renderControl(told.snapshot);
}

export function openDisarm() {
  if (byId("disarm").hidden) return;
  open(dialogs.disarm);
  const reason = byId("disarm-reason");
  // Two presses have to be enough; whoever types replaces it.
  reason.value = "disarmed on the dashboard";
  reason.focus();
  reason.select();
}

async function openRearm() {
  open(dialogs.rearm);
  const { ok, answer, error } = await ask("/api/rearm");
  const refused = ok ? (answer.allowed ? null : answer.refusal) : error;
  show(byId("rearm-refusal"), Boolean(refused));
  text(byId("rearm-refusal"), refused);
  show(byId("rearm-ask"), ok && answer.allowed);
  show(byId("rearm-go"), ok && answer.allowed);
  byId("rearm-says").replaceChildren(...(answer.says ?? []).map((each) => el("li", {}, each)));
  text(byId("rearm-word"), answer.type ?? "");
  byId("rearm-reason").focus();
}

export function startControl() {
  byId("login").addEventListener("click", () => {
    open(dialogs.login);
    byId("login-token").focus();
  });
  byId("logout").addEventListener("click", async () => {
    const { ok } = await ask("/api/logout", {});
    if (ok) apply({ enabled: true, logged_in: false });
    connect();
  });
  byId("disarm").addEventListener("click", openDisarm);
  byId("rearm").addEventListener("click", openRearm);
  onSubmit(dialogs.login, ({ token }) => ask("/api/login", { token }));
  onSubmit(dialogs.disarm, ({ reason }) => ask("/api/disarm", { reason }));
  onSubmit(dialogs.rearm, ({ reason, typed }) => ask("/api/rearm", { reason, typed }));
  dialogs.login.addEventListener("close", () => dialogs.login.querySelector("form").reset());
}
