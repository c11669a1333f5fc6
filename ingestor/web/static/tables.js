/** The latest connections, the relays, rejections and ticks. */

import { byId, fillTable, setText } from "./dom.js";
import { NONE, bytes, count, counted, instant, lasting, price, spaced } from "./format.js";

export function showConnections({ connections, counts }, now, zone) {
  const table = byId("connections");
  table.parentElement.hidden = !connections.length;
  setText(byId("connections-note"), connectionsNote(connections, counts));
  fillTable(table, connections.map((each) => {
    const ended = instant(each.ended_at);
    return [
      zone.moment(instant(each.connected_at), now),
      lasting((ended ?? now) - instant(each.connected_at)),
      count(each.ticks),
      each.close_code == null ? NONE : String(each.close_code),
      ended === null ? { text: stateOf(each), status: "covered" } : { text: spaced(each.reason), aside: each.detail },
    ];
  }));
}

function connectionsNote(connections, { sessions }) {
  if (!connections.length) return "None yet.";
  if (sessions > connections.length) return `The latest ${count(connections.length)} of ${count(sessions)}.`;
  return `${counted(sessions, "connection")} since the start.`;
}

function stateOf({ authenticated_at }) {
  return authenticated_at === null ? "not authenticated yet" : "streaming";
}

export function showRelays(relays, now, zone) {
  const known = relays ?? [];
  const table = byId("relays");
  table.parentElement.hidden = !known.length;
  setText(byId("relays-note"), relaysNote(relays));
  fillTable(table, known.map((relay) => [
    relay.instance,
    relay.listening ? count(relay.clients) : NONE,
    zone.moment(instant(relay.started_at), now),
    relay.listening
      ? { text: "listens", status: "covered" }
      : { text: `silent since ${zone.moment(instant(relay.seen_at), now)}`, status: "open" },
  ]));
}

function relaysNote(relays) {
  if (relays == null) return "Unknown yet.";
  const listening = relays.filter((relay) => relay.listening);
  if (!relays.length) return "None serves this database.";
  const clients = listening.reduce((sum, relay) => sum + relay.clients, 0);
  return `${count(listening.length)} ${listening.length === 1 ? "listens" : "listen"}, with ${counted(clients, "client")}.`;
}

export function showRejections({ by_reason: reasons, latest }, now, zone) {
  const known = Object.entries(reasons);
  byId("rejections").hidden = !known.length;
  byId("rejections-note").hidden = known.length > 0;
  fillTable(byId("reasons"), known.map(([reason, number]) => [spaced(reason), count(number)]));
  byId("rejected").hidden = !latest.length;
  fillTable(byId("rejected"), latest.map((each) => [
    zone.moment(instant(each.received_at), now),
    spaced(each.reason),
    bytes(each.bytes),
  ]));
}

export function showTicks(ticks, now, zone) {
  byId("ticks").hidden = !ticks.length;
  byId("ticks-note").hidden = ticks.length > 0;
  fillTable(byId("ticks"), ticks.map((tick) => [
    zone.moment(instant(tick.received_at), now),
    zone.moment(instant(tick.time), now),
    tick.symbol,
    price(tick.price),
    count(tick.volume),
  ]));
}
