// Signing in, the look at the server every two seconds, and what happens when it is away.

import { get, hasToken, Refused, setToken, watch } from "./api.js";
import * as audits from "./audits.js";
import { by, setText } from "./dom.js";
import * as draws from "./draws.js";
import { clock } from "./format.js";
import * as library from "./library.js";
import * as reload from "./reload.js";
import { showRobustness } from "./robustness.js";
import { banner, showAway, showState } from "./server.js";
import * as tabs from "./tabs.js";
import * as tiles from "./tiles.js";
import * as trial from "./trial.js";

const EVERY_MS = 2000;
const LATE_MS = 5000; // between attempts to reach a server that is away
const HIDDEN_MS = 15000; // between looks while the tab is in the background

let timer = null;
let lost = null; // when the server answered last, once it is away
let last = Date.now();
let digest; // of the library that is shown; undefined before any was

// Called after every answer of the API.
function afterAnswer(refused) {
  if (refused === null || refused.status !== 0) return back();
  if (lost === null) {
    lost = last;
    document.body.classList.add("away");
    showAway();
  }
  banner(`No answer from the server since ${clock(lost)}; figures are from then. Trying again every few seconds.`);
}

function back() {
  last = Date.now();
  if (lost === null) return;
  const gone = clock(lost);
  lost = null;
  document.body.classList.remove("away");
  banner(`The server is back. It was away from ${gone} to ${clock(last)}.`, "good");
  setTimeout(() => { if (lost === null) banner(""); }, 10000);
  if (!by("console").hidden) refresh();
}

// Everything that is not read every two seconds.
function refresh() {
  library.show();
  audits.refresh();
}

async function look() {
  try {
    const data = await get("/admin/overview");
    if (by("console").hidden) return;
    showState(data);
    tiles.showTiles(data);
    draws.showDraws(data.draws);
    showRobustness(data.audit, data.library?.digest ?? null);
    trial.showInput(data.library);
    audits.tick();
    if ((data.library?.digest ?? null) !== digest) {
      digest = data.library?.digest ?? null;
      library.show();
    }
    await tiles.showHistory(data.uptime_s);
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
  const pause = lost !== null ? LATE_MS : document.hidden ? HIDDEN_MS : EVERY_MS;
  clearTimeout(timer);
  timer = setTimeout(loop, pause);
}

// Signing in and out

async function signIn(event) {
  event.preventDefault();
  const token = by("token").value.trim();
  setText(by("sign-in-error"), "");
  by("token").removeAttribute("aria-invalid");
  if (!/^[\x21-\x7e]+$/.test(token)) return refuse("A token is printable characters without spaces.");
  setToken(token);
  try {
    await get("/admin/overview");
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    setToken(null);
    return refuse(error.status === 401 ? "That is not this server's admin token." : error.message);
  }
  by("token").value = "";
  enter();
  by("main").focus();
}

function refuse(text) {
  setText(by("sign-in-error"), text);
  by("token").setAttribute("aria-invalid", "true");
  by("token").select();
}

function enter() {
  show(true);
  digest = undefined;
  tiles.forget();
  tabs.show();
  loop();
}

function signOut(text = "") {
  setToken(null);
  clearTimeout(timer);
  for (const part of [audits, trial, reload]) part.forget();
  banner("");
  show(false);
  setText(by("sign-in-error"), text);
  by("token").focus();
}

function show(inside) {
  for (const id of ["console", "sections", "state", "sign-out"]) by(id).hidden = !inside;
  by("sign-in").hidden = inside;
}

function skip(event) {
  event.preventDefault(); // the hash is the tab's
  by("main").focus();
}

watch.answered = afterAnswer;
by("sign-in").addEventListener("submit", signIn);
by("sign-out").addEventListener("click", () => signOut());
by("skip").addEventListener("click", skip);
document.addEventListener("visibilitychange", () => { if (!document.hidden && timer !== null) loop(); });
for (const part of [audits, draws, reload, trial]) part.begin();
tabs.begin(hasToken);
for (const kind of ["dragover", "drop"]) {
  document.addEventListener(kind, (event) => event.preventDefault()); // a file dropped beside its place opens nothing
}
if (hasToken()) enter();
else show(false);
