/** Helpers for the document. Text is only set as text, and an equal value is not set again. */

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Set an attribute; null removes it. */
export function setAttribute(element, name, value) {
  if (value == null) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) setAttribute(element, key, value);
  element.append(...children);
  return element;
}

export function makeSvg(name, attributes = {}, text = "") {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) setAttribute(element, key, value);
  if (text) element.textContent = text;
  return element;
}

/** Give `parent` one child for each item. Existing children are kept and changed, so that nothing flickers. */
export function keep(parent, items, create, change) {
  while (parent.children.length > items.length) parent.lastElementChild.remove();
  items.forEach((item, index) => change(parent.children[index] ?? parent.appendChild(create()), item));
}

/**
 * Fill a table's body. A cell is a text, or an object of `text`, `aside` (small text below) and `status` (a coloured
 * key before it). Cells take their class from the table's head.
 */
export function fillTable(table, rows) {
  const heads = [...table.tHead.rows[0].cells];
  const roles = table.hasAttribute("role");
  keep(table.tBodies[0], rows, () => makeRow(heads, roles), (row, cells) => {
    cells.forEach((cell, index) => fillCell(row.cells[index], typeof cell === "string" ? { text: cell } : cell));
  });
}

function makeRow(heads, roles) {
  const cells = heads.map((head) => make("td", { class: head.className || null, role: roles ? "cell" : null }));
  return make("tr", { role: roles ? "row" : null }, ...cells);
}

function fillCell(element, { text, aside = "", status = null }) {
  if (!aside && !status && !element.firstElementChild) return setText(element, text);
  if (!element.firstElementChild) element.replaceChildren(make("i"), make("span"), make("small"));
  const [key, words, quiet] = element.children;
  setAttribute(key, "class", status && `key ${status}`);
  setText(words, text);
  setText(quiet, aside);
}

/** Fill a list of terms: `{label: [value, note]}`. */
export function fillFacts(list, facts) {
  keep(list, Object.entries(facts), () => make("div", {}, make("dt"), make("dd")), (item, [label, value]) => {
    setText(item.children[0], label);
    setText(item.children[1], value);
  });
}

/** Show a share from 0 to 1. */
export function setMeter(meter, share, words) {
  const part = Math.min(1, Math.max(0, share || 0));
  meter.firstElementChild.style.width = part > 0 ? `max(3px, ${(100 * part).toFixed(2)}%)` : "0";
  setAttribute(meter, "data-full", part >= 0.8 ? "" : null);
  setAttribute(meter, "aria-valuenow", Math.round(100 * part));
  setAttribute(meter, "aria-valuetext", words);
}
