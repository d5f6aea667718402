// One limit: used against it, as text and as a bar.

import { attr, el, text } from "./dom.js";
import { limitText, number } from "./format.js";

/** How much of a limit is used: 0 to 1 and over; 0 where it is off. */
export const share = ({ used, limit }) => (limit === null ? 0 : limit > 0 ? used / limit : 1);

export const level = (portion) => (portion >= 1 ? "full" : portion >= 0.8 ? "near" : "free");

/** A limit's text and bar; `update(amount)` with {used, limit}. */
export function bar(label, format = number) {
  const fill = el("i");
  const used = el("b");
  const limit = el("span", { class: "limit" });
  const node = el(
    "span",
    { class: "bar" },
    el("span", { class: "bar-label" }, label),
    el("span", { class: "bar-text" }, used, limit),
    el("span", { class: "track", "aria-hidden": "true" }, fill),
  );
  return {
    node,
    update(amount) {
      const portion = share(amount);
      text(used, format(amount.used));
      text(limit, ` / ${limitText(amount.limit)}`);
      attr(node, "data-level", amount.limit === null ? "off" : level(portion));
      const width = `${Math.min(100, portion * 100).toFixed(1)}%`;
      if (fill.style.width !== width) fill.style.width = width;
    },
  };
}
