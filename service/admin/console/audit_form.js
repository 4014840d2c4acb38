// The form of a new audit, with what it costs before it starts; and uploads of labelled images.

import { get, post, Refused, sendFile } from "./api.js";
import { by, h, setText } from "./dom.js";
import { duration, percent, sentence, whole } from "./format.js";

const SETTLED_MS = 400; // after the last key, before the cost is estimated

let choices = null; // what the server offers: profiles, attacks, epsilons
let jobs = []; // for what the last audit of a profile took
let costing = null;
let estimates = 0;

// started: called with the id of an audit that was queued.
export function begin(started) {
  const form = by("audit-form");
  form.addEventListener("submit", (event) => submit(event, started));
  for (const kind of ["input", "change"]) form.addEventListener(kind, change);
  by("upload").addEventListener("change", upload);
}

// What an audit can be; read from the server once.
export async function options() {
  if (choices === null) offer(await get("/admin/profiles"));
  return choices;
}

export async function refresh() {
  if (choices === null) await options();
  else choices = await get("/admin/profiles"); // another library may be served by now, of another size
  adapt();
  await showDatasets();
  await showCost();
}

function offer(all) {
  choices = all;
  by("profiles").replaceChildren(...choices.profiles.map(profile));
  by("attacks").replaceChildren(h("legend", { class: "hidden" }, "Attacks"), ...choices.attacks.map((name) =>
    h("label", { class: "tick" }, h("input", { type: "checkbox", value: name }), name)));
  adapt();
}

function profile({ name, about, images }) {
  const id = `profile-${name}`;
  return h("div", { class: "choice" },
    h("input", { type: "radio", name: "profile", id, value: name, checked: name === "smoke" }),
    h("label", { for: id }, h("strong", {}, name), h("span", { class: "fine" }, `${about}; ${images} images`)));
}

const chosen = () => document.querySelector("input[name=profile]:checked").value;

const wanted = () => [...by("attacks").querySelectorAll("input:checked:not(:disabled)")].map(({ value }) => value);

// What goes with the profile and the norm: the number of images, the usual epsilons, and the attacks there are.
function adapt() {
  const { images, attacks } = choices.profiles.find(({ name }) => name === chosen());
  by("images").placeholder = `${images}`;
  by("epsilons").placeholder = choices.epsilons[by("norm").value].join(", ");
  for (const box of by("attacks").querySelectorAll("input")) {
    box.disabled = !attacks[by("norm").value].includes(box.value);
    box.parentElement.classList.toggle("off", box.disabled);
  }
  const some = wanted();
  setText(by("attacks-chosen"), some.length ? some.join(", ") : "all of the profile");
}

// What the last audit of the profile really took. An estimate is of the attacks alone.
export function recall(known = jobs) {
  jobs = known;
  if (choices === null) return;
  const [last] = jobs.filter(({ state, request, started, finished: end }) =>
    state === "done" && request.profile === chosen() && started && end);
  const text = last === undefined ? "" :
    `The last ${chosen()} audit here took ${duration(last.finished - last.started)}; ` +
    `its estimate was ${duration(last.cost.seconds)} on an idle machine.`;
  setText(by("experience"), text);
}

async function showDatasets() {
  const { datasets } = await get("/admin/datasets");
  const before = by("data").value;
  const entries = datasets.map(({ name, kind, uploaded }) => {
    const more = kind === "generated" ? "made by the server, for smoke alone" : `${kind}${uploaded ? ", uploaded" : ""}`;
    return h("option", { value: name }, `${name} (${more})`);
  });
  by("data").replaceChildren(...entries);
  if (datasets.some(({ name }) => name === before)) by("data").value = before;
}

// The form as the API wants it. Raises Refused where a field holds no number.
function fields() {
  const request = {
    profile: chosen(),
    data: by("data").value,
    norm: by("norm").value,
    seed: parse(by("seed").value || "0", "Seed"),
  };
  if (by("images").value.trim() !== "") request.images = parse(by("images").value, "How many");
  const epsilons = by("epsilons").value.split(/[\s,;]+/).filter((text) => text !== "");
  if (epsilons.length > 0) request.epsilons = epsilons.map((text) => parse(text, "Epsilons"));
  if (wanted().length > 0) request.attacks = wanted();
  return request;
}

function parse(text, name) {
  const value = Number(text);
  if (!Number.isFinite(value)) throw new Refused(400, `${name}: “${text}” is not a number.`);
  return value;
}

function change(event) {
  if (choices === null) return;
  adapt();
  if (event.target.name === "profile") recall();
  clearTimeout(costing);
  costing = setTimeout(showCost, SETTLED_MS);
}

async function showCost() {
  const mine = ++estimates;
  let text;
  let refused = false;
  try {
    const cost = await post("/admin/audits/cost", fields());
    text = `Estimated cost: about ${estimate(cost)}, for ${cost.attacks} attacks (${whole(cost.giga_multiply_adds)} ` +
      `giga-multiply-adds), at ε ${sizes(cost, by("norm").value)}. Loading and the checks at the end come on top.`;
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (error.status === 0) return;
    refused = true;
    text = sentence(error.message);
  }
  if (mine !== estimates) return; // another answer is on its way
  setText(by("cost"), text);
  by("cost").classList.toggle("refused", refused);
  by("start").disabled = refused;
}

// The epsilons of an estimate, and why they are not the best known ones; empty of an audit by an earlier version.
export function sizes({ epsilons = [], epsilons_about: why }, norm) {
  if (epsilons.length === 0) return "";
  return `${epsilons.join(", ")} in 255ths, ${norm}${why ? `, which are ${why}` : ""}`;
}

// On a busy machine an audit gets only what is left of the cores.
export function estimate({ seconds, seconds_now: now, cpu_share: share }) {
  const alone = `${duration(seconds)} on an idle machine`;
  return now > 1.2 * seconds ? `${duration(now)} at the ${percent(share, 0)} of the cores that were free, ${alone}` : alone;
}

async function submit(event, started) {
  event.preventDefault();
  if (choices === null) return;
  setText(by("audit-error"), "");
  by("start").disabled = true;
  try {
    const { id } = await post("/admin/audits", fields());
    await started(id);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    setText(by("audit-error"), sentence(error.message));
  } finally {
    by("start").disabled = false;
  }
}

async function upload(event) {
  const [file] = event.target.files;
  if (!file) return;
  const status = by("upload-status");
  const name = file.name.toLowerCase().replace(/[^a-z0-9._-]+/g, "-").replace(/^[^a-z0-9]+/, "");
  setText(status, `Sending ${file.name}…`);
  try {
    const kept = await sendFile("PUT", `/admin/datasets/${encodeURIComponent(name)}`, file, "application/octet-stream");
    setText(status, `Kept as ${kept.name}: ${kept.checked} images checked, ${kept.classes} classes.`);
    await showDatasets();
    by("data").value = kept.name;
    showCost();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    setText(status, sentence(error.message));
  } finally {
    event.target.value = "";
  }
}
