// The admin API. The token lives in this tab: in memory, and in sessionStorage so that a reload does not need it again.
// Browsers copy sessionStorage into a tab that is duplicated, and back into one that is opened again after it was
// closed. Neither is a reload, and neither finds the token.

const KEPT = "tombola-token";
const PATIENCE_MS = 15000;

if (performance.getEntriesByType("navigation")[0]?.type !== "reload") sessionStorage.removeItem(KEPT);

let token = sessionStorage.getItem(KEPT);

export const hasToken = () => token !== null;

export function setToken(value) {
  token = value;
  if (value === null) sessionStorage.removeItem(KEPT);
  else sessionStorage.setItem(KEPT, value);
}

// status 0: nobody answered.
export class Refused extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

// What is called after every answer, with null or the Refused that came instead. app.js listens.
export const watch = { answered: () => {} };

async function send(path, { method = "GET", body = null, type = null, signal = null, patience = PATIENCE_MS } = {}) {
  const headers = { authorization: `Bearer ${token}` };
  if (type !== null) headers["content-type"] = type;
  const signals = [signal, patience === null ? null : AbortSignal.timeout(patience)].filter((one) => one !== null);
  const init = { method, headers, body, signal: AbortSignal.any(signals), cache: "no-store", credentials: "omit" };
  try {
    return await fetch(path, { ...init, redirect: "error", referrerPolicy: "no-referrer" });
  } catch (error) {
    if (signal?.aborted) throw error;
    const slow = error.name === "TimeoutError";
    throw new Refused(0, slow ? "The server did not answer in time." : "The server cannot be reached.");
  }
}

async function checked(response) {
  if (response.ok) return response;
  let reason = "";
  try {
    reason = (await response.json()).error;
  } catch { /* no JSON: a proxy may stand in between */ }
  throw new Refused(response.status, reason || `The server answered with status ${response.status}.`);
}

async function request(path, options = {}) {
  try {
    const response = await checked(await send(path, options));
    watch.answered(null);
    return response;
  } catch (error) {
    if (error instanceof Refused) watch.answered(error);
    throw error;
  }
}

export const get = async (path, options) => (await request(path, options)).json();
export const getText = async (path) => (await request(path)).text();
export const getBlob = async (path) => (await request(path)).blob();
export const post = async (path, content, options = {}) =>
  (await request(path, { ...options, method: "POST", body: JSON.stringify(content), type: "application/json" })).json();
export const sendFile = async (method, path, file, type) =>
  (await request(path, { method, body: file, type, patience: 300000 })).json();
export const remove = async (path) => (await request(path, { method: "DELETE" })).json();

// Server-sent events, each as {event, data}. EventSource cannot send a header, so the stream is read by hand.
export async function* events(path, signal) {
  const response = await request(path, { signal, patience: null });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) yield parsed(part);
  }
}

function parsed(part) {
  const lines = part.split("\n").map((line) => line.split(/: ?(.*)/s, 2));
  const all = (name) => lines.filter(([key]) => key === name).map(([, value]) => value).join("\n");
  return { event: all("event"), data: JSON.parse(all("data") || "null") };
}
