// The tab of audits: the list, and which of its pages is shown: a new audit, one audit, or two compared.

import { get, Refused } from "./api.js";
import * as form from "./audit_form.js";
import { pending, pill } from "./audit_state.js";
import { AuditView } from "./audit_view.js";
import { compare } from "./compare.js";
import { by, figure, h, table } from "./dom.js";
import { duration, interval, percent, points, pointsInterval, sentence, short, when } from "./format.js";
import { go, onTab } from "./tabs.js";

const BUSY_MS = 5000; // between looks at the list while an audit waits or runs
const IDLE_MS = 30000; // and while none does
const RECENT = 6; // rows before the older ones are folded away
const HEADS = ["Compare", "Audit", { text: "Robust", number: true }, { text: "Secret θ", number: true }, "Measurement",
  "Library", { text: "Took", number: true }, "State"];

let jobs = [];
let listed = 0; // when
let marked = []; // at most two, to be compared
let view = null; // of the audit that is shown

export function begin() {
  onTab("audits", page);
  by("compare").addEventListener("click", () => go(`#audits/compare/${marked.join("/")}`));
  form.begin(async (id) => {
    await list();
    go(`#audits/${id}`);
  });
}

export function forget() {
  close();
  jobs = [];
  marked = [];
  listed = 0;
  by("audit-list").replaceChildren();
}

// rest: of the hash, after #audits.
function page([name = "", ...ids]) {
  close();
  by("audits-all").hidden = by("audits-actions").hidden = name !== "";
  by("audits-new").hidden = name !== "new";
  by("audit").hidden = ["", "new", "compare"].includes(name);
  by("comparison").hidden = name !== "compare";
  if (name === "" || name === "new") return refresh();
  if (name === "compare") return showComparison(ids);
  view = new AuditView(name, by("audit"), list);
  view.follow();
}

function close() {
  view?.close();
  view = null;
}

// The list

export async function refresh() {
  try {
    await form.refresh();
    await list();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
  }
}

// Called every few seconds: audits end by themselves, and others may start some.
export async function tick() {
  const busy = jobs.some(pending);
  if (by("audits").hidden || Date.now() - listed < (busy ? BUSY_MS : IDLE_MS)) return;
  try {
    await list();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
  }
}

async function list() {
  listed = Date.now();
  const { audits } = await get("/admin/audits");
  const same = JSON.stringify(audits) === JSON.stringify(jobs) && by("audit-list").hasChildNodes();
  jobs = audits;
  if (!same) draw();
  form.recall(jobs);
}

function draw() {
  const place = by("audit-list");
  const focused = place.contains(document.activeElement) ? document.activeElement.ariaLabel : null;
  marked = marked.filter((id) => jobs.some((job) => job.id === id));
  place.replaceChildren(...rows());
  by("compare").disabled = marked.length !== 2;
  by("compare").hidden = by("compare-how").hidden = jobs.length < 2;
  if (focused !== null) place.querySelector(`[aria-label="${CSS.escape(focused)}"]`)?.focus();
}

function rows() {
  if (jobs.length === 0) {
    return [h("p", { class: "empty" }, "No audit yet. A smoke audit is a good first one: it shows that the attacks run.")];
  }
  const [recent, older] = [jobs.slice(0, RECENT), jobs.slice(RECENT)];
  const shown = table("Audits", HEADS, recent.map(row), "list stack");
  if (older.length === 0) return [shown];
  const folded = table("Older audits", HEADS, older.map(row), "list stack");
  return [shown, h("details", {}, h("summary", {}, `${older.length} older`), folded)];
}

function row(job) {
  const name = when(job.created);
  const box = h("input", { type: "checkbox", "aria-label": `Compare the audit of ${name}`, value: job.id,
    disabled: job.state !== "done", onchange: mark });
  box.checked = marked.includes(job.id);
  return [
    box,
    h("span", {}, h("a", { href: `#audits/${job.id}`, "aria-label": `Open the audit of ${name}` }, name), h("br"),
      h("small", { class: "break" }, request(job.request))),
    robust(job.result),
    secrecy(job.result),
    measurement(job.result),
    h("code", {}, short(job.digest)),
    job.finished && job.started ? duration(job.finished - job.started) : "–",
    pill(job.state),
  ];
}

function request({ profile, images, data, attacks }) {
  const chosen = attacks?.length ? `${attacks.length} attacks chosen` : null;
  return [profile, images ? `${images} images` : null, data, chosen].filter(Boolean).join(", ");
}

// Generated images measure nothing, and an invalid audit neither.
const hasFigures = (result) => result !== null && result.measurement && result.verdict !== "invalid";

function robust(result) {
  if (!hasFigures(result)) return "–";
  const size = result.epsilon === null ? "" : ` at ${result.epsilon}/255`;
  return h("span", { class: "figure" }, h("strong", {}, percent(result.robust.value)), " ",
    h("small", { class: "interval" }, `${interval(result.robust)}${size}`));
}

// What a secret theta is worth, in points of robust accuracy.
function secrecy(result) {
  if (!hasFigures(result) || !result.secrecy) return "–";
  return figure(points(result.secrecy.value), pointsInterval(result.secrecy));
}

function measurement(result) {
  if (result === null) return "–";
  const { word, reason, tone } = result.judgement ?? { word: result.verdict, reason: "", tone: "neutral" };
  return h("span", { class: `pill ${tone}`, title: reason }, word);
}

function mark(event) {
  const { value, checked } = event.target;
  marked = marked.filter((id) => id !== value);
  if (checked) marked = [...marked, value].slice(-2); // a third takes the place of the first
  for (const box of by("audit-list").querySelectorAll("input")) box.checked = marked.includes(box.value);
  by("compare").disabled = marked.length !== 2;
}

async function showComparison(ids) {
  const place = by("comparison");
  const show = (...parts) => place.replaceChildren(
    h("div", { class: "heading" }, h("h3", { id: "comparison-title" }, "Two audits compared"),
      h("a", { href: "#audits" }, "All audits")), ...parts);
  show(h("p", { class: "empty" }, "Reading both reports…"));
  try {
    const both = await Promise.all(ids.slice(0, 2).map((id) => get(`/admin/audits/${encodeURIComponent(id)}`)));
    const pair = both.sort((a, b) => a.created - b.created);
    if (pair.length !== 2) return show(h("p", { class: "error" }, "Choose two audits in the list."));
    const reports = await Promise.all(pair.map(({ id }) => get(`/admin/audits/${id}/report.json`)));
    show(...compare(pair, reports));
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    show(h("p", { class: "error" }, sentence(error.message)));
  }
}
