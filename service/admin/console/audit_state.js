// The states of an audit.

import { h } from "./dom.js";

const PENDING = ["queued", "running"];
const WORDS = { queued: "waiting" };

export const pending = ({ state }) => PENDING.includes(state);
export const pill = (state) => h("span", { class: `pill ${state}` }, WORDS[state] ?? state);
