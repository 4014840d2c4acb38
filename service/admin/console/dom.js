// Elements, and numbers in words. Text enters the page as text, never as HTML.

const SVG = "http://www.w3.org/2000/svg";

export const by = (id) => document.getElementById(id);

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat(3).filter((child) => child !== null && child !== undefined));
  return element;
}

export const h = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
export const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);

// Changes only what changed: a screen reader is told nothing twice, and a selection is not lost.
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// A table that on a narrow screen becomes one block for each row, which is why every part says its role and its head.
// heads: texts or {text, number}.  rows: {cells, ...attributes}, or lists of cells; a cell is a text or nodes.
// Where it is wider than its place, the keyboard can reach it to scroll it.
export class Table {
  constructor(caption, heads, name) {
    this.heads = heads.map((head) => ({ text: head.text ?? head, number: head.number === true }));
    this.body = h("tbody", { role: "rowgroup" });
    const top = h("tr", { role: "row" }, this.heads.map(({ text, number }) =>
      h("th", { scope: "col", role: "columnheader", class: number ? "number" : null }, text)));
    this.element = h("div", { class: "scroll", "aria-label": caption },
      h("table", { class: name, role: "table", "aria-label": caption }, h("thead", { role: "rowgroup" }, top), this.body));
    new ResizeObserver(() => reachable(this.element)).observe(this.element);
  }

  row(given) {
    const { cells, ...attributes } = Array.isArray(given) ? { cells: given } : given;
    return h("tr", { role: "row", ...attributes }, cells.map((content, index) => {
      const { text, number } = this.heads[index];
      return h("td", { role: "cell", class: number ? "number" : null, "data-head": text }, content);
    }));
  }
}

function reachable(element) {
  const scrolls = element.scrollWidth > element.clientWidth;
  element.setAttribute("role", scrolls ? "region" : "presentation");
  element.toggleAttribute("tabindex", scrolls);
  if (scrolls) element.tabIndex = 0;
}

export function table(caption, heads, rows, name) {
  const made = new Table(caption, heads, name);
  made.body.append(...rows.map((row) => made.row(row)));
  return made.element;
}

const wholes = new Intl.NumberFormat("en-GB");

export const whole = (value) => wholes.format(Math.round(value));
export const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;
export const short = (digest) => digest.slice(0, 12);
export const clock = (time) => new Date(time).toLocaleTimeString("en-GB");
export const when = (seconds) => {
  const date = new Date(seconds * 1000);
  return `${date.toLocaleDateString("en-GB", { day: "numeric", month: "short" })}, ${clock(date)}`;
};

export function rate(perSecond) {
  if (perSecond === 0) return "0";
  return perSecond < 10 ? perSecond.toFixed(1) : whole(perSecond);
}

export function milliseconds(seconds) {
  const ms = seconds * 1000;
  if (ms >= 1000) return `${seconds.toFixed(1)} s`;
  return `${ms < 10 ? ms.toFixed(1) : ms.toFixed(0)} ms`;
}

export function duration(seconds) {
  if (seconds < 90) return `${Math.max(0, Math.round(seconds))} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 48 * 3600) return `${(seconds / 3600).toFixed(1)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

// A question before something that cannot be taken back lightly. Resolves to whether it was confirmed.
export function ask(title, text, yes) {
  const dialog = by("ask");
  by("ask-title").textContent = title;
  by("ask-text").textContent = text;
  by("ask-yes").textContent = yes;
  return new Promise((resolve) => {
    by("ask-yes").onclick = () => dialog.close("yes");
    by("ask-no").onclick = () => dialog.close("no");
    dialog.onclose = () => resolve(dialog.returnValue === "yes");
    dialog.returnValue = "";
    dialog.showModal();
  });
}
