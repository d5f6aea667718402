// The same words as `governor status`, `events` and `explain`.

export const VERDICTS = { EXECUTE: "PERMITTED", BLOCK: "BLOCKED", SKIP: "SKIPPED", REJECTED: "REJECTED" };

export const verdict = (code) => VERDICTS[code] ?? code;

export const FATES = {
  outstanding: "outstanding",
  consumed: "consumed",
  expired: "taken back unused",
  revoked: "revoked",
};

export const fate = (status) => FATES[status] ?? status;

/** What a reason means, for those that stop everything. */
const MEANINGS = {
  burst_limit_breach: "More executions within five minutes than allowed.",
  repeated_errors: "Too many errors within the error window.",
  unpermitted_execution: "Something traded around the gate.",
  hourly_limit_exceeded: "The hour window is full.",
  burst_limit_exceeded: "The five-minute window is full.",
  daily_limit_exceeded: "The daily limit is reached.",
  total_daily_limit_exceeded: "The daily limit over all symbols is reached.",
  half_of_error_limit: "Half of the errors that disarm are reached.",
};

export const meaning = (reason) => MEANINGS[reason] ?? "";
