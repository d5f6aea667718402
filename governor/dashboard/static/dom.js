// Elements are built and changed here. Text from outside only ever becomes a text node.

const SVG = "http://www.w3.org/2000/svg";

/** An element; children are nodes or text, null and false are left out. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === false || value === undefined) continue;
    if (name === "class") node.className = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== false && child !== undefined));
  return node;
}

/** One of the page's icons, hidden from screen readers: a word always stands beside it. */
export function icon(name) {
  const node = document.createElementNS(SVG, "svg");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  node.setAttribute("class", "icon");
  node.setAttribute("aria-hidden", "true");
  node.append(use);
  return node;
}

export const byId = (id) => document.getElementById(id);

/** Set what differs only: what stays the same costs no layout. */
export function text(node, value) {
  const wanted = value ?? "";
  if (node.textContent !== String(wanted)) node.textContent = wanted;
}

/** The same for a code with underscores, which may be broken after each of them. */
export function code(node, value) {
  const wanted = value ?? "";
  if (node.textContent === wanted) return;
  node.replaceChildren(...wanted.split(/(?<=_)/).flatMap((part) => [part, document.createElement("wbr")]));
}

export function attr(node, name, value) {
  if (value === null || value === false) {
    if (node.hasAttribute(name)) node.removeAttribute(name);
  } else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

export function show(node, visible) {
  if (node.hidden === Boolean(visible)) node.hidden = !visible;
}

export function useIcon(use, name) {
  attr(use, "href", `#i-${name}`);
}

const PARTS = Symbol("parts");

/**
 * Make the children of `parent` the `items`, in order, keeping the nodes of those that were there.
 * `make(item)` returns {node, update(item)}; `update` is only called for an item that is another object than before.
 */
export function keyed(parent, items, keyOf, make) {
  const parts = (parent[PARTS] ??= new Map());
  const wanted = new Set(items.map(keyOf));
  for (const [key, part] of parts) {
    if (!wanted.has(key)) {
      part.node.remove();
      parts.delete(key);
    }
  }
  let at = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    let part = parts.get(key);
    if (!part) parts.set(key, (part = make(item)));
    if (part.item !== item) {
      part.item = item;
      part.update(item);
    }
    if (part.node === at) at = at.nextElementSibling;
    else parent.insertBefore(part.node, at);
  }
}
