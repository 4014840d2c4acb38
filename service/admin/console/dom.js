// Elements. Text enters the page as text, never as HTML.

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

// Changes only what changed: a screen reader hears nothing twice, and a selection is not lost.
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// Names and values. pairs: [name, text or node].
export const pairs = (rows, name = "pairs") => h("dl", { class: name }, rows.map(([key, value]) =>
  h("div", {}, h("dt", {}, key), h("dd", { class: "break" }, value))));

// A figure with its interval below it.
export const figure = (value, interval) =>
  h("span", { class: "figure" }, h("strong", {}, value), " ", h("small", { class: "interval" }, interval));

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
    new ResizeObserver(() => makeReachable(this.element)).observe(this.element);
  }

  row(given) {
    const { cells, ...attributes } = Array.isArray(given) ? { cells: given } : given;
    return h("tr", { role: "row", ...attributes }, cells.map((content, index) => {
      const { text, number } = this.heads[index];
      return h("td", { role: "cell", class: number ? "number" : null, "data-head": text }, content);
    }));
  }
}

function makeReachable(element) {
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

// A question before something that cannot be taken back lightly. Resolves to whether it was confirmed.
export function confirm(title, text, yes, no) {
  const dialog = by("confirm");
  by("confirm-title").textContent = title;
  by("confirm-text").textContent = text;
  by("confirm-yes").textContent = yes;
  by("confirm-no").textContent = no;
  return new Promise((resolve) => {
    by("confirm-yes").onclick = () => dialog.close("yes");
    by("confirm-no").onclick = () => dialog.close("no");
    dialog.onclose = () => resolve(dialog.returnValue === "yes");
    dialog.returnValue = "";
    dialog.showModal();
  });
}

// A place where an image file may be dropped or chosen. use: called with the file.
export function dropZone(place, input, use) {
  input.addEventListener("change", () => {
    const [file] = input.files;
    input.value = ""; // the same file may be chosen again
    if (file) use(file);
  });
  for (const kind of ["dragenter", "dragover"]) {
    place.addEventListener(kind, (event) => {
      event.preventDefault();
      place.classList.add("over");
    });
  }
  place.addEventListener("dragleave", () => place.classList.remove("over"));
  place.addEventListener("drop", (event) => {
    event.preventDefault();
    place.classList.remove("over");
    const [file] = event.dataTransfer.files;
    if (file) use(file);
  });
}
