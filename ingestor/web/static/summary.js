/** The state in one sentence: a pure function of the status and the time. */

import { bytes, clause, instant, lasting } from "./format.js";

/** Each tone has a colour in page.css, and a shape and a sign here, so that it is legible without colour. */
export const TONES = {
  good: { sign: "✓", shape: "M12 1a11 11 0 1 0 0 22a11 11 0 0 0 0-22ZM10 17.2l-5-5l2-2l3 3l7-7l2 2Z" },
  busy: {
    sign: "…",
    shape:
      "M12 1a11 11 0 1 0 0 22a11 11 0 0 0 0-22ZM6.5 10.2a1.8 1.8 0 1 1 0 3.6a1.8 1.8 0 0 1 0-3.6Z" +
      "M12 10.2a1.8 1.8 0 1 1 0 3.6a1.8 1.8 0 0 1 0-3.6ZM17.5 10.2a1.8 1.8 0 1 1 0 3.6a1.8 1.8 0 0 1 0-3.6Z",
  },
  care: { sign: "!", shape: "M12 1.5L23.5 22H.5ZM10.7 9v6.5h2.6V9ZM10.7 17v2.6h2.6V17Z" },
  bad: {
    sign: "✕",
    shape:
      "M7.5 1h9L23 7.5v9L16.5 23h-9L1 16.5v-9Z" +
      "M8 6.2L6.2 8l4 4l-4 4L8 17.8l4-4l4 4l1.8-1.8l-4-4l4-4L16 6.2l-4 4Z",
  },
  unknown: { sign: "?", shape: "M12 1a11 11 0 1 0 0 22a11 11 0 0 0 0-22ZM12 4.5a7.5 7.5 0 1 1 0 15a7.5 7.5 0 0 1 0-15Z" },
};

const NEITHER = " The database accepts no writes either.";

/**
 * @param {object} status the answer of `/status`
 * @param {number} now by the daemon's clock
 * @param {import("./format.js").Zone} zone
 * @returns {{tone: string, short: string, sentence: string, said: string}} `said` has no running number: a screen
 *   reader speaks it when it changes
 */
export function summarize(status, now, zone) {
  const problems = Object.fromEntries(status.ready.problems.map((problem) => [problem.check, problem]));
  const { state } = status.stream;
  if (state === "stopped") return still("unknown", "Stopped", "The daemon has stopped.");
  if (state === "blocked" || status.buffer.blocked_by) return blocked(status);
  if (isStarting(status, now)) return still("busy", "Starting", "Starting: the daemon is connecting for the first time.");
  if (problems.stream) return state === "streaming" ? unreadable(status, problems, now) : disconnected(status, problems, now, zone);
  if (problems.database) return unwritten(status, problems.database, now);
  if (problems.spool) return spoolFailure(problems.spool);
  if (status.buffer.spool_batches > 0) return catchingUp(status);
  if (status.clock?.is_wrong) return wrongClock(status.clock);
  return well(status, now, zone);
}

/** The sentence for a page that has lost the daemon. */
export function lost(since, now, zone) {
  if (since == null) return still("unknown", "No status", "No status from the daemon yet. Trying again.");
  const said = `No status from the daemon since ${zone.moment(since, now)}.`;
  return { tone: "unknown", short: "No status", sentence: `${said} The figures below are from that time.`, said };
}

function still(tone, short, sentence) {
  return { tone, short, sentence, said: sentence };
}

function isStarting(status, now) {
  const first = status.counts.sessions <= 1 && status.last.commit_at == null;
  return first && ["connecting", "authenticating", "streaming"].includes(status.stream.state)
    && status.counts.write_failures === 0 && now - instant(status.started_at) < 15_000;
}

function blocked(status) {
  const why = clause(status.stream.detail || "there is no room for more ticks");
  const said = `The stream is closed on purpose: ${why}.`;
  return { tone: "bad", short: "Blocked", sentence: `${said} ${waiting(status)}`, said };
}

function disconnected(status, { stream, database }, now, zone) {
  const why = clause(status.stream.detail || stream.detail);
  const since = `Not connected since ${zone.moment(instant(stream.since), now)}`;
  const also = database ? NEITHER : "";
  return {
    tone: status.market.open || database ? "bad" : "care",
    short: "Not connected",
    sentence: `${since}: ${why}; ${nextTry(status.stream, now)}.${also}`,
    said: `${since}: ${why}.${also}`,
  };
}

/** The stream is connected, but none of its messages is a tick. */
function unreadable(status, { stream, database }, now) {
  const also = database ? NEITHER : "";
  return {
    tone: status.market.open || database ? "bad" : "care",
    short: "No ticks",
    sentence: `Connected, but no message of the last ${lasting(now - instant(stream.since))} is a tick.${also}`,
    said: `Connected, but no message is a tick.${also}`,
  };
}

function nextTry({ state, retry_at }, now) {
  const seconds = Math.ceil((instant(retry_at) - now) / 1000);
  if (state !== "waiting" || retry_at == null || seconds <= 0) return "trying now";
  return `next try in ${lasting(1000 * seconds)}`;
}

function unwritten(status, problem, now) {
  const since = lasting(now - instant(problem.since));
  return {
    tone: "care",
    short: "Database unavailable",
    sentence: `The database has accepted no writes for ${since}. ${waiting(status)}`,
    said: "Streaming, but the database accepts no writes. New ticks are kept.",
  };
}

function waiting({ buffer }) {
  if (buffer.bytes === 0) return "No ticks wait yet.";
  return `${bytes(buffer.bytes)} of ticks ${buffer.spool_bytes > 0 ? "wait on disk" : "wait in memory"}.`;
}

function spoolFailure(problem) {
  return still("care", "Spool failure", `Streaming and writing, but the spool fails: ${clause(problem.detail)}.`);
}

function catchingUp(status) {
  return {
    tone: "busy",
    short: "Catching up",
    sentence: `Catching up: ${bytes(status.buffer.bytes)} of ticks are being written from disk.`,
    said: "Streaming, and catching up.",
  };
}

function wrongClock({ ahead_seconds: ahead }) {
  const apart = `${lasting(1000 * Math.abs(ahead))} ${ahead < 0 ? "behind" : "ahead of"}`;
  return {
    tone: "care",
    short: "Wrong clock",
    sentence: `Streaming and writing, but this machine's clock is ${apart} the database's, and coverage lacks that time.`,
    said: "Streaming and writing, but this machine's clock and the database's differ.",
  };
}

function well({ market }, now, zone) {
  if (market.open || market.opens_at == null) return still("good", "Streaming", "Streaming. Every tick is being written.");
  const opens = zone.coming(instant(market.opens_at), now);
  return still("good", "Connected", `Connected and ready. The exchange opens ${opens}.`);
}
