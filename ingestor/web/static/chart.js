/** A chart of the last hour as SVG. A probe reads out single points, by pointer or keyboard. */

import { makeSvg, setAttribute, setText } from "./dom.js";
import { instant, lasting } from "./format.js";

const HEIGHT = 190;
const TOP = 10;
const BOTTOM = 26;
const DIGIT = 7.2; // pixels
const MINUTE_MS = 60_000;

/**
 * The contents of a chart.
 * @typedef {object} Spec
 * @property {string} name
 * @property {(history: object) => (number|null)[]} line the values of the line
 * @property {(history: object) => [number, number][]|null} band start and end of each column behind the line
 * @property {(values: number[]) => {low: number, high: number, ticks: number[], place: (value: number) => number}} scale
 * @property {(value: number) => string} label on the axis
 * @property {(history: object, index: number) => string} say the text of a point
 * @property {string} missing the meaning of a point without a value
 * @property {(values: number[], history: object) => string} summary of all known values
 */

export class Chart {
  #spec;
  #svg;
  #probe;
  #readout;
  #history = null;
  #zone = null;
  #width = 0;
  #drawn = "";
  #area = null;
  #at = null; // the moment of the point that is read out
  #cursor = null;

  /** @param {HTMLElement} figure  @param {Spec} spec */
  constructor(figure, spec) {
    this.#spec = spec;
    this.#svg = figure.querySelector("svg");
    this.#readout = figure.querySelector(".readout");
    this.#probe = figure.querySelector(".probe");
    this.#prepareProbe();
    new ResizeObserver(([entry]) => {
      this.#width = Math.round(entry.contentRect.width);
      this.#draw();
    }).observe(figure.querySelector(".plot"));
  }

  show(history, zone) {
    this.#history = history;
    this.#zone = zone;
    this.#draw();
  }

