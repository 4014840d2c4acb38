// What is served, ticket by ticket, and how another takes its place.

import { get, post, Refused } from "./api.js";
import { ask, by, duration, h, percent, say, short, table, whole } from "./dom.js";

export async function show() {
  const place = by("library-body");
  try {
    const [library, policy] = await Promise.all([get("/admin/library"), get("/admin/policy")]);
    place.replaceChildren(summary(library, policy), ...tickets(library));
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (error.status !== 0) place.replaceChildren(h("p", { class: "empty" }, waiting(error)));
  }
}

const waiting = (error) => (error.status === 503 ? "No library is loaded yet." : error.message);

function summary(library, policy) {
  const pairs = [
    ["Digest", h("code", { class: "break", id: "digest" }, library.digest)],
    ["Holds", `${library.tickets} tickets, ${library.baselines} baselines, ${library.classes.length} classes`],
    ["Pictures", picture(library.input)],
    ["Searched on", library.data],
    ["Ensembles", `${whole(policy.states)} (${policy.entropy_bits.toFixed(1)} bits); ${policy.expected_size.toFixed(2)} members on average`],
  ];
  return h("dl", { class: "pairs" }, pairs.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

// What becomes of a picture of another size: "64×48 pixels (width × height), cut to the centre, bilinear".
function picture({ width, height, resize, interpolation }) {
  const how = { squash: "stretched", cover: "cut to the centre", contain: "whole, on white" }[resize];
  return `${width}×${height} pixels (width × height); others are ${how}, ${interpolation}`;
}

function tickets(library) {
  const heads = ["Ticket", { text: "Kept", number: true }, { text: "Clean", number: true },
    { text: "Under attack", number: true }, "SHA-256", "Where it comes from"];
  const shared = { clean: common(library, "clean"), pgd: common(library, "pgd") };
  const conditionsOfAll = [["Clean", shared.clean], ["Under attack", shared.pgd]].filter(([, text]) => text !== null);
  return [
    table("Tickets of the library", heads, library.entries.map((entry) => ticket(entry, shared)), "tickets stack"),
    conditionsOfAll.length === 0 ? "" : h("p", { class: "fine", id: "conditions" }, "In brackets the 95 % intervals. ",
      conditionsOfAll.map(([name, text]) => `${name}, every ticket: ${text}. `)),
  ];
}

// The conditions of a metric's claims where all entries share them; else null, and each says its own.
function common({ entries }, metric) {
  const all = new Set(entries.map((entry) => best(entry, metric)).map((one) => (one ? conditions(one) : "")));
  return all.size === 1 ? [...all][0] || null : null;
}

function ticket(entry, shared) {
  return [
    h("span", {}, h("strong", {}, entry.name), h("br"), h("small", {}, `${entry.kind}, width ${entry.structure.width}`,
      entry.role === "ticket" ? "" : `, ${entry.role}`)),
    percent(entry.density, 0),
    claim(entry, "clean", shared.clean),
    claim(entry, "pgd", shared.pgd),
    h("code", { title: entry.sha256 }, short(entry.sha256)),
    origin(entry),
  ];
}

// The claim on test images, or else any.
function best({ claims }, metric) {
  const all = claims.filter((one) => one.metric === metric);
  return all.find((one) => one.data.split === "test") ?? all[0];
}

function conditions({ images, data, attack }) {
  const n = `n = ${whole(images)}, ${data.split} images`;
  if (!attack) return n;
  const { norm, epsilon, steps, restarts } = attack;
  const starts = restarts === 1 ? "1 random start" : `${restarts} random starts`;
  return `${norm} PGD, ε = ${+(255 * epsilon).toFixed(2)}/255, ${steps} steps, ${starts}, ${n}`;
}

// A figure with its interval, and its conditions unless they stand below the table for all.
function claim(entry, metric, shared) {
  const reported = best(entry, metric);
  if (!reported) return h("span", { class: "fine" }, "no claim");
  const own = shared === null ? [h("br"), h("small", {}, conditions(reported))] : null;
  return h("span", {}, percent(reported.value), " ", h("small", { class: "interval" }, `[${points(reported.low)}, ${points(reported.high)}]`), own);
}

const points = (share) => (100 * share).toFixed(1);

function origin({ provenance, claims }) {
  const recipe = provenance.recipe;
  const pairs = {
    "searched for": duration(provenance.seconds),
    commit: provenance.commit,
    seed: provenance.seed,
    data: provenance.data_digest,
    "continued from": provenance.parent ?? "nothing",
    packages: Object.entries(provenance.packages).map(([name, version]) => `${name} ${version}`).join(", "),
    recipe: Object.entries(recipe).filter(([, value]) => typeof value !== "object").map(([name, value]) => `${name} ${value}`).join(", "),
    claims: claims.map((one) => `${one.metric} ${percent(one.value)} on ${one.data.split} (${one.images}), ${one.measured}`).join("; "),
  };
  return h("details", {},
    h("summary", {}, `commit ${provenance.commit.slice(0, 8)}, seed ${provenance.seed}`),
    h("dl", { class: "small-pairs" }, Object.entries(pairs).map(([name, value]) =>
      h("div", {}, h("dt", {}, name), h("dd", { class: "break" }, String(value))))));
}

// Swap

const QUESTION = "The server opens its configured library again, verifies and warms it beside the present one, and then " +
  "serves it. Requests are answered throughout. If anything is wrong with it, the present one stays.";

async function swap() {
  if (!(await ask("Swap the library?", QUESTION, "Swap it"))) return;
  const button = by("swap");
  button.disabled = true;
  say(by("swap-message"), "Reading, verifying and warming up…");
  try {
    say(by("swap-message"), swapped(await post("/admin/library", {}, { patience: 600000 })));
    await show();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    say(by("swap-message"), error.message);
  } finally {
    button.disabled = false;
  }
}

function swapped({ digest, before }) {
  if (digest === before) return `Read again: it is the same library, ${short(digest)}.`;
  return `Now serving ${short(digest)}; before it was ${short(before)}.`;
}

export function begin() {
  by("swap").addEventListener("click", swap);
}
