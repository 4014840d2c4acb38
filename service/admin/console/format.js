// Numbers, times and digests in words.

const grouped = new Intl.NumberFormat("en-GB");

export const whole = (value) => grouped.format(Math.round(value));
export const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;
export const number = (share) => (100 * share).toFixed(1);
export const interval = ({ low, high }) => `[${number(low)}, ${number(high)}]`;
export const short = (digest) => digest.slice(0, 12);
export const clock = (time) => new Date(time).toLocaleTimeString("en-GB");
export const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

// A difference of two shares, in points with its sign.
export const points = (share) => `${share < 0 ? "−" : "+"}${Math.abs(100 * share).toFixed(1)}`;
export const pointsInterval = ({ low, high }) => `[${points(low)}, ${points(high)}]`;

export const when = (seconds) => {
  const date = new Date(seconds * 1000);
  return `${date.toLocaleDateString("en-GB", { day: "numeric", month: "short" })}, ${clock(date)}`;
};

export function rate(perSecond) {
  if (perSecond === 0) return "0";
  return perSecond < 10 ? perSecond.toFixed(1) : whole(perSecond);
}

export function milliseconds(seconds) {
  const ms = seconds * 1000;
  if (ms >= 1000) return `${seconds.toFixed(1)} s`;
  return `${ms < 10 ? ms.toFixed(1) : ms.toFixed(0)} ms`;
}

export function duration(seconds) {
  if (seconds < 90) return `${Math.max(0, Math.round(seconds))} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 48 * 3600) return `${(seconds / 3600).toFixed(1)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

export const age = (seconds) => (seconds < 90 ? "just now" : `${duration(seconds)} ago`);

export const norm = (name) => ({ linf: "ℓ∞", l2: "ℓ2" })[name] ?? name;

// What becomes of a picture of another size.
export function resizing({ width, height, resize, interpolation }) {
  const how = { squash: "stretched", cover: "cut to the centre", contain: "shown whole, on white" }[resize];
  return `${width} × ${height} pixels; others are ${how} (${interpolation})`;
}
