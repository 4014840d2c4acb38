// Two reports side by side, and what has to be known before their figures are.

import { figure as shown, h, table } from "./dom.js";
import { interval, percent, short, when, whole } from "./format.js";

const OURS = "tombola";
const VERDICTS = {
  valid: "all checks that ran passed",
  warnings: "checks with warnings",
  invalid: "INVALID: its figures mean nothing",
};

// pair: the jobs, the older first.  reports: theirs.
export function compare(pair, reports) {
  const heads = ["What", ...pair.map((job) => when(job.created)), { text: "Change", number: true }];
  const rows = [...conditions(reports), ...accuracies(reports), ...attacks(reports)];
  return [caution(reports), table("Two audits compared", heads, rows, "compared stack")];
}

function caution([a, b]) {
  const differ = [];
  if (a.library.digest !== b.library.digest) differ.push("library");
  if (a.data.ids_digest !== b.data.ids_digest || a.data.digest !== b.data.digest) differ.push("images");
  if (a.audit.profile !== b.audit.profile) differ.push("profile");
  if (a.audit.headline !== b.audit.headline || a.audit.norm !== b.audit.norm) differ.push("size of the attack");
  if (a.audit.seed !== b.audit.seed) differ.push("seed");
  if (differ.length === 0) return h("p", {}, "Same library, images, profile and seed: the two should agree.");
  const begin = differ.length === 1 ? "This differs" : "These differ";
  return h("p", {}, `${begin} between the two: ${differ.join(", ")}. Overlapping intervals are no difference.`);
}

function conditions(reports) {
  const one = (name, of) => [name, ...reports.map(of), ""];
  return [
    one("Verdict", ({ verdict }) => VERDICTS[verdict] ?? verdict),
    one("Library", ({ library }) => h("code", {}, short(library.digest))),
    one("Images", ({ data }) => `${whole(data.images)} of ${data.name}`),
    one("Profile", ({ audit }) => audit.profile),
    one("Seed", ({ audit }) => `${audit.seed}`),
  ];
}

const figure = (one) => shown(percent(one.value), interval(one));

function change(a, b) {
  const points = 100 * (b.value - a.value);
  return `${points > 0 ? "+" : points < 0 ? "−" : ""}${Math.abs(points).toFixed(1)}`;
}

function accuracies(reports) {
  const [a, b] = reports.map(({ systems }) => systems[OURS]);
  const clean = ["Clean accuracy", figure(a.clean.expected), figure(b.clean.expected), change(a.clean.expected, b.clean.expected)];
  const points = a.curve.filter(({ epsilon }) => epsilon > 0 && b.curve.some((other) => other.epsilon === epsilon));
  return [clean, ...points.map((point) => {
    const other = b.curve.find(({ epsilon }) => epsilon === point.epsilon);
    return [`All attacks, ${point.epsilon}/255`, figure(point), figure(other), change(point, other)];
  })];
}

// Attacks that both ran against the served law at one size.
function attacks([a, b]) {
  const ours = (report) => report.attacks.filter(({ system }) => system === OURS);
  const rows = ours(a).map((one) => [one, ours(b).find((other) => other.name === one.name && other.epsilon === one.epsilon)]);
  return rows.filter(([, other]) => other).map(([one, other]) =>
    [`${one.name}, ${one.epsilon}/255`, figure(one.expected), figure(other.expected), change(one.expected, other.expected)]);
}
