// A running audit: how far, how long, the worst so far, and its attacks by the system that they attacked.

import { h, setText, Table } from "./dom.js";
import { duration, percent } from "./format.js";

const OURS = "tombola";
const STEP_HEADS = ["Attack", ...["Epsilon", "Images", "Accuracy left"].map((text) => ({ text, number: true }))];
const CHECK_HEADS = ["Check", "Outcome", "Value"];
const FINE = ["pass", "skipped"];

// job: of /admin/audits/ID.  headline: the epsilon that figures are of.  Its element shows what `take` has been given.
export class Progress {
  constructor(job, headline) {
    this.job = job;
    this.headline = headline;
    this.bar = h("progress", { max: 1, value: 0, "aria-label": "Progress of the audit" });
    this.left = h("p", { class: "fine", id: "audit-left", role: "status" },
      job.state === "queued" ? "Waiting for its turn." : "Starting: loading takes a while.");
    this.worst = h("p", { class: "worst", id: "audit-worst" });
    this.groups = h("div", { class: "groups" });
    this.element = h("div", { class: "progress" }, this.worst, this.bar, this.left, this.groups);
    this.systems = new Map();
    this.ours = []; // what each attack's images leave to the served ensemble
    this.checks = null;
  }

  take(event, data) {
    if (event === "rivals") setText(this.left, `Rivals are being chosen on ${data.images} held-out images, about ${duration(data.seconds)} on an idle machine.`);
    if (event === "cost") setText(this.left, `${data.attacks} attacks are planned, about ${duration(data.seconds)} on an idle machine.`);
    if (event === "step") this.takeStep(data);
    if (event === "check") this.takeCheck(data);
  }

  takeStep(data) {
    this.bar.value = data.share;
    setText(this.left, this.time(data));
    const group = this.systems.get(data.system) ?? this.addSystem(data.system);
    group.steps.push(data);
    group.table.body.prepend(group.table.row([data.attack, `${data.epsilon}/255`, data.images, percent(data.accuracy)]));
    const lowest = lowestOf(group.steps);
    setText(group.about, `${group.steps.length} ${group.steps.length === 1 ? "attack" : "attacks"}, ` +
      `worst ${percent(lowest.accuracy)} at ${lowest.epsilon}/255 (${lowest.attack})`);
    this.ours.push({ ...data, accuracy: data.tombola ?? (data.system === OURS ? data.accuracy : 1) });
    this.showWorst();
  }

  // By the server's clock: the browser's may differ.
  time({ share, time, seconds_left: left }) {
    const passed = time && this.job.started ? `${duration(time - this.job.started)} since the start` : null;
    const rest = share < 1 ? `about ${duration(left)} left for the attacks, at the speed so far` : "the attacks are checked now";
    return [`${percent(share, 0)} of the attacks`, passed, rest].filter(Boolean).join(" · ");
  }

  // At the figures' epsilon if it was attacked there, else at the largest.
  showWorst() {
    const sizes = this.ours.map(({ epsilon }) => epsilon);
    const epsilon = sizes.includes(this.headline) ? this.headline : Math.max(...sizes);
    const { accuracy, attack, system } = lowestOf(this.ours.filter((step) => step.epsilon === epsilon));
    const by = system === OURS ? attack : `${attack} on ${system}`;
    this.worst.replaceChildren(h("strong", {}, percent(accuracy)),
      ` left to the served ensemble at ${epsilon}/255, the worst so far, by ${by}. `,
      "The report's worst case, image by image, may be lower.");
  }

  addSystem(name) {
    const group = { steps: [], about: h("span", { class: "fine" }), table: new Table(`Attacks on ${name}`, STEP_HEADS, "steps stack") };
    const element = h("details", {}, h("summary", {}, h("strong", { class: "break" }, name), " ", group.about), group.table.element);
    if (name === OURS) this.groups.prepend(element);
    else this.groups.append(element);
    this.systems.set(name, group);
    return group;
  }

  takeCheck(data) {
    this.checks ??= this.addChecks();
    const { table, outcomes, about } = this.checks;
    outcomes.push(data.outcome);
    table.body.prepend(table.row([data.name, data.outcome, h("span", { class: "break" }, data.value)]));
    const other = outcomes.filter((outcome) => !FINE.includes(outcome)).length;
    setText(about, `${outcomes.length} have run, ${other === 0 ? "none warns" : `${other} to look at`}`);
    setText(this.left, `All attacks have ended. Checking them: ${data.name}.`);
  }

  addChecks() {
    const group = { outcomes: [], about: h("span", { class: "fine" }), table: new Table("Sanity checks", CHECK_HEADS, "steps stack") };
    this.groups.append(h("details", {}, h("summary", {}, h("strong", {}, "Checks"), " ", group.about), group.table.element));
    return group;
  }
}

const lowestOf = (steps) => steps.reduce((one, other) => (other.accuracy < one.accuracy ? other : one));
