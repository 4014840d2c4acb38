// Draws against expectation: a heat map of deviations, and the verdict in words.

import { by, h, setText } from "./dom.js";
import { duration, percent, whole } from "./format.js";

const STEPS = [1, 2, 3]; // standard deviations at which the colour changes; the last step is the server's `odd`

export function showDraws(draws) {
  by("draws").hidden = draws === null;
  if (draws === null) return say("", "No library is loaded yet.");
  if (draws.images === 0) {
    by("draws").hidden = true;
    return say("", `Nothing to compare yet: draws are published ${draws.lot} images at a time.`);
  }
  const period = draws.seconds === null ? "since the start" : `last ${duration(draws.seconds)}`;
  const worst = draws.tickets.reduce((one, other) => (far(other) > far(one) ? other : one));
  const odd = far(worst) > draws.odd;
  say(`${whole(draws.images)} images, ${period}`, odd ? alarm(worst) : calm(worst), odd);
  by("heat").replaceChildren(heat(draws));
}

const far = ({ deviation }) => Math.abs(deviation ?? 0);
const kept = ({ density }) => `${+(100 * density).toFixed(2)} %`;

function say(about, verdict, odd = false) {
  setText(by("draws-about"), about);
  setText(by("draws-verdict"), verdict);
  by("draws-verdict").classList.toggle("bad", odd);
}

const calm = (worst) =>
  `As expected: all within chance, the largest ${signed(worst.deviation)} σ.`;

const alarm = (worst) =>
  `Not as expected: ${worst.structure} at ${kept(worst)} was drawn ${whole(worst.drawn)} times instead of ` +
  `${whole(worst.expected)}. See TombolaDrawsDeviate in the runbook.`;

const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(1)}`;

// -4 to 4: how far, and to which side.
function level(deviation, odd) {
  const steps = [...STEPS, odd];
  const size = steps.filter((step) => Math.abs(deviation) >= step).length;
  return deviation < 0 ? -size : size;
}

// Densities are rows and structures columns: four columns fit on a telephone.
function heat({ tickets, odd }) {
  const structures = [...new Set(tickets.map(({ structure }) => structure))];
  const densities = [...new Set(tickets.map(({ density }) => density))].sort((a, b) => a - b);
  const cell = (density, structure) => tickets.find((row) => row.density === density && row.structure === structure);
  return h("table", { class: "heat" },
    h("caption", { class: "hidden" }, "Deviation of each ticket's draws, in standard deviations"),
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "kept"), structures.map((name) =>
      h("th", { scope: "col" }, name.replace("wide", "wide\u200b"))))),
    h("tbody", {}, densities.map((density) => h("tr", {},
      h("th", { scope: "row" }, kept({ density })),
      structures.map((structure) => drawn(cell(density, structure), odd))))));
}

function drawn(row, odd) {
  if (row === undefined) return h("td", {}, "");
  const title = `${row.structure}, ${kept(row)} kept: drawn ${whole(row.drawn)}, expected ${whole(row.expected)}`;
  return h("td", { "data-level": level(row.deviation ?? 0, odd), title }, row.deviation === null ? "–" : signed(row.deviation));
}

export function begin() {
  const levels = [[-3, "drawn less"], [-2, ""], [-1, ""], [0, "within 1 σ"], [1, ""], [2, ""], [3, "drawn more"]];
  by("heat-legend").replaceChildren(...levels.map(([step, text]) =>
    h("span", {}, h("i", { "data-level": step, "aria-hidden": "true" }), text)));
}
