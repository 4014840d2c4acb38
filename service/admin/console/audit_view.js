// One audit: what it was to do, how it goes, and its report.

import { events, get, getBlob, getText, Refused, remove } from "./api.js";
import { estimate, options, sizes } from "./audit_form.js";
import { Progress } from "./audit_progress.js";
import { pending, pill } from "./audit_state.js";
import { confirm, h, pairs } from "./dom.js";
import { duration, sentence, short, when } from "./format.js";

const PAUSE_MS = 3000; // before a broken stream is opened again

export class AuditView {
  // changed: called when the list may have to be read again.
  constructor(id, place, changed) {
    this.id = id;
    this.path = `/admin/audits/${encodeURIComponent(id)}`;
    this.place = place;
    this.changed = changed;
    this.body = h("div", {}); // what changes while it runs
    this.stop = new AbortController();
    place.replaceChildren(h("p", { class: "empty", id: "audit-title" }, "Opening…"));
  }

  close() {
    this.stop.abort();
  }

  get closed() {
    return this.stop.signal.aborted;
  }

  // Shows the audit until it has ended, however often the server goes away meanwhile.
  async follow() {
    while (!this.closed) {
      try {
        const job = await get(this.path);
        if (this.closed) return;
        this.frame(job);
        if (!pending(job)) return await this.showEnd(job);
        const whole = await this.listen(job);
        await this.changed();
        if (!whole) await pause();
      } catch (error) {
        if (this.closed) return;
        if (!(error instanceof Refused)) throw error;
        if (error.status !== 0 && error.status !== 503) return this.refuse(error);
        await pause();
      }
    }
  }

  refuse(error) {
    this.place.replaceChildren(this.heading("This audit cannot be shown", []),
      h("p", { class: "error" }, sentence(error.message)));
  }

  heading(title, actions) {
    return h("div", { class: "heading" }, h("h3", { id: "audit-title" }, title),
      h("div", { class: "row" }, actions, h("a", { href: "#audits" }, "All audits")));
  }

  // Everything but what changes while it runs.
  frame(job) {
    const cancel = h("button", { type: "button", id: "cancel", onclick: () => this.cancel() }, "Cancel this audit");
    const actions = pending(job) ? [cancel] : [];
    this.state = h("p", { role: "status" }, pill(job.state));
    this.place.replaceChildren(this.heading(`Audit of ${when(job.created)}`, actions), this.state,
      pairs(this.facts(job)), this.body);
  }

  facts(job) {
    const { profile, images, epsilons, norm, data, seed } = job.request;
    const rows = [
      ["Profile", profile],
      ["Images", `${images ?? "as many as the profile has"}, ${data ?? "generated"}`],
      ["Epsilons", sizes(job.cost, norm ?? "linf") || `${epsilons?.join(", ") ?? "the usual ones"} in 255ths, ${norm ?? "linf"}`],
      ["Seed", `${seed ?? 0}`],
      ["Library", h("code", {}, short(job.digest))],
      ["Estimate", `${estimate(job.cost)}, ${job.cost.attacks} attacks`],
    ];
    if (job.finished && job.started) rows.push(["Took", duration(job.finished - job.started)]);
    if (job.attempts > 1) rows.push(["Starts", `${job.attempts}: it was interrupted and went on`]);
    return rows;
  }

  // Every event from the first one on. Returns whether the stream had its end; else it broke.
  async listen(job) {
    const norm = job.request.norm ?? "linf";
    const progress = new Progress(job, job.cost.headline ?? (await options()).headline[norm]);
    if (!this.body.hasChildNodes()) this.body.append(progress.element);
    for await (const { event, data } of events(`${this.path}/events`, this.stop.signal)) {
      if (this.closed || event === "state") return true;
      if (!progress.element.isConnected) this.body.replaceChildren(progress.element);
      this.state.replaceChildren(pill("running"));
      progress.take(event, data);
    }
    return false;
  }

  async cancel() {
    const text = "What it has measured so far is not made into a report.";
    if (!(await confirm("Cancel this audit?", text, "Cancel the audit", "Let it run"))) return;
    try {
      await remove(this.path);
      await this.changed();
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      this.state.replaceChildren(sentence(error.message));
    }
  }

  async showEnd(job) {
    if (job.state === "done") await this.showReport();
    else this.body.replaceChildren(h("p", {}, ending(job)));
  }

  async showReport() {
    const text = await getText(`${this.path}/report`);
    if (this.closed) return;
    const view = h("iframe", { src: "/console/report.html", sandbox: "allow-same-origin", title: "Report of the audit", class: "report" });
    view.addEventListener("load", () => { view.contentDocument.documentElement.innerHTML = text; }, { once: true });
    const save = (path, kind) => h("button", { type: "button", onclick: () => keep(path, `audit-${this.id}.${kind}`) }, `Save as ${kind.toUpperCase()}`);
    this.body.replaceChildren(h("div", { class: "row" }, save(`${this.path}/report`, "html"), save(`${this.path}/report.json`, "json")), view);
  }
}

const pause = () => new Promise((resolve) => setTimeout(resolve, PAUSE_MS));

function ending({ state, why }) {
  if (state === "cancelled") return "It was cancelled before its end; there is no report.";
  if (state === "interrupted") return `It was interrupted too often to be started again. ${why ? sentence(why) : ""}`;
  return why ? `It failed: ${why}` : "It failed.";
}

async function keep(path, name) {
  try {
    const url = URL.createObjectURL(await getBlob(path));
    h("a", { href: url, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60000);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
  }
}
