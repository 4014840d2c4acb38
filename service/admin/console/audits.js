// Audits: start one, knowing what it costs; watch it run; stop it; read its report; compare two.

import { events, get, getBlob, getText, post, Refused, remove, sendFile } from "./api.js";
import { ask, by, duration, h, percent, say, short, Table, table, when, whole } from "./dom.js";
import { compare } from "./compare.js";

const WAITING = ["queued", "running"];
const WORDS = {
  queued: "waiting",
  running: "running",
  done: "done",
  cancelled: "cancelled",
  interrupted: "interrupted",
  failed: "failed",
};
const STEP_HEADS = ["Attack", "Against", ...["Epsilon", "Images", "Accuracy left"].map((text) => ({ text, number: true }))];
const BUSY_MS = 5000; // between looks at the list while an audit waits or runs
const IDLE_MS = 30000; // and while none does
const PAUSE_MS = 3000; // before a broken stream is opened again
const SETTLED_MS = 400; // after the last key, before the cost is asked for

let choices = null; // what the server offers: profiles, attacks, epsilons
let jobs = [];
let listed = 0; // when
let marked = []; // at most two, to be compared
let opened = null; // {id, stop}
let costing = null;

export function begin() {
  by("audit-form").addEventListener("submit", start);
  by("audit-form").addEventListener("input", changed);
  by("audit-form").addEventListener("change", changed);
  by("compare").addEventListener("click", showComparison);
  by("upload").addEventListener("change", upload);
}

export function enter() {
  refresh();
}

export function leave() {
  close();
  jobs = [];
  marked = [];
  by("comparison").hidden = true;
  by("audit-list").replaceChildren();
}

export async function refresh() {
  try {
    if (choices === null) offer(await get("/admin/profiles"));
    await Promise.all([list(), datasets()]);
    price();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
  }
}

// The form

function offer(offered) {
  choices = offered;
  by("profiles").replaceChildren(...found.profiles.map(profile));
  by("epsilons").value = usual(by("norm").value);
  by("attacks").append(...found.attacks.map((name) =>
    h("label", { class: "tick" }, h("input", { type: "checkbox", value: name }), name)));
  adapt();
}

const usual = (norm) => choices.epsilons[norm].join(", ");

// The other norm's usual sizes, unless somebody wrote some.
function renormed() {
  const all = Object.keys(choices.epsilons).map(usual);
  if (all.includes(by("epsilons").value)) by("epsilons").value = usual(by("norm").value);
}

function profile({ name, about, images }) {
  const id = `profile-${name}`;
  return h("div", { class: "choice" },
    h("input", { type: "radio", name: "profile", id, value: name, checked: name === "smoke" }),
    h("label", { for: id }, h("strong", {}, name), h("span", { class: "fine" }, `${about}; ${images} images`)));
}

const chosen = () => document.querySelector("input[name=profile]:checked").value;

// What goes with the profile and the norm: the number of images, and the attacks there are.
function adapt() {
  const { images, attacks } = choices.profiles.find(({ name }) => name === chosen());
  by("images").placeholder = `${images}`;
  for (const box of by("attacks").querySelectorAll("input")) {
    box.disabled = !attacks[by("norm").value].includes(box.value);
    box.parentElement.classList.toggle("off", box.disabled);
  }
  const some = wanted();
  say(by("attacks-chosen"), some.length ? some.join(", ") : "all of the profile");
}

// What the last audit of the profile really took. An estimate is of the attacks alone, on an idle machine.
async function recall() {
  const name = chosen();
  const last = jobs.filter(({ state, request }) => state === "done" && request.profile === name)
    .reduce((a, b) => (a !== null && a.created > b.created ? a : b), null);
  if (last === null) return say(by("experience"), "");
  try {
    const { started, finished: end, cost } = await get(`/admin/audits/${last.id}`);
    if (chosen() !== name) return;
    say(by("experience"), `The last ${name} audit here took ${duration(end - started)}; ` +
      `its estimate was ${duration(cost.seconds)}.`);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
  }
}

const wanted = () => [...by("attacks").querySelectorAll("input:checked:not(:disabled)")].map(({ value }) => value);

async function datasets() {
  const { datasets: sets } = await get("/admin/datasets");
  const before = by("data").value;
  const options = sets.map(({ name, kind, uploaded }) => {
    const more = kind === "generated" ? "made here, for smoke alone" : `${kind}${uploaded ? ", uploaded" : ""}`;
    return h("option", { value: name }, `${name} (${more})`);
  });
  by("data").replaceChildren(...options);
  if (sets.some(({ name }) => name === before)) by("data").value = before;
}

