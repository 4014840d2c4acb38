// An image, and what twenty fresh draws say of it.

import { range } from "./charts.js";
import { Refused, sendFile } from "./api.js";
import { by, h, milliseconds, percent, short, table } from "./dom.js";

let chosen = null;

async function attempt() {
  if (chosen === null) return;
  const place = by("verdict");
  place.replaceChildren(h("p", { class: "empty" }, "Asking twenty ensembles…"));
  by("again").disabled = true;
  try {
    place.replaceChildren(...verdict(await sendFile("POST", "/admin/try", chosen, "application/octet-stream")));
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    place.replaceChildren(h("p", { class: "error" }, error.message));
  } finally {
    by("again").disabled = false;
  }
}

function verdict({ label, agreement, draws, classes, seconds, library }) {
  const votes = Math.round(agreement * draws);
  const all = votes === draws ? `All ${draws} draws` : `${votes} of ${draws} draws`;
  const seen = classes.filter((row) => row.votes > 0 || row.high >= 0.05).slice(0, 10);
  const heads = ["Label", { text: "Draws", number: true }, { text: "Least · mean · most", number: true }, "Spread"];
  const rows = seen.map((row) => [
    row.label,
    row.votes,
    `${percent(row.low, 0)} · ${percent(row.mean, 0)} · ${percent(row.high, 0)}`,
    range(row.low, row.mean, row.high),
  ]);
  return [
    h("h3", { id: "trial-label" }, label),
    h("p", {}, `${all} say ${label}. ${steady(agreement)}`),
    table("What the draws say, by label", heads, rows, "votes"),
    h("p", { class: "fine" }, `${milliseconds(seconds)} for all of them, library ${short(library)}. `,
      "The figures are probabilities over the draws; the box is their range, the line in it their mean. Which tickets answered is told to nobody."),
  ];
}

function steady(agreement) {
  if (agreement === 1) return "The answer does not depend on the draw.";
  if (agreement >= 0.8) return "The answer hardly depends on the draw.";
  return "The answer depends on the draw: this image lies near a boundary.";
}

function choose(file) {
  if (!file) return;
  chosen = file;
  const preview = by("preview");
  URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(file);
  by("tried-name").textContent = file.name;
  by("tried").hidden = false;
  attempt();
}

function dropped(event) {
  event.preventDefault();
  by("drop").classList.remove("over");
  choose(event.dataTransfer.files[0]);
}

export function begin() {
  const drop = by("drop");
  by("file").addEventListener("change", (event) => {
    choose(event.target.files[0]);
    event.target.value = ""; // the same file may be chosen again
  });
  by("again").addEventListener("click", attempt);
  by("preview").addEventListener("error", () => { by("preview").hidden = true; });
  by("preview").addEventListener("load", () => { by("preview").hidden = false; });
  for (const kind of ["dragenter", "dragover"]) {
    drop.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
  }
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", dropped);
}

export function forget() {
  chosen = null;
  by("tried").hidden = true;
  by("verdict").replaceChildren(h("p", { class: "empty" }, "What twenty draws say of it appears here."));
}
