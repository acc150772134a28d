// Elements without markup: what servers and devices say becomes text, never HTML.

/** The element with this id. */
export const $ = (id) => document.getElementById(id);

/** An element with attributes (null leaves one out) and children (elements, or text of anything else). */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null) made.setAttribute(name, value);
  }
  made.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return made;
}

/** Set text where it differs: a live region then speaks of changes alone. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A bar that shows a share from 0 to 1. The figure beside it says the same in words. */
export function track(share) {
  const bar = el("span");
  bar.style.setProperty("--share", `${(100 * share).toFixed(2)}%`);
  return el("span", { class: "track", "aria-hidden": "true" }, bar);
}

/** Replace the rows of a table's body; one line across it where there are none. */
export function fill(table, rows, none) {
  const columns = table.tHead.rows[0].cells.length;
  const empty = () => el("tr", {}, el("td", { class: "empty", colspan: columns }, none));
  table.tBodies[0].replaceChildren(...(rows.length ? rows : [empty()]));
}
