/** Axes of values: their ticks, and the place of a value from 0 to 1. */

/** An axis from zero, with round steps. */
export function linear(values) {
  const most = Math.max(...values, 0) || 1;
  const rough = most / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const high = step * Math.ceil(most / step - 1e-9);
  const ticks = Array.from({ length: Math.round(high / step) + 1 }, (_, index) => Number((index * step).toPrecision(6)));
  return { ticks, place: (value) => Math.max(0, value) / high };
}

const DELAYS = [0.0001, 0.001, 0.01, 0.1, 1, 10, 60, 600, 3600, 36_000, 360_000, 3_600_000]; // seconds

/** A logarithmic axis of lengths of time: milliseconds and minutes are legible in one chart. */
export function logarithmic(values) {
  const least = values.length ? Math.min(...values) : 0.001;
  const most = values.length ? Math.max(...values) : 1;
  const low = Math.max(0, DELAYS.findLastIndex((each) => each <= least));
  const found = DELAYS.findIndex((each, index) => index > low && each >= most);
  const ticks = DELAYS.slice(low, (found < 0 ? DELAYS.length - 1 : found) + 1);
  const [first, last] = [ticks[0], ticks.at(-1)];
  return { ticks, place: (value) => Math.min(1, Math.log(Math.max(first, value) / first) / Math.log(last / first)) };
}

/** The median, which an outlier does not move. */
export function median(values) {
  const sorted = [...values].sort((one, other) => one - other);
  return sorted[Math.floor(sorted.length / 2)];
}
