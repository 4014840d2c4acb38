// The state at a glance: counters as the server tells them, made rates here.

import { bar, sparkline } from "./charts.js";
import { by, duration, h, milliseconds, percent, rate, say, short, whole } from "./dom.js";

export const EVERY_MS = 2000;
const KEEP = 150; // samples: five minutes
const WINDOW_S = 60; // figures are of the last minute
const POINT_S = 10; // a point of a line is of this long
const ODD = 6; // standard deviations, as the alert on draws has it

const REASONS = {
  loading: "Not ready: the library is being verified and warmed up.",
  draining: "Not ready: the server is shutting down. What is in flight is still answered.",
  engine: "Not ready: the engine is not answering. Dead threads are replaced; see the server's log.",
};

let samples = []; // {at, data, point}
let tiles = null;

export function forget() {
  samples = [];
}

export function show(data) {
  if (samples.length > 0 && data.uptime_s < samples.at(-1).at) samples = []; // another process
  const sample = { at: data.uptime_s, data };
  samples.push(sample);
  samples = samples.slice(-KEEP);
  sample.point = figures(since(POINT_S), sample);
  showState(data);
  showTiles(figures(since(WINDOW_S), sample), data);
  showDraws(data.draws);
}

// The oldest sample that is at most so old, but never the newest.
function since(seconds) {
  const newest = samples.at(-1).at;
  return samples.slice(0, -1).find((sample) => newest - sample.at <= seconds + 1) ?? samples.at(-2) ?? null;
}

const sum = (object) => Object.values(object).reduce((total, value) => total + value, 0);
const received = ({ traffic }) => sum(traffic.outcomes) + traffic.shed.inflight;
const shed = ({ traffic }) => traffic.outcomes.shed + traffic.shed.inflight;
const failed = ({ traffic }) => traffic.outcomes.error + traffic.outcomes.deadline;

// What happened between two samples; null where nothing can be said.
function figures(from, to) {
  if (from === null) return { seconds: 0, rate: null, p50: null, p99: null, shed: null, failed: null, images: null };
  const seconds = to.at - from.at;
  const change = (count) => count(to.data) - count(from.data);
  const requests = change(received);
  const answered = to.data.traffic.latency.counts.map((count, i) => count - from.data.traffic.latency.counts[i]);
  const share = (count) => (requests > 0 ? change(count) / requests : null);
  return {
    seconds,
    requests,
    rate: requests / seconds,
    images: change(({ traffic }) => traffic.images) / seconds,
    p50: quantile(0.5, answered, to.data.traffic.latency.bounds),
    p99: quantile(0.99, answered, to.data.traffic.latency.bounds),
    shed: share(shed),
    failed: share(failed),
  };
}

// Of a cumulative histogram, straight lines inside a bucket.
function quantile(q, counts, bounds) {
  const total = counts.at(-1);
  if (total <= 0) return null;
  const wanted = q * total;
  const place = counts.findIndex((count) => count >= wanted);
  if (place >= bounds.length) return Infinity;
  const [below, low] = place === 0 ? [0, 0] : [counts[place - 1], bounds[place - 1]];
  return low + ((bounds[place] - low) * (wanted - below)) / (counts[place] - below);
}

export const away = () => mark("bad", "Unknown: the server does not answer.");

function mark(kind, text) {
  const state = by("state");
  state.className = `state ${kind}`;
  if (state.textContent !== text) state.replaceChildren(h("span", { class: "mark", "aria-hidden": "true" }), text);
}

function showState(data) {
  if (data.ready) mark("good", "Ready: every image gets a fresh ensemble.");
  else mark("bad", REASONS[data.reason] ?? "Not ready.");
  const parts = [`up ${duration(data.uptime_s)}`, `version ${data.version}`];
  if (data.commit !== "unknown") parts.push(`commit ${data.commit.slice(0, 8)}`);
  if (data.engine) parts.push(`${data.engine.name} on ${data.engine.device}, ${data.engine.threads} threads`);
  if (data.engine?.restarts > 0) parts.push(`${whole(data.engine.restarts)} engine restarts`);
  if (data.library) parts.push(`library ${short(data.library.digest)}`);
  say(by("facts"), parts.join(" · "));
}

const latency = (seconds, bounds) => {
  if (seconds === null) return "–";
  return seconds === Infinity ? `> ${bounds.at(-1)} s` : milliseconds(seconds);
};
const share = (value) => (value === null ? "–" : percent(value, value > 0 && value < 0.1 ? 2 : 1));

// name: label, figure and note, and which figure of each point its line shows.
const TILES = {
  rate: {
    label: "Requests per second",
    value: (now) => (now.rate === null ? "…" : rate(now.rate)),
    note: (now) => {
      if (now.images === null) return "measuring";
      const tried = now.requests === 0 && now.images > 0; // what is tried here is no request of a client
      return `${rate(now.images)} images per second${tried ? ", tried in a console" : ""}`;
    },
    point: ({ point }) => point.rate,
  },
  p50: {
    label: "Latency p50",
    value: (now, data) => latency(now.p50, data.traffic.latency.bounds),
    note: (now) => (now.p50 === null ? "none answered in the last minute" : "half were faster, last minute"),
    point: ({ point }) => finite(point.p50),
  },
  p99: {
    label: "Latency p99",
    value: (now, data) => latency(now.p99, data.traffic.latency.bounds),
    note: (now) => (now.p99 === null ? "none answered in the last minute" : "99 % were faster, last minute"),
    point: ({ point }) => finite(point.p99),
  },
  shed: {
    label: "Turned away",
    value: (now) => share(now.shed),
    note: (_, data) => reasons(data.traffic),
    point: ({ point }) => point.shed,
    warn: (now) => now.shed > 0.01,
  },
  failed: {
    label: "Failed",
    value: (now) => share(now.failed),
    note: (_, { traffic }) =>
      `since start: ${whole(traffic.outcomes.error)} errors, ${whole(traffic.outcomes.deadline)} too late; ` +
      `${whole(traffic.outcomes.invalid)} were invalid`,
    point: ({ point }) => point.failed,
    warn: (now) => now.failed > 0,
  },
  queue: {
    label: "Images waiting",
    value: (_, data) => whole(data.queue.depth),
    note: (_, { queue }) => `room for ${whole(queue.limit)}; ${whole(queue.in_flight)} requests in progress`,
    point: ({ data }) => data.queue.depth,
    warn: (_, data) => data.queue.depth > data.queue.limit / 2,
  },
};

