// Traffic: figures of the last minute, and lines of the last quarter of an hour, both made in the server.

import { get } from "./api.js";
import { sparkline } from "./charts.js";
import { by, h, setText } from "./dom.js";
import { milliseconds, percent, rate, whole } from "./format.js";

const SLOW_S = 1; // p99, as the alert TombolaSlow has it

let history = null; // as /admin/history tells it
let tiles = null;

export function forget() {
  history = null;
}

const latency = (seconds) => {
  if (seconds === null) return "–";
  return seconds >= 10 ? "≥ 10 s" : milliseconds(seconds);
};
const share = (value) => (value === null ? "–" : percent(value, value > 0 && value < 0.1 ? 2 : 1));

// label, value and note of the present; line: the history's figure; warn: whether somebody should look.
const TILES = {
  rate: {
    label: "Requests per second",
    value: ({ now }) => (now.requests_per_s === null ? "–" : rate(now.requests_per_s)),
    note: ({ now }) => (now.images_per_s === null ? "" : `${rate(now.images_per_s)} images per second`),
    line: "requests_per_s",
  },
  p50: { label: "Latency p50", value: ({ now }) => latency(now.p50_s), line: "p50_s" },
  p99: {
    label: "Latency p99",
    value: ({ now }) => latency(now.p99_s),
    note: ({ now }) => (now.p99_s > SLOW_S ? "above a second" : ""),
    line: "p99_s",
    warn: ({ now }) => now.p99_s > SLOW_S,
  },
  shed: {
    label: "Turned away",
    value: ({ now }) => share(now.turned_away),
    note: ({ traffic }) => reasons(traffic.shed),
    line: "turned_away",
    warn: ({ now }) => now.turned_away > 0.01,
  },
  failed: {
    label: "Failed",
    value: ({ now }) => share(now.failed),
    note: ({ traffic }) => failures(traffic.outcomes),
    line: "failed",
    warn: ({ now }) => now.failed > 0,
  },
  queue: {
    label: "Images waiting",
    value: ({ queue }) => whole(queue.depth),
    note: ({ queue }) => `room for ${whole(queue.limit)}`,
    line: "queue_depth",
    warn: ({ queue }) => queue.depth > queue.limit / 2,
  },
};

function reasons(shed) {
  const some = Object.entries(shed).filter(([, count]) => count > 0);
  return some.length === 0 ? "" : `since start: ${some.map(([name, count]) => `${name} ${whole(count)}`).join(", ")}`;
}

function failures({ error, deadline }) {
  if (error + deadline === 0) return "";
  return `since start: ${whole(error)} errors, ${whole(deadline)} too late`;
}

function makeTiles() {
  const made = {};
  for (const [name, { label }] of Object.entries(TILES)) {
    const parts = { value: h("dd", { class: "value", id: `tile-${name}` }), note: h("dd", { class: "fine note" }) };
    parts.line = h("dd", { class: "line", "aria-hidden": "true" });
    parts.tile = h("dl", { class: "tile" }, h("dt", {}, label), parts.value, parts.line, parts.note);
    made[name] = parts;
  }
  by("tiles").replaceChildren(...Object.values(made).map(({ tile }) => tile));
  return made;
}

export function showTiles(data) {
  tiles ??= makeTiles();
  for (const [name, { value, note, warn }] of Object.entries(TILES)) {
    setText(tiles[name].value, value(data));
    setText(tiles[name].note, note?.(data) ?? "");
    tiles[name].tile.classList.toggle("warn", warn?.(data) === true);
  }
}

// What is new since the last time, or all after a reload or a restart of the server. uptime_s: the server's.
export async function showHistory(uptime_s) {
  if (history !== null && uptime_s < history.uptime_s) forget(); // another process
  const last = history?.points.at(-1)?.at_s ?? 0;
  if (history !== null && uptime_s - last < history.interval_s) return;
  const news = await get(`/admin/history?since=${last}`);
  const old = (history?.points ?? []).filter(({ at_s: at }) => at > news.uptime_s - news.keep_s);
  history = { ...news, points: [...old, ...news.points] };
  const room = news.keep_s / news.interval_s;
  tiles ??= makeTiles();
  for (const [name, { line }] of Object.entries(TILES)) {
    tiles[name].line.replaceChildren(sparkline(history.points.map((point) => point[line]), room));
  }
}
