// An image, and what twenty fresh draws say of it.

import { Refused, sendFile } from "./api.js";
import { range } from "./charts.js";
import { by, dropZone, h, table } from "./dom.js";
import { milliseconds, percent, resizing, short } from "./format.js";
import { go } from "./tabs.js";

const EMPTY = "What twenty draws say of it appears here.";
const BUSY = [0, 429, 503]; // worth another try with the same image

let chosen = null;

async function attempt() {
  if (chosen === null) return;
  const place = by("verdict");
  place.replaceChildren(h("p", { class: "empty" }, "Classifying it by twenty ensembles…"));
  by("again").disabled = true;
  try {
    place.replaceChildren(...answer(await sendFile("POST", "/admin/try", chosen, "application/octet-stream")));
    showAgain("Twenty more draws");
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    place.replaceChildren(h("p", { class: "error" }, error.message));
    showAgain(BUSY.includes(error.status) ? "Try again" : null);
  } finally {
    by("again").disabled = false;
  }
}

function showAgain(text) {
  by("again").hidden = text === null;
  if (text !== null) by("again").textContent = text;
}

function answer({ label, agreement, draws, classes, seconds, library }) {
  const votes = Math.round(agreement * draws);
  const all = votes === draws ? `All ${draws} draws` : `${votes} of ${draws} draws`;
  const likely = classes.filter((row) => row.votes > 0 || row.high >= 0.05).slice(0, 10);
  const heads = ["Label", { text: "Draws", number: true }, { text: "Least · mean · most", number: true }, "Spread"];
  const rows = likely.map((row) => [
    h("span", { class: "break" }, row.label),
    row.votes,
    `${percent(row.low, 0)} · ${percent(row.mean, 0)} · ${percent(row.high, 0)}`,
    range(row.low, row.mean, row.high),
  ]);
  return [
    h("h3", { id: "trial-label", class: "break" }, label),
    h("p", {}, `${all} say ${label}. ${steady(agreement)}`),
    table("What the draws say, by label", heads, rows, "votes"),
    h("p", { class: "fine" }, `Probabilities over the draws. ${milliseconds(seconds)} for all of them, `,
      `library ${short(library)}. Which tickets answered stays secret.`),
  ];
}

function steady(agreement) {
  if (agreement === 1) return "The answer does not depend on the draw.";
  if (agreement >= 0.8) return "The answer hardly depends on the draw.";
  return "The answer depends on the draw: this image lies near a boundary.";
}

function use(file) {
  chosen = file;
  const preview = by("preview");
  URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(file);
  by("tried-name").textContent = file.name;
  by("tried").hidden = false;
  go("#try");
  attempt();
}

// What the library takes as a picture.
export function showInput(library) {
  by("trial-input").textContent = library === null ? "" : `The networks see ${resizing(library.input)}.`;
}

export function begin() {
  dropZone(by("drop"), by("file"), use);
  dropZone(by("drop-live"), by("file-live"), use);
  by("again").addEventListener("click", attempt);
  const preview = by("preview");
  preview.addEventListener("error", () => { preview.hidden = true; });
  preview.addEventListener("load", () => {
    preview.hidden = false;
    preview.classList.toggle("small", preview.naturalWidth < preview.width); // its pixels are shown as they are
  });
  forget();
}

export function forget() {
  chosen = null;
  by("tried").hidden = true;
  by("verdict").replaceChildren(h("p", { class: "empty" }, EMPTY));
}