const finite = (value) => (value === Infinity ? null : value);

function reasons({ shed }) {
  const some = Object.entries(shed).filter(([, count]) => count > 0);
  if (some.length === 0) return "none since start";
  return `since start: ${some.map(([name, count]) => `${name} ${whole(count)}`).join(", ")}`;
}

function makeTiles() {
  const made = {};
  for (const [name, { label }] of Object.entries(TILES)) {
    const parts = { value: h("dd", { class: "value", id: `tile-${name}` }), note: h("dd", { class: "fine" }) };
    parts.line = h("dd", { class: "line", "aria-hidden": "true" });
    parts.tile = h("dl", { class: "tile" }, h("dt", {}, label), parts.value, parts.line, parts.note);
    made[name] = parts;
  }
  by("tiles").replaceChildren(...Object.values(made).map(({ tile }) => tile));
  return made;
}

function showTiles(now, data) {
  tiles ??= makeTiles();
  for (const [name, { value, note, point, warn }] of Object.entries(TILES)) {
    const parts = tiles[name];
    say(parts.value, value(now, data));
    say(parts.note, note(now, data));
    parts.tile.classList.toggle("warn", warn?.(now, data) === true);
    parts.line.replaceChildren(sparkline(samples.map(point), KEEP));
  }
}

// Draws

function showDraws(draws) {
  const place = by("draws");
  if (draws === null) {
    place.replaceChildren(h("p", { class: "empty" }, "No library is loaded yet."));
    return;
  }
  const { rows, about } = recent(draws);
  say(by("draws-about"), about);
  say(by("draws-verdict"), verdict(rows, draws.lot));
  by("draws-verdict").classList.toggle("bad", oddest(rows).far > ODD);
  place.replaceChildren(...structures(rows));
}

// Of the samples kept, if enough was published meanwhile; else of all since the start.
function recent(draws) {
  const images = (rows) => (rows.length ? rows[0].expected / rows[0].probability : 0);
  const before = samples.find(({ data }) => data.draws !== null && data.library.digest === samples.at(-1).data.library?.digest);
  const rows = draws.tickets.map((row, index) => {
    const old = before.data.draws.tickets[index];
    return { ...row, drawn: row.drawn - old.drawn, expected: row.expected - old.expected };
  });
  if (images(rows) >= draws.lot * 8) {
    return { rows, about: `${whole(images(rows))} images in the last ${duration(samples.at(-1).at - before.at)}` };
  }
  return { rows: draws.tickets, about: `${whole(images(draws.tickets))} images since the server started` };
}

// Each count is binomial: in how many standard deviations is the oddest off?
function oddest(rows) {
  const off = rows.map((row) => {
    const spread = Math.sqrt(row.expected * (1 - row.probability));
    return { ...row, far: spread > 0 ? Math.abs(row.drawn - row.expected) / spread : 0 };
  });
  return off.reduce((worst, row) => (row.far > worst.far ? row : worst), { far: 0 });
}

function verdict(rows, lot) {
  if (total(rows, "expected") === 0) return `Nothing to compare yet: draws are published ${lot} images at a time.`;
  const worst = oddest(rows);
  if (worst.far <= ODD) return "As the law has it: every difference is within chance.";
  return `Off the law: ${worst.structure} at ${percent(worst.density, 0)} was drawn ${whole(worst.drawn)} times, ` +
    `expected ${whole(worst.expected)}. Chance hardly ever does that: the runbook says what to look at (TombolaDrawsDeviate).`;
}

const total = (rows, name) => rows.reduce((some, row) => some + row[name], 0);

function structures(rows) {
  const all = { drawn: total(rows, "drawn") || 1, law: total(rows, "probability") };
  const groups = Map.groupBy(rows, (row) => row.structure);
  const parts = rows.map((row) => ({ ...row, share: row.drawn / all.drawn, law: row.probability / all.law }));
  const top = Math.max(...parts.map(({ share, law }) => Math.max(share, law))) * 1.1;
  return [...groups].map(([name, some]) => {
    const mine = parts.filter(({ structure }) => structure === name);
    const lines = mine.sort((a, b) => a.density - b.density).map((row) => line(`${percent(row.density, 0)} kept`, row, top));
    const together = { share: total(some, "drawn") / all.drawn, law: total(some, "probability") / all.law };
    return h("table", { class: "law-table" },
      h("caption", {}, name),
      h("thead", { class: "hidden" }, h("tr", {}, ["density", "bar", "share", "law"].map((text) => h("th", { scope: "col" }, text)))),
      h("tbody", {}, line("together", together, 1, "together"), lines));
  });
}

function line(name, { share, law }, top, kind = null) {
  return h("tr", { class: kind },
    h("th", { scope: "row" }, name),
    h("td", { class: "wide" }, bar(share, law, top)),
    h("td", { class: "number" }, percent(share)),
    h("td", { class: "number fine" }, percent(law)));
}
