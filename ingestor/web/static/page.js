/** The page: it shows each status of the daemon completely, and keeps only the last one. */

import { RateMeter, showCards, showSpool } from "./cards.js";
import { makeCoverage } from "./coverage.js";
import { byId, keep, make, setAttribute, setText } from "./dom.js";
import { listen } from "./events.js";
import { makeHistory } from "./history.js";
import { showConnections, showRejections, showRelays, showTicks } from "./tables.js";
import { TONES, summarize, lost } from "./summary.js";
import { Zone, instant, lasting } from "./format.js";

const rateMeter = new RateMeter();
const showHistory = makeHistory();
const showCoverage = makeCoverage();
let zone = new Zone("UTC");
let last = null; // the last status, and its time by our clock; all ages are by the daemon's clock
let isLost = false;

listen(receive, lose);

function receive(status) {
  if (status.version !== 1) return say({ tone: "unknown", short: "Reload", sentence: "The daemon is newer than this page: reload it." });
  if (last && status.ingestor !== last.status.ingestor) return location.reload(); // this page belongs to an older daemon
  if (status.timezone !== last?.status.timezone) zone = new Zone(status.timezone);
  last = { status, at: performance.now() };
  isLost = false;
  show(status, instant(status.now));
}

function lose() {
  isLost = true;
  const since = last && instant(last.status.now);
  say(lost(since, since === null ? null : since + performance.now() - last.at, zone));
}

function show(status, now) {
  say(summarize(status, now, zone));
  showHead(status, now);
  showProblems(status.ready.problems, now);
  showCards(status, rateMeter.add(status), now, zone);
  showHistory(status.history, zone);
  showCoverage(status, now, zone);
  showSpool(status);
  showConnections(status, now, zone);
  showRelays(status.relays, now, zone);
  showRejections(status.rejections, now, zone);
  showTicks(status.ticks, now, zone);
}

/** Show the state as sentence, shape, colour, title and icon. A screen reader speaks only changes. */
function say({ tone, short, sentence, said = sentence }) {
  setText(byId("sentence"), sentence);
  setText(byId("said"), said);
  setAttribute(byId("shape"), "d", TONES[tone].shape);
  if (document.body.dataset.tone !== tone || document.body.dataset.lost !== String(isLost)) {
    document.body.dataset.tone = tone;
    document.body.dataset.lost = isLost;
    drawIcon(TONES[tone].shape);
  }
  const title = `${TONES[tone].sign} ${short} · ${last?.status.instance ?? "ingestor"}`;
  if (document.title !== title) document.title = title;
}

function drawIcon(shape) {
  const colour = getComputedStyle(byId("shape")).fill;
  const svg = `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24"><path fill="${colour}" fill-rule="evenodd" d="${shape}"/></svg>`;
  byId("icon").href = `data:image/svg+xml,${encodeURIComponent(svg)}`;
}

function showHead(status, now) {
  setText(byId("instance"), status.instance);
  setText(byId("version"), `version ${status.ingestor}`);
  setText(byId("endpoint"), status.endpoint);
  setText(byId("clock"), zone.second(now));
  setText(byId("zone"), `times of ${zone.name} (${zone.letters(now)})`);
  const started = instant(status.started_at);
  setText(byId("started"), `Started ${zone.moment(started, now)}, ${lasting(now - started)} ago.`);
}

function showProblems(problems, now) {
  byId("problems").hidden = !problems.length;
  keep(byId("problems"), problems, () => make("li", {}, make("b"), make("span"), make("span")), (item, problem) => {
    const since = instant(problem.since);
    const [check, when, detail] = item.children;
    setText(check, problem.check);
    setText(when, `since ${zone.moment(since, now)} (${lasting(now - since)})`);
    setText(detail, problem.detail);
  });
}
