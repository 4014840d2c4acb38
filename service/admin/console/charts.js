// Two small drawings. Both are decoration: the figures they show stand beside them as text.

import { svg } from "./dom.js";

const WIDTH = 120;
const HEIGHT = 28;

// values: oldest first, null where nothing is known.
export function sparkline(values, room) {
  const known = values.filter((value) => value !== null);
  const top = Math.max(...known, 0) || 1;
  const x = (index) => ((index + room - values.length) / (room - 1)) * WIDTH;
  const y = (value) => HEIGHT - 2 - (value / top) * (HEIGHT - 5);
  let path = "";
  let pen = false;
  values.forEach((value, index) => {
    if (value !== null) path += `${pen ? "L" : "M"}${x(index).toFixed(1)} ${y(value).toFixed(1)}`;
    pen = value !== null;
  });
  const view = `0 0 ${WIDTH} ${HEIGHT}`;
  return svg("svg", { class: "spark", viewBox: view, preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("line", { x1: 0, x2: WIDTH, y1: HEIGHT - 1.5, y2: HEIGHT - 1.5, class: "base" }),
    path ? svg("path", { d: path }) : null);
}

// A range from low to high, 0 to 1, with its mean.
export function range(low, mean, high) {
  const at = (value) => `${(100 * value).toFixed(2)}%`;
  return svg("svg", { class: "bar range", "aria-hidden": "true" },
    svg("rect", { width: "100%", height: "100%", class: "track" }),
    svg("rect", { x: at(low), width: at(high - low), y: "25%", height: "50%", class: "value" }),
    svg("line", { x1: at(mean), x2: at(mean), y1: 0, y2: "100%", class: "law" }));
}
