// Another library takes the place of the one that is served: first a dry run that shows what would change, then the
// confirmation, which serves exactly the library that was shown.

import { post, Refused } from "./api.js";
import { by, h, pairs, setText, table } from "./dom.js";
import { interval, percent, points, short } from "./format.js";
import { show as showLibrary } from "./library.js";

const PATIENCE = { patience: 600000 };
const WORDS = { added: "new", removed: "goes", weights: "other weights", claims: "other claims", entry: "other origin" };
const METRICS = { clean: "clean", pgd: "under attack" };

async function compare() {
  await work("Opening and verifying the configured library…", async () => {
    const difference = await post("/admin/library/diff", {}, PATIENCE);
    setText(by("reload-status"), "");
    by("dry-run").replaceChildren(...dryRun(difference));
    by("dry-run").hidden = false;
    by("dry-run").focus();
  });
}

async function serve(digest) {
  close();
  await work("Reading, verifying and warming up beside the present one. Requests are answered throughout…", async () => {
    const { before } = await post(`/admin/library?digest=${digest}`, {}, PATIENCE);
    setText(by("reload-status"), `Now serving ${short(digest)}; before it was ${short(before)}.`);
    await showLibrary();
  });
}

async function work(text, act) {
  by("reload").disabled = true;
  setText(by("reload-status"), text);
  try {
    await act();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    setText(by("reload-status"), error.message);
  } finally {
    by("reload").disabled = false;
  }
}

function close() {
  by("dry-run").hidden = true;
  by("dry-run").replaceChildren();
}

function dryRun(difference) {
  const { source, before, after, tickets, unchanged, shared } = difference;
  const same = before === after;
  const count = (name) => tickets.filter(({ difference: kind }) => kind === name).length;
  const changed = tickets.length - count("added") - count("removed");
  const cancel = h("button", { type: "button", onclick: () => { close(); by("reload").focus(); } }, same ? "Close" : "Cancel");
  const serving = h("button", { type: "button", class: "primary", id: "serve", onclick: () => serve(after) }, `Serve ${short(after)}`);
  return [
    h("h3", { id: "dry-run-title" }, same ? "Nothing would change" : "What would change"),
    pairs([
      ["Configured library", h("span", { class: "break" }, source)],
      ["Digest", h("span", {}, h("code", {}, short(before)), " → ", h("code", {}, short(after)), same ? ", the same" : "")],
      ["Tickets", `${count("added")} new, ${count("removed")} go, ${changed} changed, ${unchanged} as they are`],
      ...(shared.length === 0 ? [] : [["Also different", h("span", { class: "caution" }, shared.join(", "))]]),
    ]),
    tickets.length === 0 ? null : table("Tickets that differ", ["Ticket", "Change", "SHA-256", "Claims"], tickets.map(row), "differences stack"),
    h("div", { class: "row end" }, cancel, same ? null : serving),
  ].filter((part) => part !== null);
}

function row({ name, difference, before, after, claims }) {
  const digests = [before, after].filter((digest, index, both) => digest !== null && both.indexOf(digest) === index);
  return [
    h("strong", { class: "break" }, name),
    h("span", { class: `pill ${difference}` }, WORDS[difference]),
    h("code", {}, digests.map(short).join(" → ")),
    claims.length === 0 ? "as they are" : h("ul", {}, claims.map((claim) => h("li", {}, words(claim)))),
  ];
}

function words({ metric, split, before, after, comparable }) {
  const name = `${METRICS[metric]}${split === "test" ? "" : " (selection)"}`;
  if (before === null || after === null) {
    const one = before ?? after;
    return `${name} ${percent(one.value)} ${interval(one)}`;
  }
  const change = comparable ? `, ${points(after.value - before.value)} points` : "; under other conditions";
  return `${name} ${percent(before.value)} → ${percent(after.value)}${change}`;
}

export function begin() {
  by("reload").addEventListener("click", compare);
}

export function forget() {
  close();
  setText(by("reload-status"), "");
}
