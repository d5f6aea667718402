// Numbers and spans as text, in the words of the command line.

const plain = new Intl.NumberFormat("en-US", { maximumFractionDigits: 8 });
const money = new Intl.NumberFormat("en-US", { minimumFractionDigits: 2, maximumFractionDigits: 2 });
const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });

export const number = (value) => (value === null || value === undefined ? "–" : plain.format(value));

/** USD: cents below ten thousand, whole dollars above. */
export const usd = (value) =>
  value === null || value === undefined ? "–" : Math.abs(value) >= 1e4 ? whole.format(value) : money.format(value);

export const limitText = (limit, format = number) => (limit === null || limit === undefined ? "off" : format(limit));

/** A duration, as exact as a reader needs it. */
export function span(seconds) {
  const rest = Math.max(0, Math.round(seconds));
  if (rest < 60) return `${rest} s`;
  const minutes = Math.floor(rest / 60);
  if (minutes < 60) return rest % 60 ? `${minutes} min ${rest % 60} s` : `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return minutes % 60 ? `${hours} h ${minutes % 60} min` : `${hours} h`;
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

/** The same, coarser: for what lies back. */
export function about(seconds) {
  const rest = Math.max(0, Math.round(seconds));
  if (rest < 60) return `${rest} s`;
  if (rest < 3600) return `${Math.floor(rest / 60)} min`;
  return span(rest);
}

export function milliseconds(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 10_000) return `${(value / 1000).toFixed(0)} s`;
  if (value >= 1000) return `${(value / 1000).toFixed(1)} s`;
  return value >= 10 ? `${value.toFixed(0)} ms` : `${value.toFixed(1)} ms`;
}

export function bytes(value) {
  if (value === null || value === undefined) return "–";
  const units = ["B", "kB", "MB", "GB"];
  let unit = 0;
  let rest = value;
  while (rest >= 1000 && unit < units.length - 1) {
    rest /= 1000;
    unit += 1;
  }
  return `${rest >= 10 || unit === 0 ? rest.toFixed(0) : rest.toFixed(1)} ${units[unit]}`;
}

/** Any JSON value on one line. */
export function flat(value) {
  if (value === null || value === undefined) return "–";
  if (Array.isArray(value)) return value.map(flat).join(", ");
  if (typeof value === "object") return Object.entries(value).map(([name, each]) => `${name} ${flat(each)}`).join(", ");
  return String(value);
}