  #draw() {
    const { until, ticks } = this.#history ?? {};
    if (!until || this.#width < 80) return;
    const key = `${until} ${this.#width} ${this.#zone.name} ${ticks.length}`;
    if (key === this.#drawn) return;
    this.#drawn = key;
    const line = this.#spec.line(this.#history);
    const band = this.#spec.band(this.#history);
    const known = line.filter((value) => value != null);
    const scale = this.#spec.scale([...known, ...band.filter(Boolean).flat()]);
    this.#area = this.#layOut(line, scale);
    this.#cursor = makeSvg("path", { class: "cursor", d: "" });
    setAttribute(this.#svg, "viewBox", `0 0 ${this.#width} ${HEIGHT}`);
    this.#svg.replaceChildren(
      ...this.#beforeStart(line), ...this.#rows(scale), ...this.#hours(),
      makeSvg("path", { class: "band", d: this.#bandPath(band) }),
      makeSvg("path", { class: "line", d: this.#linePath(line) }),
      this.#cursor,
    );
    setAttribute(this.#svg, "aria-label", this.#described(line, known));
    this.#read();
  }

  #layOut(line, scale) {
    const left = Math.ceil(10 + DIGIT * Math.max(...scale.ticks.map((tick) => this.#spec.label(tick).length)));
    const right = this.#width - 6;
    const end = instant(this.#history.until);
    const start = end - 1000 * this.#history.step * line.length;
    const column = (right - left) / line.length;
    const y = (value) => TOP + (1 - scale.place(value)) * (HEIGHT - TOP - BOTTOM);
    return { left, right, start, end, column, y, x: (index) => left + column * index };
  }

  /** Shade the time before the daemon's start. */
  #beforeStart(line) {
    const { left, column } = this.#area;
    const first = line.findIndex((value) => value != null);
    const begun = this.#history.ticks.findIndex((value) => value != null);
    const width = column * (begun < 0 ? line.length : begun);
    if (first === 0 || width < 1) return [];
    const place = { x: left, y: TOP, width: width.toFixed(1), height: HEIGHT - TOP - BOTTOM };
    const ground = makeSvg("rect", { class: "before", ...place });
    if (width < 150) return [ground];
    const words = begun < 0 ? "nothing yet: a point is ten seconds" : "before the start";
    const middle = { x: (left + width / 2).toFixed(1), y: TOP + (HEIGHT - TOP - BOTTOM) / 2 };
    return [ground, makeSvg("text", { class: "middle", ...middle }, words)];
  }

  #rows(scale) {
    const { left, right, y } = this.#area;
    return scale.ticks.flatMap((tick) => {
      const at = y(tick).toFixed(1);
      return [
        makeSvg("path", { class: "grid", d: `M${left} ${at}H${right}` }),
        makeSvg("text", { class: "end", x: left - 6, y: Number(at) + 4 }, this.#spec.label(tick)),
      ];
    });
  }

  #hours() {
    const { left, right, start, end } = this.#area;
    const every = (right - left < 420 ? 15 : 10) * MINUTE_MS;
    const found = [];
    for (let at = Math.ceil(start / every) * every; at <= end; at += every) {
      const x = left + ((at - start) / (end - start)) * (right - left);
      const reach = DIGIT * 2.5;
      found.push(makeSvg("path", { class: "grid tick", d: `M${x.toFixed(1)} ${HEIGHT - BOTTOM}v4` }));
      if (x + reach > this.#width || x - reach < 0) continue;
      found.push(makeSvg("text", { class: "middle", x: x.toFixed(1), y: HEIGHT - 7 }, this.#zone.minute(at)));
    }
    return found;
  }

  /** Separate columns, so that an unknown value does not change its neighbours. */
  #bandPath(band) {
    const { x, y, column } = this.#area;
    const [width, back] = [column.toFixed(2), (-column).toFixed(2)];
    const one = (index, low, high) => `M${x(index).toFixed(1)} ${y(high).toFixed(1)}h${width}V${y(low).toFixed(1)}h${back}Z`;
    return band.map((span, index) => (span ? one(index, ...span) : "")).join("");
  }

  /** A line through neighbours; a value between two unknown ones is a dot, drawn by round line ends. */
  #linePath(line) {
    const { x, y, column } = this.#area;
    return line
      .map((value, index) => {
        if (value == null) return "";
        const place = `${(x(index) + column / 2).toFixed(1)} ${y(value).toFixed(1)}`;
        return (line[index - 1] ?? null) === null ? `M${place}h0` : `L${place}`;
      })
      .join("");
  }

  #described(line, known) {
    const { name, summary, missing } = this.#spec;
    if (!known.length) return `${name}, last hour: ${missing}`;
    const unknown = lasting(1000 * this.#history.step * (line.length - known.length));
    const rest = known.length < line.length ? `; ${missing} for ${unknown}` : "";
    return `${name}, last hour: ${summary(known, this.#history)}${rest}`;
  }

  #prepareProbe() {
    const probe = this.#probe;
    const fixed = { role: "slider", tabindex: 0, "aria-label": `${this.#spec.name}, one point`, "aria-valuemin": 1 };
    for (const [name, value] of Object.entries({ ...fixed, "aria-valuemax": 360, "aria-valuenow": 360 })) {
      setAttribute(probe, name, value);
    }
    probe.addEventListener("pointermove", (event) => this.#point(event));
    probe.addEventListener("pointerdown", (event) => this.#point(event));
    probe.addEventListener("pointerleave", () => this.#go(null));
    probe.addEventListener("focus", () => probe.matches(":focus-visible") && this.#go(this.#last));
    probe.addEventListener("blur", () => this.#go(null));
    probe.addEventListener("keydown", (event) => this.#press(event));
  }

  get #last() {
    return (this.#history?.ticks.length ?? 1) - 1;
  }

  get #index() {
    if (this.#at === null || !this.#area) return null;
    return Math.floor((this.#at - this.#area.start) / (1000 * this.#history.step));
  }

  #point(event) {
    if (!this.#area) return;
    const x = event.clientX - this.#probe.getBoundingClientRect().left;
    this.#go(Math.floor((x - this.#area.left) / this.#area.column));
  }

  #press(event) {
    const at = this.#index ?? this.#last;
    const steps = { ArrowLeft: at - 1, ArrowRight: at + 1, ArrowDown: at - 1, ArrowUp: at + 1, PageDown: at - 30,
      PageUp: at + 30, Home: 0, End: this.#last, Escape: null };
    if (!(event.key in steps) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.#go(steps[event.key]);
  }

  /** Read out another point; null reads out none. */
  #go(index) {
    if (!this.#area) return;
    const step = 1000 * this.#history.step;
    this.#at = index === null ? null : this.#area.start + (Math.min(this.#last, Math.max(0, index)) + 0.5) * step;
    this.#read();
  }

  #read() {
    const index = this.#index;
    if (index === null || index < 0) return this.#rest();
    const { x, column, start } = this.#area;
    const words = `${this.#zone.second(start + index * 1000 * this.#history.step)}: ${this.#words(index)}`;
    const middle = (x(index) + column / 2).toFixed(1);
    setAttribute(this.#cursor, "d", `M${middle} ${TOP}V${HEIGHT - BOTTOM}`);
    setText(this.#readout, words);
    setAttribute(this.#probe, "aria-valuenow", index + 1);
    setAttribute(this.#probe, "aria-valuetext", words);
  }

  #rest() {
    const known = this.#spec.line(this.#history).filter((value) => value != null);
    setAttribute(this.#cursor, "d", "");
    setText(this.#readout, known.length ? this.#spec.summary(known, this.#history) : "");
    setAttribute(this.#probe, "aria-valuetext", "move with the arrow keys");
  }

  #words(index) {
    const value = this.#spec.line(this.#history)[index];
    return value == null ? this.#spec.missing : this.#spec.say(this.#history, index);
  }
}
