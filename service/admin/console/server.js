// Is the server ready, and if not, why; and what it is. While it is away, the banner alone says so.

import { by, h, setText } from "./dom.js";
import { duration, short, whole } from "./format.js";

// Planned states are amber; what needs somebody is red.
const REASONS = {
  loading: ["warn", "Not ready yet: the library is being verified and warmed up."],
  draining: ["warn", "Draining: the server is shutting down as planned. What is in flight is still answered."],
  engine: ["bad", "Not ready: the engine is not answering. Dead threads are replaced; see the server's log."],
};

export function showState(data) {
  if (data.ready) mark("good", "Ready");
  else mark(...(REASONS[data.reason] ?? ["bad", "Not ready."]));
  setText(by("facts"), facts(data).join(" · "));
}

export const showAway = () => mark("away", "Unknown while the server is away");

function mark(kind, text) {
  const state = by("state");
  state.className = `state ${kind}`;
  if (state.textContent !== text) state.replaceChildren(h("span", { class: "mark", "aria-hidden": "true" }), text);
}

function facts({ uptime_s: uptime, version, commit, engine, library }) {
  const parts = [`up ${duration(uptime)}`, `version ${version}`];
  if (commit !== "unknown") parts.push(`commit ${commit.slice(0, 8)}`);
  if (engine) parts.push(`${engine.name} on ${engine.device}, ${engine.threads} threads, ${engine.note}`);
  if (engine?.restarts > 0) parts.push(`${whole(engine.restarts)} engine restarts`);
  if (library) parts.push(`library ${short(library.digest)}`);
  return parts;
}

// In the top bar, so that it is seen wherever one has scrolled to.
export function banner(text, kind = "bad") {
  const element = by("banner");
  element.className = `banner ${kind}`;
  element.hidden = text === "";
  setText(element, text);
}
