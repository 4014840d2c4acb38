// Which tab is shown: the address's hash says it, so that a tab can be linked, reloaded and gone back to.
// #live, #try, #audits, #audits/new, #audits/ID, #audits/compare/ID/ID, #library

import { by } from "./dom.js";

const TABS = ["live", "try", "audits", "library"];

const listeners = new Map();
let current = null;

// show: called with the rest of the hash whenever the tab is shown, and its hash changes.
export const onTab = (name, show) => listeners.set(name, show);

export const go = (hash) => { location.hash = hash; };

function route() {
  const [name, ...rest] = location.hash.slice(1).split("/").map(decode);
  return TABS.includes(name) ? { name, rest } : { name: "live", rest: [] };
}

// A hash that somebody wrote may be no valid text.
function decode(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return "";
  }
}

export function show() {
  const { name, rest } = route();
  for (const tab of TABS) by(tab).hidden = tab !== name;
  for (const link of by("sections").querySelectorAll("a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${by(`${name}-title`).textContent} · Tombola`;
  if (name !== current) window.scrollTo(0, 0);
  current = name;
  listeners.get(name)?.(rest);
}

export function begin(isInside) {
  window.addEventListener("hashchange", () => { if (isInside()) show(); });
}
