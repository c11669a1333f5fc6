/** Coverage of the trading day: a time line with the gaps, and a table of them. */

import { byId, fillTable, keep, make, setAttribute, setText } from "./dom.js";
import { age, count, counted, duration, instant, percent, spaced, tradingDay } from "./format.js";

const MEANING = {
  covered: "covered",
  open: "open: missed, and not filled yet",
  backfilled: "backfilled: filled with the provider's bars",
  partial: "partial: filled for some symbols only",
  unfillable: "unfillable: the provider has nothing for it",
  excluded: "excluded: the exchange itself did not trade",
};

const MOST_ROWS = 200;
const HOUR_MS = 3_600_000;

const USUAL_AGE = 90; // seconds: coverage is read once a minute, and an older one is marked

/** Return a function that shows the coverage of a `status` and its age. It draws only new coverage. */
export function makeCoverage() {
  let shown = null;
  return ({ coverage, market, ready }, now, zone) => {
    setText(byId("coverage-summary"), coverage ? summary(coverage, now, zone) : unknown(ready));
    byId("day").hidden = !coverage;
    const key = coverage && `${coverage.as_of} ${zone.name} ${zone.day(now)}`;
    if (key === shown) return;
    shown = key;
    if (coverage) show(coverage, market, now, zone);
    else setText(byId("coverage-title"), "Coverage");
  };
}

function show(coverage, market, now, zone) {
  const isToday = coverage.trading_day === zone.day(now);
  setText(byId("coverage-title"), `Coverage ${isToday ? "today" : "of the last trading day"}, ${tradingDay(coverage.trading_day)}`);
  drawDay(coverage, bounds(coverage, market), zone);
  showKeys(coverage.gaps);
  listGaps(coverage.gaps, now, zone);
}

function unknown({ problems }) {
  const isUnavailable = problems.some((problem) => problem.check === "database");
  return isUnavailable ? "Unknown: the database does not answer." : "No trading time is on record yet.";
}

function summary(coverage, now, zone) {
  const inMinutes = (minutes) => duration(60 * minutes);
  const parts = coverage.percent == null
    ? ["No trading time yet"]
    : [
        `${percent(coverage.percent)} covered or backfilled`,
        `${inMinutes(coverage.covered_minutes)} covered of ${inMinutes(coverage.trading_minutes)}`,
        coverage.missing_minutes ? `${inMinutes(coverage.missing_minutes)} missing, ${inMinutes(coverage.backfilled_minutes)} of it backfilled` : "nothing missing",
      ];
  const open = coverage.open_gaps ? `${counted(coverage.open_gaps, "open gap")} over all days` : "no open gap on any day";
  return `${[...parts, open].join("; ")}. As of ${zone.moment(instant(coverage.as_of), now)}${aged(coverage)}.`;
}

function aged({ age_seconds: seconds }) {
  return seconds > USUAL_AGE ? `, ${age(1000 * seconds)}` : "";
}

/** Return the start and end of the day; if the calendar lacks it, of the time reported so far. */
function bounds({ trading_day, started_at, ended_at }, { trading_day: day, opens_at, closes_at }) {
  const [from, to, opens, closes] = [started_at, ended_at, opens_at, closes_at].map(instant);
  const isKnown = day === trading_day && opens != null && closes - opens <= 24 * HOUR_MS;
  return isKnown ? [Math.min(from, opens), Math.max(to, closes)] : [from, to];
}

/** Draw in shares of the day, so that another screen size needs no redrawing. */
function drawDay({ started_at, ended_at, gaps, trading_day, percent: share }, [start, end], zone) {
  const place = (at) => 100 * Math.min(1, Math.max(0, (at - start) / (end - start)));
  const spans = [
    { status: "covered", from: instant(started_at), to: instant(ended_at), words: "covered" },
    ...gaps.map((gap) => ({ status: gap.status, from: instant(gap.started_at), to: instant(gap.ended_at), words: said(gap, zone) })),
  ];
  const line = document.querySelector(".day");
  keep(line, spans, () => make("span"), (element, { status, from, to, words }) => {
    setAttribute(element, "class", status);
    setAttribute(element, "title", words);
    element.style.left = `${place(from).toFixed(3)}%`;
    element.style.width = `${(place(to) - place(from)).toFixed(3)}%`;
  });
  setAttribute(line, "aria-label", `${tradingDay(trading_day)}: ${percent(share)} covered or backfilled, ${counted(gaps.length, "gap")}`);
  keep(document.querySelector(".hours"), hoursBetween(start, end, zone), () => make("span"), (element, at) => {
    setText(element, zone.minute(at));
    element.style.left = `${place(at).toFixed(3)}%`;
  });
}

/** Return both ends, and round hours of the exchange between them, spaced for a phone. */
function hoursBetween(start, end, zone) {
  const every = [1, 2, 3, 6].find((hours) => (end - start) / (hours * HOUR_MS) <= 5) ?? 12;
  const room = 0.75 * every * HOUR_MS;
  const found = [start];
  for (let at = Math.ceil((start + room) / HOUR_MS) * HOUR_MS; at <= end - room; at += HOUR_MS) {
    if (parseInt(zone.minute(at), 10) % every === 0) found.push(at);
  }
  return [...found, end];
}

function said(gap, zone) {
  const [from, to] = [gap.started_at, gap.ended_at].map((iso) => zone.second(instant(iso)));
  return `${from} to ${to}, ${duration(gap.seconds)}: ${spaced(gap.cause)} (${gap.status})`;
}

function showKeys(gaps) {
  const number = (status) => gaps.filter((gap) => gap.status === status).length;
  const keys = Object.keys(MEANING).filter((status) => status === "covered" || number(status));
  keep(byId("coverage-keys"), keys, () => make("span", {}, make("i"), make("span")), (element, status) => {
    setAttribute(element.firstElementChild, "class", `key ${status}`);
    setText(element.lastElementChild, status === "covered" ? MEANING.covered : `${count(number(status))} ${MEANING[status]}`);
  });
}

function listGaps(gaps, now, zone) {
  const newest = gaps.slice(-MOST_ROWS).reverse();
  const left = gaps.length - newest.length;
  const table = document.querySelector(".gaps");
  table.parentElement.hidden = !gaps.length;
  setText(byId("gaps-note"), left ? `The newest ${count(MOST_ROWS)} are shown; “ingestor gaps” lists the other ${count(left)}, too.` : "");
  fillTable(table, newest.map((gap) => [
    zone.moment(instant(gap.started_at), now),
    zone.moment(instant(gap.ended_at), now),
    duration(gap.seconds),
    spaced(gap.cause),
    { text: gap.status, status: gap.status },
  ]));
}
