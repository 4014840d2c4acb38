// Accuracy against epsilon, with its 95 % interval: the one chart that uPlot draws.

import uPlot from "./uPlot.esm.js";
import { h, setText, table } from "./dom.js";
import { interval, percent } from "./format.js";

const HEIGHT = 170;
const dark = matchMedia("(prefers-color-scheme: dark)");

// A chart that follows its place's width and the page's colours.
export class Curve {
  constructor(place) {
    this.place = place;
    this.plot = null;
    this.points = null;
    new ResizeObserver(() => this.resize()).observe(place);
    dark.addEventListener("change", () => { if (this.points !== null) this.draw(); });
  }

  // result: of an audit: its curve, and the epsilon and number of images that its figure is of.
  show({ curve, epsilon, images }) {
    this.points = [...curve].sort((a, b) => a.epsilon - b.epsilon);
    this.headline = epsilon;
    this.images = images;
    this.draw();
  }

  draw() {
    this.plot?.destroy();
    this.note = h("p", { class: "fine", "aria-hidden": "true" });
    this.canvas = h("div", { class: "canvas", "aria-hidden": "true" });
    this.place.replaceChildren(this.canvas, this.note, this.numbers());
    const column = (name) => this.points.map((point) => point[name]);
    const data = [column("epsilon"), column("value"), column("high"), column("low")];
    this.plot = new uPlot(this.options(), data, this.canvas);
    this.say(null);
  }

  // For those who do not see the canvas.
  numbers() {
    const heads = ["Epsilon", "Accuracy", "95 % interval"];
    const rows = this.points.map((point) => [`${point.epsilon}/255`, percent(point.value), interval(point)]);
    return h("div", { class: "hidden" }, table("Accuracy against epsilon", heads, rows, "numbers"));
  }

  resize() {
    if (this.place.clientWidth > 0) this.plot?.setSize({ width: this.place.clientWidth, height: HEIGHT });
  }

  say(index) {
    if (index === null || index === undefined) return setText(this.note, this.conditions());
    const point = this.points[index];
    setText(this.note, `ε = ${point.epsilon}/255: ${percent(point.value)} ${interval(point)}, ${point.images} images.`);
  }

  conditions() {
    const { images } = this.points.at(-1);
    const fewer = images === this.images ? `${images} images` : `${images} of the ${this.images} images`;
    return `Band: 95 % interval, on ${fewer}. The dot is at the figure's ε.`;
  }

  options() {
    const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
    const top = Math.min(1, Math.ceil(10 * Math.max(...this.points.map(({ high }) => high))) / 10);
    const axis = { stroke: colour("soft"), font: "12px system-ui, sans-serif", ticks: { show: false } };
    const edge = { stroke: "transparent", points: { show: false } };
    return {
      width: Math.max(200, this.place.clientWidth),
      height: HEIGHT,
      legend: { show: false },
      padding: [8, 12, 0, 0],
      cursor: { y: false, drag: { x: false, y: false } },
      scales: { x: { time: false }, y: { range: [0, top] } },
      axes: [
        { ...axis, grid: { show: false }, values: (_, splits) => splits.map((value) => `${value}`), label: "ε, in 255ths", labelSize: 18, labelFont: axis.font, size: 28 },
        { ...axis, grid: { stroke: colour("line"), width: 1 }, values: (_, splits) => splits.map((value) => `${Math.round(100 * value)} %`), size: 48 },
      ],
      bands: [{ series: [2, 3], fill: `${colour("accent")}2e` }],
      series: [
        {},
        { stroke: colour("accent"), width: 2, points: { show: true, size: 9, filter: (_, __, show) => (show ? this.headlines() : null), fill: colour("accent") } },
        edge,
        edge,
      ],
      hooks: { setCursor: [(plot) => this.say(plot.cursor.idx)] },
    };
  }

  headlines() {
    const index = this.points.findIndex(({ epsilon }) => epsilon === this.headline);
    return index < 0 ? [] : [index];
  }
}
