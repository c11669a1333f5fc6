/** The last hour: two charts, and the same points as a table. */

import { Chart } from "./chart.js";
import { byId, fillTable, setText } from "./dom.js";
import { linear, logarithmic, median } from "./scale.js";
import { NONE, duration, instant, rate } from "./format.js";

/** @type {import("./chart.js").Spec} */
const RATE = {
  name: "Ticks a second",
  line: (history) => history.ticks,
  band: (history) => history.ticks.map((value) => (value ? [0, value] : null)),
  scale: linear,
  label: rate,
  say: (history, index) => `${rate(history.ticks[index])} ticks a second`,
  missing: "unknown",
  summary: (values) => `typically ${rate(median(values))}, at most ${rate(Math.max(...values))}`,
};

/** @type {import("./chart.js").Spec} */
const DELAY = {
  name: "Wire to commit",
  line: (history) => history.delay,
  band: (history) => history.delay_max.map((value, index) => (value == null ? null : [history.delay[index], value])),
  scale: logarithmic,
  label: (value) => (value < 0.001 ? `${1000 * value} ms` : duration(value).replace(/ 0 (s|min)$/, "")),
  say: (history, index) => `median ${duration(history.delay[index])}, longest ${duration(history.delay_max[index])}`,
  missing: "nothing was committed",
  summary: (values, { delay_max: longest }) => `typically ${duration(median(values))}, at most ${duration(Math.max(...longest))}`,
};

/** Return a function that shows a `history`. */
export function makeHistory() {
  const charts = [new Chart(byId("rate"), RATE), new Chart(byId("delay"), DELAY)];
  const details = byId("points");
  let latest = null;
  details.addEventListener("toggle", () => details.open && latest && tabulate(details, ...latest));
  return (history, zone) => {
    latest = [history, zone];
    for (const chart of charts) chart.show(history, zone);
  };
}

/** Fill the table once, when it is opened: it does not change while it is read. */
function tabulate(details, history, zone) {
  const { step, until, ticks, delay, delay_max: longest } = history;
  const end = instant(until);
  const rows = ticks
    .map((value, index) => [
      zone.second(end - 1000 * step * (ticks.length - index)),
      rate(value),
      delay[index] == null ? NONE : duration(delay[index]),
      longest[index] == null ? NONE : duration(longest[index]),
    ])
    .filter((_, index) => ticks[index] != null || delay[index] != null)
    .reverse();
  setText(byId("points-as-of"), `Steps of ${step} s, newest first, as of ${zone.second(end)}. Open it again for newer ones.`);
  fillTable(details.querySelector("table"), rows);
}
