/** Formats of numbers, sizes, lengths of time and moments. Instants are milliseconds since the epoch. */

export const NONE = "–";

const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const SHORT = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const PRICE = new Intl.NumberFormat("en", { minimumFractionDigits: 2, maximumFractionDigits: 12 });
const UNITS = ["KiB", "MiB", "GiB", "TiB", "PiB"];

/** `1,234`; a dash for an unknown value. */
export function count(value) {
  return value == null ? NONE : WHOLE.format(value);
}

/** `1 tick`, `1,234 ticks`. */
export function counted(value, noun) {
  return `${count(value)} ${noun}${value === 1 ? "" : "s"}`;
}

/** A rate or an axis label: `0.1`, `12.3`, `1,230`. */
export function rate(value) {
  return value == null ? NONE : value < 1000 ? SHORT.format(value) : WHOLE.format(value);
}

export function price(value) {
  return Math.abs(value) < 1e12 ? PRICE.format(value) : value.toExponential();
}

export function bytes(value) {
  if (value == null) return NONE;
  if (value < 1024) return counted(value, "byte");
  const power = Math.min(UNITS.length, Math.floor(Math.log2(value) / 10));
  return `${rate(value / 1024 ** power)} ${UNITS[power - 1]}`;
}

export function percent(value) {
  return value == null ? NONE : `${value.toFixed(2)} %`;
}

/** As in the gap report: `41 ms`, `5.2 s`, `12 min 3 s`, `3 h 20 min`. */
export function duration(seconds) {
  if (seconds == null) return NONE;
  if (seconds > 0 && seconds < 1) return `${(seconds * 1000).toFixed(0)} ms`;
  if (seconds < 60) return `${seconds.toFixed(1).replace(/\.0$/, "")} s`;
  const whole = Math.round(seconds);
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${count(Math.floor(whole / 3600))} h ${Math.floor((whole % 3600) / 60)} min`;
}

/** A growing length, in whole seconds, so that it does not flicker. */
export function lasting(milliseconds) {
  return duration(Math.max(0, Math.floor(milliseconds / 1000)));
}

/** `just now`, `5 s ago`. */
export function age(milliseconds) {
  return milliseconds < 1000 ? "just now" : `${lasting(milliseconds)} ago`;
}

/** Text for the middle of a sentence: without capital and full stop, and shortened. */
export function clause(text, most = 110) {
  const bare = text.trim().replace(/[.\s]+$/, "").replace(/^(The|A|An|It|There|Nothing|No)(?= )/, (word) => word.toLowerCase());
  return bare.length > most ? `${bare.slice(0, most).trimEnd()}…` : bare;
}

/** `buffer full` for the constant `buffer_full`. */
export function spaced(constant) {
  return constant.replaceAll("_", " ");
}

/** An instant of the JSON; null stays null. */
export function instant(iso) {
  return iso == null ? null : Date.parse(iso);
}

/** Moments in one time zone. A zone unknown to the browser becomes UTC, which `name` then is. */
export class Zone {
  constructor(name) {
    this.name = Zone.#isKnown(name) ? name : "UTC";
    const form = (options) => new Intl.DateTimeFormat("en-GB", { timeZone: this.name, hourCycle: "h23", ...options });
    const digits = "2-digit";
    this.#second = form({ hour: digits, minute: digits, second: digits });
    this.#minute = form({ hour: digits, minute: digits });
    this.#day = form({ day: "numeric", month: "short" });
    this.#weekday = form({ weekday: "short", day: "numeric", month: "short" });
    this.#iso = new Intl.DateTimeFormat("en-CA", { timeZone: this.name }); // year-month-day
    this.#short = form({ timeZoneName: "short" });
  }

  #second;
  #minute;
  #day;
  #weekday;
  #iso;
  #short;

  static #isKnown(name) {
    try {
      return Boolean(new Intl.DateTimeFormat("en", { timeZone: name }));
    } catch {
      return false;
    }
  }

  /** `10:31:22` */
  second(at) {
    return this.#second.format(at);
  }

  /** `10:31` */
  minute(at) {
    return this.#minute.format(at);
  }

  /** `2026-11-24` */
  day(at) {
    return this.#iso.format(at);
  }

  /** `10:31:22`; with its day if that is not the day of `now`. */
  moment(at, now) {
    if (at == null) return NONE;
    return this.#isSameDay(at, now) ? this.second(at) : `${this.#day.format(at)} ${this.second(at)}`;
  }

  /** `at 10:31`, or `on Wed 25 Nov at 10:31`. */
  coming(at, now) {
    const day = this.#isSameDay(at, now) ? "" : `on ${this.#weekday.format(at).replace(",", "")} `;
    return `${day}at ${this.minute(at)}`;
  }

  /** `NZDT`, or `GMT+13` if the browser has no letters for it. */
  letters(at) {
    return this.#short.formatToParts(at).find((part) => part.type === "timeZoneName").value;
  }

  #isSameDay(one, other) {
    return this.#weekday.format(one) === this.#weekday.format(other) && Math.abs(one - other) < 172_800_000;
  }
}

/** `2026-11-24` as `Tuesday 24 November`. */
export function tradingDay(iso) {
  const day = new Intl.DateTimeFormat("en-GB", { timeZone: "UTC", weekday: "long", day: "numeric", month: "long" });
  return day.format(Date.parse(iso)).replace(",", "");
}
