// Says when what is shown may not be true any more.

import { byId, show, text } from "./dom.js";
import { about } from "./format.js";
import { now } from "./clock.js";
import { told } from "./stream.js";

const SILENCE_MS = 3000;

/** Why what is shown is stale: {head, text}, or null. */
export function staleness() {
  const silent = Date.now() - (told.heardAt ?? told.openedAt);
  if (told.snapshot === null) {
    return silent > SILENCE_MS ? { head: "NO CONNECTION.", text: "The dashboard does not answer. Nothing is known about the state." } : null;
  }
  if (silent > SILENCE_MS) {
    return { head: "NO CONNECTION.", text: `No message from the dashboard for ${about(silent / 1000)}. What you see is that old.` };
  }
  const { events, daemon } = told.snapshot.health;
  if (!events.reachable) {
    const old = events.read_at === null ? "was never read" : `is ${about(now() - events.read_at)} old`;
    return { head: "STALE: Redis is not reachable.", text: `What you see ${old}. ${events.error ?? ""}` };
  }
  if (events.error) {
    return { head: "NOT UP TO DATE.", text: events.error };
  }
  if (daemon.asked_at !== null && !daemon.answers) {
    return { head: "THE DAEMON DOES NOT ANSWER.", text: `No plan is decided and no permit is granted. ${daemon.error ?? ""}` };
  }
  if (daemon.ready === false) {
    return { head: "THE DAEMON IS NOT READY.", text: daemon.problems.join("; ") };
  }
  return null;
}

/** Show or hide the banner; returns whether it is shown. */
export function renderStale() {
  const found = staleness();
  show(byId("banner"), found !== null);
  document.body.classList.toggle("stale", found !== null);
  if (found !== null) {
    text(byId("banner-head"), found.head);
    text(byId("banner-text"), found.text);
  }
  return found !== null;
}
