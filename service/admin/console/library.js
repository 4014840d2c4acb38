// What is served: the library, its tickets by structure, and where each comes from.

import { get, Refused } from "./api.js";
import { by, figure, h, pairs, table } from "./dom.js";
import { duration, interval, number, percent, resizing, short, whole } from "./format.js";

const HEADS = ["Ticket", { text: "Kept", number: true }, { text: "Clean", number: true },
  { text: "Under attack", number: true }, "SHA-256", "Where it comes from"];
const WIDE = matchMedia("(min-width: 60rem)");

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
  return pairs([
    ["Digest", h("code", { class: "break", id: "digest" }, library.digest)],
    ["Holds", `${library.tickets} tickets, ${library.baselines} baselines, ${library.classes.length} classes`],
    ["Pictures", resizing(library.input)],
    ["Searched on", library.data],
    ["Ensembles", `${whole(policy.states)} (${policy.entropy_bits.toFixed(1)} bits); ${policy.expected_size.toFixed(2)} members on average`],
    ["Classes", h("span", { class: "classes" }, library.classes.slice(0, 20).join(", "), library.classes.length > 20 ? ", …" : "")],
  ]);
}

// One group for each structure, and one of what is there to be compared with.
function tickets(library) {
  const shared = { clean: common(library, "clean"), pgd: common(library, "pgd") };
  const conditions = [["Clean", shared.clean], ["Under attack", shared.pgd]].filter(([, text]) => text !== null);
  const groups = Map.groupBy(library.entries, ({ role, structure }) => (role === "ticket" ? structure.name : "baselines"));
  return [
    h("div", { class: "card groups", id: "tickets" }, [...groups].map(([name, entries], index) =>
      group(name, entries, shared, index === 0 && WIDE.matches))),
    conditions.length === 0 ? "" : h("p", { class: "fine", id: "conditions" }, "In brackets the 95 % intervals. ",
      conditions.map(([name, text]) => `${name}, every ticket: ${text}. `)),
  ];
}

function group(name, entries, shared, open) {
  const sorted = [...entries].sort((a, b) => a.density - b.density);
  const about = [
    `${entries.length} ${entries.length === 1 ? "network" : "networks"}`,
    `${span(sorted.map(({ density }) => density), 0)} % kept`,
    claims(entries, "clean", "clean"),
    claims(entries, "pgd", "under attack"),
  ].filter(Boolean);
  return h("details", { open }, h("summary", {}, h("strong", {}, name), " ", h("span", { class: "fine" }, about.join(" · "))),
    table(`Tickets: ${name}`, HEADS, sorted.map((entry) => ticket(entry, shared)), "tickets stack"));
}

function claims(entries, metric, word) {
  const values = entries.map((entry) => best(entry, metric)?.value).filter((value) => value !== undefined);
  return values.length === 0 ? null : `${span(values, 1)} % ${word}`;
}

function span(values, digits) {
  const [low, high] = [Math.min(...values), Math.max(...values)].map((value) => (100 * value).toFixed(digits));
  return low === high ? low : `${low} to ${high}`;
}

function ticket(entry, shared) {
  return [
    h("span", {}, h("strong", { class: "break" }, entry.name), h("br"), h("small", {}, `${entry.kind}, width ${entry.structure.width}`)),
    percent(entry.density, 0),
    claim(entry, "clean", shared.clean),
    claim(entry, "pgd", shared.pgd),
    h("code", { title: entry.sha256 }, short(entry.sha256)),
    origin(entry),
  ];
}

// The conditions of a metric's claims where all entries share them; else null, and each says its own.
function common({ entries }, metric) {
  const all = new Set(entries.map((entry) => best(entry, metric)).map((one) => (one ? conditions(one) : "")));
  return all.size === 1 ? [...all][0] || null : null;
}

// The claim on test images, or else any.
function best({ claims: every }, metric) {
  const all = every.filter((one) => one.metric === metric);
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
  const one = best(entry, metric);
  if (!one) return h("span", { class: "fine" }, "no claim");
  const own = shared === null ? h("small", {}, conditions(one)) : null;
  return h("span", {}, figure(`${number(one.value)} %`, interval(one)), own);
}

function origin({ provenance, claims: every }) {
  const { recipe } = provenance;
  const rows = {
    "searched for": duration(provenance.seconds),
    commit: provenance.commit,
    seed: provenance.seed,
    data: provenance.data_digest,
    "continued from": provenance.parent ?? "nothing",
    packages: Object.entries(provenance.packages).map(([name, version]) => `${name} ${version}`).join(", "),
    recipe: Object.entries(recipe).filter(([, value]) => typeof value !== "object").map(([name, value]) => `${name} ${value}`).join(", "),
    claims: every.map((one) => `${one.metric} ${percent(one.value)} on ${one.data.split} (${one.images}), ${one.measured}`).join("; "),
  };
  return h("details", {},
    h("summary", {}, `commit ${provenance.commit.slice(0, 8)}, seed ${provenance.seed}`),
    pairs(Object.entries(rows).map(([name, value]) => [name, String(value)]), "small-pairs"));
}