// The form as the API wants it. Raises Refused where a field holds no number.
function fields() {
  const form = {
    profile: chosen(),
    data: by("data").value,
    norm: by("norm").value,
    epsilons: by("epsilons").value.split(/[\s,;]+/).filter((text) => text !== "").map((text) => number(text, "Epsilons")),
    seed: number(by("seed").value || "0", "Seed"),
  };
  if (by("images").value.trim() !== "") form.images = number(by("images").value, "How many");
  if (wanted().length > 0) form.attacks = wanted();
  return form;
}

function number(text, name) {
  const value = Number(text);
  if (!Number.isFinite(value)) throw new Refused(400, `${name}: “${text}” is not a number.`);
  return value;
}

function changed(event) {
  if (choices === null || event.target.id === "upload") return;
  if (event.target.id === "norm") renormed();
  adapt();
  if (event.target.name === "profile") recall();
  clearTimeout(costing);
  costing = setTimeout(price, SETTLED_MS);
}

let queries = 0;

async function price() {
  const mine = ++queries;
  const place = by("cost");
  let text;
  let refused = false;
  try {
    const cost = await post("/admin/audits/cost", fields());
    text = `Estimated cost: about ${estimate(cost)}, for ${cost.attacks} attacks (${whole(cost.giga_multiply_adds)} ` +
      "giga-multiply-adds). Loading and the checks at the end come on top.";
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (error.status === 0) return;
    refused = true;
    text = sentence(error.message);
  }
  if (mine !== queries) return; // another answer is on its way
  say(place, text);
  place.classList.toggle("refused", refused);
  by("start").disabled = refused;
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

async function start(event) {
  event.preventDefault();
  if (choices === null) return;
  say(by("audit-error"), "");
  by("start").disabled = true;
  try {
    const { id } = await post("/admin/audits", fields());
    await list();
    open(id);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    say(by("audit-error"), sentence(error.message));
  } finally {
    by("start").disabled = false;
  }
}

async function upload(event) {
  const file = event.target.files[0];
  if (!file) return;
  const status = by("upload-message");
  const name = file.name.toLowerCase().replace(/[^a-z0-9._-]+/g, "-").replace(/^[^a-z0-9]+/, "");
  say(status, `Sending ${file.name}…`);
  try {
    const kept = await sendFile("PUT", `/admin/datasets/${encodeURIComponent(name)}`, file, "application/octet-stream");
    say(status, `Kept as ${kept.name}: ${kept.checked} images checked, ${kept.classes} classes.`);
    await datasets();
    by("data").value = kept.name;
    price();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    say(status, sentence(error.message));
  } finally {
    event.target.value = "";
  }
}

// The list

// Called every few seconds: audits end by themselves, and others may start some.
export async function tick() {
  const busy = jobs.some(({ state }) => WAITING.includes(state));
  if (choices === null) return refresh();
  if (Date.now() - listed < (busy ? BUSY_MS : IDLE_MS)) return;
  try {
    await list();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
  }
}

async function list() {
  listed = Date.now();
  const listing = (await get("/admin/audits")).audits;
  const same = JSON.stringify(listing) === JSON.stringify(jobs) && by("audit-list").hasChildNodes();
  jobs = listing;
  if (same) return;
  const focused = by("audit-list").contains(document.activeElement) ? document.activeElement.ariaLabel : null;
  draw();
  if (focused !== null) by("audit-list").querySelector(`[aria-label="${CSS.escape(focused)}"]`)?.focus();
}

function draw() {
  marked = marked.filter((id) => jobs.some((job) => job.id === id));
  const place = by("audit-list");
  if (jobs.length === 0) place.replaceChildren(h("p", { class: "empty" }, "None yet. A smoke audit is a good first one."));
  else place.replaceChildren(table("All audits", ["Compare", "Asked for", "What", "Robust", "Secret θ", "Measurement", "Library", "Took", "State", "Audit"], jobs.map(row), "list stack"));
  by("compare").disabled = marked.length !== 2;
  if (choices !== null) recall();
}

function row(job) {
  const name = when(job.created);
  const box = h("input", { type: "checkbox", "aria-label": `Compare the audit of ${name}`, value: job.id,
    disabled: job.state !== "done", onchange: mark });
  box.checked = marked.includes(job.id);
  const opening = { type: "button", class: "quiet", "aria-label": `Open the audit of ${name}`, onclick: () => open(job.id) };
  return {
    class: opened?.id === job.id ? "current" : null,
    "data-id": job.id,
    cells: [
      box,
      h("time", { datetime: new Date(job.created * 1000).toISOString() }, name),
      about(job.request),
      robust(job.result),
      secrecy(job.result),
      measurement(job.result),
      h("code", {}, short(job.digest)),
      job.finished && job.started ? duration(job.finished - job.started) : "–",
      pill(job.state),
      h("button", opening, "Open"),
    ],
  };
}

function about({ profile: name, images, data, attacks }) {
  const more = [images ? `${images} images` : null, data && data !== "generated" ? data : null,
    attacks?.length ? `${attacks.length} attacks chosen` : null].filter(Boolean);
  return h("span", {}, h("strong", {}, name), more.length ? [h("br"), h("small", {}, more.join(", "))] : null);
}

// A smoke audit of generated images measures nothing, and an invalid one neither.
const measured = (result) => result !== null && result.measurement && result.verdict !== "invalid";

function robust(result) {
  if (result === null) return "–";
  if (!measured(result)) return "none";
  const { value, low, high } = result.robust;
  return h("span", {}, h("strong", {}, percent(value)), h("br"), h("small", {}, `[${percent(low)}, ${percent(high)}]`));
}

// What a secret theta is worth: robust accuracy with it less with theta known, in points.
function secrecy(result) {
  if (result === null || !measured(result) || !result.secrecy) return "–";
  const { value, low, high } = result.secrecy;
  return h("span", {}, h("strong", {}, points(value)), h("br"), h("small", {}, `[${points(low)}, ${points(high)}]`));
}

const points = (share) => `${share < 0 ? "−" : "+"}${Math.abs(100 * share).toFixed(1)}`;

function measurement(result) {
  if (result === null) return "–";
  return measured(result) ? { valid: "valid", warnings: "with warnings" }[result.verdict] : "not a measurement";
}

const pill = (state) => h("span", { class: `pill ${state}` }, WORDS[state] ?? state);

function mark(event) {
  const { value, checked } = event.target;
  marked = marked.filter((id) => id !== value);
  if (checked) marked = [...marked, value].slice(-2); // a third takes the place of the first
  for (const box of by("audit-list").querySelectorAll("input")) box.checked = marked.includes(box.value);
  by("compare").disabled = marked.length !== 2;
}

// One audit

function close() {
  opened?.stop.abort();
  opened = null;
  by("audit").hidden = true;
  for (const row of by("audit-list").querySelectorAll("tr.current")) row.classList.remove("current");
}

async function open(id) {
  close();
  opened = { id, stop: new AbortController() };
  by("audit").hidden = false;
  by("audit").replaceChildren(h("p", { class: "empty", id: "audit-title" }, "Opening…"));
  by("audit").focus();
  by("audit").scrollIntoView({ block: "nearest" });
  for (const row of by("audit-list").querySelectorAll("tr[data-id]")) row.classList.toggle("current", row.dataset.id === id);
  await follow(opened);
}

// Shows an audit until it has ended, however often the server goes away meanwhile.
async function follow(mine) {
  while (opened === mine) {
    try {
      const job = await get(`/admin/audits/${mine.id}`);
      if (opened !== mine) return;
      const parts = frame(job);
      if (!WAITING.includes(job.state)) return await ended(job, parts);
      await listen(mine, parts);
      await list();
    } catch (error) {
      if (mine.stop.signal.aborted) return;
      if (error instanceof Refused && error.status !== 0 && error.status !== 503) return showError(error);
      await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
    }
  }
}

const showError = (error) => by("audit").replaceChildren(h("p", { class: "error", id: "audit-title" }, sentence(error.message)));

// The parts of the panel that change while an audit runs.
function frame(job) {
  const parts = {
    state: h("p", { role: "status" }, pill(job.state)),
    progress: h("progress", { max: 1, value: 0, "aria-label": "Progress of the audit" }),
    left: h("p", { class: "fine", id: "audit-left" }, "Waiting for its turn, or starting: loading takes a while."),
    steps: new Table("Attacks that have ended", STEP_HEADS, "steps stack"),
    body: h("div", {}),
  };
  const waiting = WAITING.includes(job.state);
  const cancel = h("button", { type: "button", id: "cancel", onclick: () => stop(job.id) }, "Cancel this audit");
  by("audit").replaceChildren(
    h("div", { class: "heading" },
      h("h3", { id: "audit-title" }, `Audit of ${when(job.created)}`),
      h("div", { class: "row" }, waiting ? cancel : null,
        h("button", { type: "button", class: "quiet", onclick: close }, "Close"))),
    parts.state,
    h("dl", { class: "pairs" }, facts(job).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", { class: "break" }, value)))),
    h("div", { class: "progress", hidden: !waiting }, parts.progress, parts.left),
    parts.body);
  if (waiting) parts.body.append(parts.steps.element);
  return parts;
}

function facts(job) {
  const { profile: name, images, epsilons, norm, data, seed } = job.request;
  const pairs = [
    ["Profile", name],
    ["Images", `${images ?? "as many as the profile has"}, ${data ?? "generated"}`],
    ["Epsilons", `${epsilons?.join(", ") ?? "the usual ones"} in 255ths, ${norm ?? "linf"}`],
    ["Seed", `${seed ?? 0}`],
    ["Library", h("code", {}, short(job.digest))],
    ["Estimate", `${estimate(job.cost)}, ${job.cost.attacks} attacks`],
  ];
  if (job.finished && job.started) pairs.push(["Took", duration(job.finished - job.started)]);
  if (job.attempts > 1) pairs.push(["Starts", `${job.attempts}: it was interrupted and went on`]);
  return pairs;
}

// On a busy machine an audit gets only what is left of the cores.
function estimate({ seconds, seconds_now: now, cpu_share: share }) {
  const alone = `${duration(seconds)} on an idle machine`;
  return now > 1.2 * seconds ? `${duration(now)} at the ${percent(share, 0)} of the cores that were free, ${alone}` : alone;
}

async function listen(mine, parts) {
  for await (const { event, data } of events(`/admin/audits/${mine.id}/events`, mine.stop.signal)) {
    if (opened !== mine) return;
    if (event === "cost") step(parts, 0, null, data.seconds);
    if (event === "step") step(parts, data.share, data, data.seconds_left);
    if (event === "check") say(parts.left, `All attacks have ended. Checking them: ${data.name}, ${data.outcome}.`);
    if (event === "state") return;
  }
}

function step(parts, share, data, left) {
  parts.state.replaceChildren(pill("running"));
  parts.progress.value = share;
  if (share < 1) say(parts.left, `${percent(share, 0)} of the attacks done, about ${duration(left)} left.`);
  else say(parts.left, "All attacks have ended. What they found is being checked…");
  if (data === null) return;
  const row = [data.attack, data.system, `${data.epsilon}/255`, data.images, percent(data.accuracy)];
  parts.steps.body.prepend(parts.steps.row(row));
}

async function stop(id) {
  const sure = await ask("Cancel this audit?", "What it has found so far is not made into a report.", "Cancel the audit");
  if (!sure) return;
  try {
    await remove(`/admin/audits/${id}`);
    await list();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    say(by("audit-left") ?? by("audit-title"), sentence(error.message));
  }
}

async function ended(job, parts) {
  if (job.state === "done") await showReport(job, parts);
  else parts.body.replaceChildren(h("p", {}, ending(job)));
  if (jobs.find(({ id }) => id === job.id)?.state !== job.state) await list();
}

function ending({ state, why }) {
  if (state === "cancelled") return "It was cancelled before its end; there is no report.";
  if (state === "interrupted") return `It was interrupted too often to be started again. ${why ? sentence(why) : ""}`;
  return why ? `It failed: ${why}` : "It failed.";
}

// The report

async function showReport(job, parts) {
  const path = `/admin/audits/${job.id}/report`;
  const text = await getText(path);
  const view = h("iframe", { src: "/console/report.html", sandbox: "allow-same-origin", title: "Report of the audit", class: "report" });
  view.addEventListener("load", () => { view.contentDocument.documentElement.innerHTML = text; }, { once: true });
  parts.body.replaceChildren(
    h("div", { class: "row" },
      h("button", { type: "button", onclick: () => keep(path, `audit-${job.id}.html`) }, "Save as HTML"),
      h("button", { type: "button", onclick: () => keep(`${path}.json`, `audit-${job.id}.json`) }, "Save as JSON")),
    view);
}

async function keep(path, name) {
  try {
    const url = URL.createObjectURL(await getBlob(path));
    h("a", { href: url, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60000);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
  }
}

async function showComparison() {
  const place = by("comparison");
  place.hidden = false;
  place.replaceChildren(h("p", { class: "empty", id: "comparison-title" }, "Reading both reports…"));
  try {
    const pair = jobs.filter(({ id }) => marked.includes(id)).sort((a, b) => a.created - b.created);
    const reports = await Promise.all(pair.map(({ id }) => get(`/admin/audits/${id}/report.json`)));
    place.replaceChildren(
      h("div", { class: "heading" },
        h("h3", { id: "comparison-title" }, "Two audits compared"),
        h("button", { type: "button", class: "quiet", onclick: () => { place.hidden = true; } }, "Close")),
      ...compare(pair, reports));
    place.focus();
    place.scrollIntoView({ block: "nearest" });
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    place.replaceChildren(h("p", { class: "error", id: "comparison-title" }, sentence(error.message)));
  }
}
