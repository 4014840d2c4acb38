// Signing in, asking for the state every two seconds, and what happens when nobody answers.

import { get, hasToken, Refused, setToken, watch } from "./api.js";
import * as audits from "./audits.js";
import { by, clock, say } from "./dom.js";
import * as library from "./library.js";
import * as live from "./live.js";
import * as trial from "./trial.js";

const LATE_MS = 5000; // between attempts to reach a server that is away
const HIDDEN_MS = 15000; // between looks while the tab is in the background

let timer = null;
let lost = null; // when the server was last heard of, once it is away
let heard = Date.now();
let digest; // of the library that is shown; undefined before any was asked for

// In the top bar, so that it is seen wherever one has scrolled to.
function banner(text, kind = "bad") {
  const element = by("banner");
  element.className = `banner ${kind}`;
  element.hidden = text === "";
  say(element, text);
}

// Told about every answer of the API.
function answered(refused) {
  if (refused === null || refused.status !== 0) return back();
  if (lost === null) {
    lost = heard;
    document.body.classList.add("away");
    live.away();
  }
  banner(`No answer from the server since ${clock(lost)}; figures are from then. Trying again every few seconds.`);
}

function back() {
  heard = Date.now();
  if (lost === null) return;
  const gone = clock(lost);
  lost = null;
  document.body.classList.remove("away");
  banner(`The server is back. It was away from ${gone} to ${clock(heard)}.`, "good");
  setTimeout(() => { if (lost === null) banner(""); }, 10000);
  if (!by("console").hidden) refresh();
}

// Everything that is not asked for every two seconds.
function refresh() {
  library.show();
  audits.refresh();
}

async function look() {
  try {
    const data = await get("/admin/overview");
    if (by("console").hidden) return;
    live.show(data);
    audits.tick();
    if ((data.library?.digest ?? null) !== digest) {
      digest = data.library?.digest ?? null;
      library.show();
    }
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (error.status === 401) signOut("The token is no longer accepted. Sign in again.");
    else if (error.status !== 0) banner(error.message);
  }
}

async function loop() {
  clearTimeout(timer);
  timer = null;
  await look();
  if (!hasToken()) return;
  const pause = lost !== null ? LATE_MS : document.hidden ? HIDDEN_MS : live.EVERY_MS;
  clearTimeout(timer);
  timer = setTimeout(loop, pause);
}

// Signing in and out

async function signIn(event) {
  event.preventDefault();
  const given = by("token").value.trim();
  say(by("sign-in-error"), "");
  by("token").removeAttribute("aria-invalid");
  if (!/^[\x21-\x7e]+$/.test(given)) return wrong("A token is printable characters without spaces.");
  setToken(given);
  try {
    await get("/admin/overview");
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    setToken(null);
    return wrong(error.status === 401 ? "That is not this server's admin token." : error.message);
  }
  by("token").value = "";
  enter();
  by("main").focus();
}

function wrong(text) {
  say(by("sign-in-error"), text);
  by("token").setAttribute("aria-invalid", "true");
  by("token").select();
}

function enter() {
  show(true);
  digest = undefined;
  live.forget();
  audits.enter();
  loop();
}

function signOut(text = "") {
  setToken(null);
  clearTimeout(timer);
  audits.leave();
  trial.forget();
  banner("");
  show(false);
  say(by("sign-in-error"), text);
  by("token").focus();
}

function show(inside) {
  for (const id of ["console", "sections", "sign-out"]) by(id).hidden = !inside;
  by("sign-in").hidden = inside;
}

watch.answered = answered;
by("sign-in").addEventListener("submit", signIn);
by("sign-out").addEventListener("click", () => signOut());
document.addEventListener("visibilitychange", () => { if (!document.hidden && timer !== null) loop(); });
for (const part of [library, trial, audits]) part.begin();
for (const kind of ["dragover", "drop"]) {
  document.addEventListener(kind, (event) => event.preventDefault()); // a file dropped beside its place opens nothing
}
if (hasToken()) enter();
else show(false);
