/** The daemon's status: by server-sent events, or by `/status` if these are refused. */

const RETRY_MS = 2000;
const SILENCE_MS = 5000; // of one status a second: after this time without any the daemon is gone

/** Call `onStatus(status)` for each status, and `onLost()` as soon as it is uncertain whether another comes. */
export function listen(onStatus, onLost) {
  let events = null;
  let lastAt = performance.now();

  function receive(status) {
    lastAt = performance.now();
    onStatus(status);
  }

  async function begin() {
    const status = await ask();
    if (status === null) return fail();
    follow();
    receive(status);
  }

  // With too many open pages the daemon refuses the events. Then `begin` is repeated, and the page shows the answers of
  // `/status`.
  function follow() {
    let isOpen = false;
    events = new EventSource("events");
    events.onopen = () => {
      isOpen = true;
    };
    events.onmessage = (event) => receive(JSON.parse(event.data));
    events.onerror = () => (isOpen ? fail() : retry());
  }

  function fail() {
    onLost();
    retry();
  }

  function retry() {
    events?.close();
    events = null;
    setTimeout(begin, RETRY_MS);
  }

  setInterval(() => {
    if (events !== null && performance.now() - lastAt > SILENCE_MS) fail();
  }, 1000);
  begin();
}

/** Return the answer of `/status`; null if there is none. */
async function ask() {
  try {
    const answer = await fetch("status", { signal: AbortSignal.timeout(SILENCE_MS) });
    return answer.ok ? await answer.json() : null;
  } catch {
    return null;
  }
}
