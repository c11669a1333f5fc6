/** The figures at the top, and the spool: counts, waiting ticks, and the age of the last events. */

import { byId, fillFacts, keep, make, setAttribute, setMeter, setText } from "./dom.js";
import { median } from "./scale.js";
import { NONE, age, bytes, count, counted, duration, instant, lasting, rate, spaced } from "./format.js";

const FEW_DAYS = 30; // a trading calendar with fewer days left needs renewal
const WINDOW_MS = 10_000; // the current rate is the mean of this time
const LONG = 11; // characters that need smaller letters

/** The current rate, from the counts of successive statuses. */
export class RateMeter {
  #samples = [];
  #process = null;

  /** Add a status, and return the ticks a second. */
  add(status) {
    const now = instant(status.now);
    if (this.#process !== status.started_at || now < (this.#samples.at(-1)?.now ?? 0)) this.#samples = [];
    this.#process = status.started_at;
    const total = status.counts.messages - status.counts.rejected;
    if (this.#samples.at(-1)?.now !== now) this.#samples.push({ now, total });
    while (this.#samples.length > 2 && now - this.#samples[1].now >= WINDOW_MS) this.#samples.shift();
    const [first] = this.#samples;
    if (now - first.now < 1500) return status.history.ticks.at(-1);
    return Math.max(0, (1000 * (total - first.total)) / (now - first.now));
  }
}

/** @param {number} perSecond ticks  @param {number} now by the daemon's clock */
export function showCards(status, perSecond, now, zone) {
  const { counts, buffer, last } = status;
  const cards = [
    ["Ticks written", count(counts.ticks_written), writtenNote(counts)],
    ["Ticks a second", rate(perSecond == null ? null : perSecond < 100 ? Number(perSecond.toFixed(1)) : Math.round(perSecond)), "now, over 10 s"],
    ["Wire to commit", duration(last.wire_to_commit_seconds), delayNote(status)],
    ["Waiting", bytes(buffer.bytes), waitingNote(buffer), { meter: buffer.bytes / buffer.spool_max_bytes }],
    ["Last tick", since(last.tick_at, now), exactly(last.tick_at, now, zone)],
    ["Last commit", since(last.commit_at, now), exactly(last.commit_at, now, zone)],
    ["Duplicates", count(counts.duplicates), "were in the database already"],
    ["Rejections", count(counts.rejected), rejectionNote(status.rejections.by_reason)],
    ["Connections", count(counts.sessions), `since ${zone.moment(instant(status.started_at), now)}`],
    ["Trading hours", ...hours(status.market, now, zone)],
    calendar(status.calendar_days_left),
    clock(status.clock),
  ];
  keep(byId("cards"), cards, makeCard, fillCard);
}

function makeCard() {
  const meter = make("div", { class: "meter", role: "meter", "aria-valuemin": 0, "aria-valuemax": 100 }, make("i"));
  return make("div", { class: "card" }, make("dt"), make("dd", {}, make("b"), meter, make("span", { class: "faint" })));
}

function fillCard(card, [label, value, note, { meter = null, care = false } = {}]) {
  const [figure, bar, words] = card.lastElementChild.children;
  setText(card.firstElementChild, label);
  setText(figure, care ? `! ${value}` : value);
  setText(words, note);
  setAttribute(card, "data-long", value.length > LONG ? "" : null);
  setAttribute(card, "data-care", care ? "" : null);
  bar.hidden = meter === null;
  if (meter !== null) {
    setAttribute(bar, "aria-label", `${label}, of the room on disk`);
    setMeter(bar, meter, `${value}: ${note}`);
  }
}

function writtenNote({ ticks_recovered: recovered, batches_written: batches }) {
  const rest = recovered ? `; ${count(recovered)} more left by an earlier process` : "";
  return `in ${count(batches)} ${batches === 1 ? "batch" : "batches"}${rest}`;
}

function delayNote({ history }) {
  const known = history.delay.filter((value) => value != null);
  return known.length ? `typically ${duration(median(known))} this hour` : "nothing committed yet";
}

function waitingNote({ bytes: size, spool_bytes: disk, spool_max_bytes: room }) {
  if (!size) return `room for ${bytes(room)} on disk`;
  return `${bytes(size - disk)} in memory, ${bytes(disk)} on disk of ${bytes(room)}`;
}

function rejectionNote(reasons) {
  const [most] = Object.entries(reasons);
  return most ? `most: ${spaced(most[0])}` : "each message was a tick";
}

function since(iso, now) {
  return iso == null ? NONE : age(now - instant(iso));
}

function exactly(iso, now, zone) {
  return iso == null ? "none yet" : `at ${zone.moment(instant(iso), now)}`;
}

function hours({ open, opens_at: opens, closes_at: closes }, now, zone) {
  const at = instant(open ? closes : opens);
  if (at == null) return [open ? "open" : "closed", "the calendar has no next day"];
  const left = at > now ? `, in ${lasting(Math.ceil((at - now) / 60_000) * 60_000).replace(/ 0 s$/, "")}` : "";
  return open ? ["open", `closes ${zone.coming(at, now)}${left}`] : ["closed", `opens ${zone.coming(at, now)}${left}`];
}

function calendar(days) {
  const note = days == null ? "not checked yet" : "of the trading calendar known";
  const value = days == null ? NONE : counted(days, "day");
  return ["Calendar", value, note, { care: days != null && days < FEW_DAYS }];
}

function clock(difference) {
  if (difference == null) return ["Clock", NONE, "not compared with the database's yet"];
  const { ahead_seconds: ahead, is_wrong: care } = difference;
  const apart = duration(Math.abs(ahead));
  const side = ahead < 0 ? "behind" : "ahead of";
  return ["Clock", apart, `${apart === "0 ms" ? "apart from" : side} the database's`, { care }];
}

export function showSpool({ buffer, ready, replicated }) {
  const { bytes: size, spool_bytes: disk, spool_batches: batches, spool_max_bytes: room, blocked_by: by } = buffer;
  const isUnavailable = ready.problems.some((problem) => problem.check === "database");
  const full = `${bytes(disk)} of ${bytes(room)}`;
  setText(byId("spool-sentence"), by ? `No room: ${spaced(by)}.` : spoolSentence(size, disk, isUnavailable));
  setMeter(byId("spool-meter"), disk / room, full);
  const facts = { "in memory": bytes(size - disk), "on disk": full, batches: count(batches) };
  fillFacts(byId("spool"), { ...facts, ...(replicated && stream(replicated)) });
}

/** The replicated buffer, if there is one. */
function stream({ problem, messages, bytes: size, replicas, replicas_in_step: inStep }) {
  const state = problem ?? (messages == null ? "not asked yet" : `${counted(messages, "message")}, ${bytes(size)}`);
  return { "in NATS": state, "copies in step": inStep == null ? NONE : `${inStep} of ${replicas}` };
}

function spoolSentence(size, disk, isUnavailable) {
  if (disk) return "Ticks that the database has not accepted yet wait on disk, and are written in order.";
  if (size) return "Ticks wait in memory.";
  return isUnavailable ? "Nothing waits." : "Nothing waits: the database keeps up.";
}
