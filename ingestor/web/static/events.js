/** What the daemon says, as long as this page is open: its events, and `/status` where they can't be had. */

const AGAIN = 2000; // milliseconds until the next try
const SILENCE = 5000; // milliseconds without a word, of one a second, that mean that there is nobody

/**
 * Call `heard(status)` with each word, and `lost()` as soon as there is reason to doubt that another one comes.
 * Goes on for ever.
 */
export function listen(heard, lost) {
  let events = null;
  let lastWord = performance.now();

  function hear(status) {
    lastWord = performance.now();
    heard(status);
  }

  async function begin() {
    const status = await ask();
    if (status === null) return fail();
    follow();
    hear(status);
  }

  // Where too many pages are open already the events are refused: then this goes from `begin` to `begin`, and the page
  // lives on answers to `/status`.
  function follow() {
    let isOpen = false;
    events = new EventSource("events");
    events.onopen = () => {
      isOpen = true;
    };
    events.onmessage = (event) => hear(JSON.parse(event.data));
    events.onerror = () => (isOpen ? fail() : again());
  }

  function fail() {
    lost();
    again();
  }

  function again() {
    events?.close();
    events = null;
    setTimeout(begin, AGAIN);
  }

  setInterval(() => {
    if (events !== null && performance.now() - lastWord > SILENCE) fail();
  }, 1000);
  begin();
}

/** Return what `/status` says; null where nothing can be had. */
async function ask() {
  try {
    const answer = await fetch("status", { signal: AbortSignal.timeout(SILENCE) });
    return answer.ok ? await answer.json() : null;
  } catch {
    return null;
  }
}
