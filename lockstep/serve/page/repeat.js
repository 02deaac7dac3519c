// Runs an answer's request again, alone or beside others, and compares every token and log-probability.

import { answer as stream } from "/page/client.js";
import { button } from "/page/elements.js";

const CROWD = 4; // other requests that run beside an answer that is run again in a crowd

export class Repeat {
  #ending = new AbortController();

  /**
   * request: of the answer. key(): the API key now. verdict: the element that tells. isSameServer(): whether the server is
   * still the one that answered.
   */
  constructor(answer, request, { key, verdict, isSameServer }) {
    Object.assign(this, { answer, request, key, verdict, isSameServer });
    this.buttons = [
      button("Run again", () => this.#run(0), "Sends the same request again, and compares every token"),
      button("Run again in a crowd", () => this.#run(CROWD), `Beside ${CROWD} other answers, so that it is computed in other batches`),
    ];
  }

  /** Ends what runs. */
  stop() {
    this.#ending.abort();
  }

  async #run(numOthers) {
    this.#ending = new AbortController();
    const { signal } = this.#ending;
    this.buttons.forEach(each => { each.disabled = true; });
    this.#judge("", "Running again …");
    const others = Array.from({ length: numOthers }, (_, i) => this.#other(i + 1, signal));
    try {
      this.#compare(await this.#collected(signal), numOthers);
    } catch (error) {
      this.#judge("", error.name === "AbortError" ? "" : error.message);
    } finally {
      this.#ending.abort();
      await Promise.all(others);
      this.buttons.forEach(each => { each.disabled = false; });
    }
  }

  /** What the request gives now: {text, tokens}, no further than the answer came if it was stopped. */
  async #collected(signal) {
    const found = { text: "", tokens: [] };
    const wanted = this.answer.tokens.length;
    for await (const { text, tokens } of stream(this.request, this.key(), signal)) {
      found.text += text;
      found.tokens.push(...tokens);
      this.#judge("", `Running again … ${found.tokens.length} of ${wanted} tokens`);
      if (this.#wasStopped && found.tokens.length >= wanted) break;
    }
    return found;
  }

  get #wasStopped() {
    return ["stopped", "interrupted"].includes(this.answer.finish);
  }

  /** Runs another sample of the same prompt, only to share steps with it: its text and errors are ignored. */
  async #other(number, signal) {
    const { body } = this.request;
    const other = { ...body, seed: body.seed + number, max_tokens: this.answer.tokens.length };
    try {
      for await (const _ of stream({ ...this.request, body: other }, this.key(), signal));
    } catch { /* its errors do not matter */ }
  }

  #compare(found, numOthers) {
    const wanted = this.answer.tokens;
    const at = wanted.findIndex((token, i) => token.text !== found.tokens[i]?.text || token.logprob !== found.tokens[i].logprob);
    const isAll = found.tokens.length === wanted.length && found.text === this.answer.text.text;
    const where = numOthers ? ` beside ${numOthers} others` : "";
    if (at < 0 && (this.#wasStopped || isAll)) {
      this.#judge("same", `✓ The same${where}: all ${wanted.length} tokens and their log-probabilities, bit for bit`);
      return;
    }
    const why = this.isSameServer() ? "" : "; the server has another model, or another version, than when it answered";
    this.#judge("differs", `✗ Not the same${where}, from token ${(at < 0 ? wanted.length : at) + 1} on${why}`);
  }

  #judge(kind, words) {
    this.verdict.className = `verdict ${kind}`;
    this.verdict.textContent = words;
  }
}
