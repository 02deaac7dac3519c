// The figures in the header, fetched once a second while the page is visible.

import { figures } from "/page/client.js";
import { percent } from "/page/tokens.js";

const PAUSE = 1000;
const $ = id => document.getElementById(id);
let before = null; // the last generated_tokens, and the time of them

/** Updates the figures from now on, and passes each of them to onFigures. */
export async function follow(onFigures) {
  for (;;) {
    if (!document.hidden) await look(onFigures);
    await new Promise(resolve => setTimeout(resolve, PAUSE));
  }
}

async function look(onFigures) {
  try {
    const found = await figures($("key").value);
    show(found);
    if (found.state !== "loading") onFigures(found);
    trouble(found.state === "loading" ? "is loading …" : "");
  } catch (error) {
    if (error.status === 401) $("key-field").hidden = false;
    trouble(error.status === 401 ? "wants an API key (see Settings)" : "is not reachable");
  }
}

function trouble(words) {
  if (words) $("model").textContent = words;
}

function show(found) {
  const now = performance.now();
  $("model").textContent = found.model;
  $("fingerprint").textContent = found.system_fingerprint ?? "";
  $("running").textContent = found.running;
  $("waiting").textContent = found.waiting;
  $("pages").textContent = `${found.pages_used} of ${found.pages}`;
  $("pages-bar").value = found.pages ? found.pages_used / found.pages : 0;
  $("hits").textContent = found.query_tokens ? percent(found.hit_tokens / found.query_tokens) : "–";
  if (before) {
    const rate = 1000 * (found.generated_tokens - before.generated_tokens) / (now - before.at);
    $("rate").textContent = rate > 0 ? rate.toFixed(rate < 10 ? 1 : 0) : "–";
  }
  before = { generated_tokens: found.generated_tokens, at: now };
}
