// What the server is doing, in the header: asked for once a second while the page is visible.

import { figures } from "/page/client.js";
import { figure } from "/page/answer.js";
import { percent } from "/page/text/tokens.js";

const PAUSE = 1000;
const NONE = "–";
const SHOWN = ["running", "waiting", "memory", "cached", "rate"];
const $ = id => document.getElementById(id);

export class Figures {
  known = null; // the last figures of a server whose model is loaded
  #before = null; // the last generated_tokens, and the time of them
  #waiting = []; // those who want to know the model's abilities: {resolve, reject}
  #timer = 0;
  #numAsked = 0;

  /** key(): the API key now. introduce(found): called with the figures of a loaded model, each time. */
  constructor(key, introduce) {
    Object.assign(this, { key, introduce });
    $("key").addEventListener("input", () => this.#soon(300));
    document.addEventListener("visibilitychange", () => document.hidden || this.#soon(0));
  }

  /** Asks the server from now on. */
  follow() {
    this.#soon(0);
  }

  /**
   * The figures of the server with its model's abilities, as soon as the model is loaded. Throws a Refusal where the
   * server cannot be reached or wants another key, and an AbortError after `signal` aborts.
   */
  abilities(signal) {
    if (this.known) return this.known;
    return new Promise((resolve, reject) => {
      this.#waiting.push({ resolve, reject });
      signal.addEventListener("abort", () => reject(signal.reason));
      this.#soon(0);
    });
  }

  #soon(wait) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#look(), wait);
  }

  async #look() {
    const asked = this.#timer;
    if (!document.hidden || this.#waiting.length) await this.#ask();
    if (asked === this.#timer) this.#soon(PAUSE); // otherwise somebody wanted to know sooner
  }

  async #ask() {
    const number = ++this.#numAsked;
    const isOld = () => number !== this.#numAsked; // asked with the key before, say
    try {
      const found = await figures(this.key());
      if (isOld()) return;
      this.#show(found);
      if (found.state === "loading") return this.#trouble("is loading …");
      this.known = found;
      this.introduce(found);
      this.#tell(({ resolve }) => resolve(found));
    } catch (error) {
      if (isOld()) return;
      const wantsKey = error.status === 401;
      if (wantsKey) $("key-field").hidden = false;
      this.#lose(wantsKey ? "wants an API key (see Settings)" : "is not reachable");
      this.#tell(({ reject }) => reject(error));
    }
  }

  /** There are no figures now, and those of before are none of a server that comes back. */
  #lose(why) {
    this.known = this.#before = null;
    this.#trouble(why);
    SHOWN.forEach(name => { $(name).textContent = NONE; });
    $("memory-bar").value = 0;
  }

  #tell(whom) {
    this.#waiting.splice(0).forEach(whom);
  }

  #trouble(words) {
    $("model").textContent = words;
    $("model").classList.add("trouble");
  }

  #show(found) {
    const now = performance.now();
    $("model").textContent = found.model;
    $("model").classList.remove("trouble");
    $("fingerprint").textContent = found.system_fingerprint ?? NONE;
    $("running").textContent = found.running;
    $("waiting").textContent = found.waiting;
    const used = found.pages ? found.pages_used / found.pages : 0;
    $("memory").textContent = percent(used);
    $("memory-bar").value = used;
    $("cached").textContent = found.query_tokens ? percent(found.hit_tokens / found.query_tokens) : NONE;
    const rate = this.#before ? 1000 * (found.generated_tokens - this.#before.tokens) / (now - this.#before.at) : 0;
    $("rate").textContent = rate > 0 ? `${figure(rate)} tokens/s` : NONE;
    this.#before = { tokens: found.generated_tokens, at: now };
  }
}
