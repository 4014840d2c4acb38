// How robust: the last audit's figure with its interval, its age, its library, and what a secret theta is worth.

import { Curve } from "./curve.js";
import { by, h, pairs } from "./dom.js";
import { age, interval, norm, percent, points, pointsInterval, short } from "./format.js";

let curve = null;
let shown = null;

// audit: of /admin/overview, or null.  digest: of the served library, or null.
export function showRobustness(audit, digest) {
  const now = Math.floor(Date.now() / 60000); // ages are in minutes
  const key = JSON.stringify([audit?.id, digest, now]);
  if (key === shown) return;
  shown = key;
  by("robust").replaceChildren(...(audit === null ? none() : words(audit, digest)));
  by("curve").hidden = audit === null || audit.result.curve.length < 2;
  if (by("curve").hidden) return;
  curve ??= new Curve(by("curve"));
  curve.show(audit.result);
}

const none = () => [
  h("p", { class: "empty" }, "No audit of this server has measured anything yet. An audit attacks the library as its ",
    "critics would; its figure then stands here."),
  h("p", {}, h("a", { href: "#audits/new", class: "button" }, "Start an audit")),
];

function words(audit, digest) {
  const { robust, epsilon, norm: name, images } = audit.result;
  const size = epsilon === null ? "under attack" : `under attack at ε = ${epsilon}/255, ${norm(name)}`;
  return [
    h("p", { class: "hero" }, h("strong", {}, percent(robust.value)), " ", h("span", {}, interval(robust))),
    h("p", {}, `still classified rightly ${size} (95 % interval, ${images} images).`),
    pairs(details(audit, digest)),
  ];
}

function details(audit, digest) {
  const { clean, ten_tries: ten, secrecy, judgement } = audit.result;
  const ended = audit.finished ?? audit.created;
  const tone = judgement?.tone ?? "neutral";
  return [
    ["Without attack", percent(clean.value)],
    ["Ten answers in a row right", percent(ten.value)],
    ["What a secret θ is worth", worth(secrecy)],
    ["Library", library(audit.digest, digest)],
    ["Measured", h("a", { href: `#audits/${audit.id}` }, `${age(Date.now() / 1000 - ended)}, profile ${audit.request.profile}`)],
    ["Measurement", h("span", { class: `pill ${tone}` }, judgement?.word ?? audit.result.verdict)],
  ];
}

// Robust accuracy with theta secret less with theta known.
function worth(secrecy) {
  if (!secrecy) return "not measured";
  const none = secrecy.low <= 0 && secrecy.high >= 0;
  return `${points(secrecy.value)} points ${pointsInterval(secrecy)}${none ? ": no difference shown" : ""}`;
}

function library(audited, served) {
  if (audited === served) return h("span", {}, h("code", {}, short(audited)), ", which is served");
  return h("span", { class: "caution" }, h("code", {}, short(audited)), ", another than the one served");
}
