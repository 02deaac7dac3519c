// Verifies an answer's receipt: the server computes prompt and answer anew in one prefill, and compares every bit.

import { verify } from "/page/client.js";
import { figure } from "/page/answer.js";
import { button } from "/page/elements.js";

export class Verification {
  #ending = new AbortController();

  /** answer: with a receipt. request: of the answer. key(): the API key now. verdict: the element that tells. */
  constructor(answer, request, { key, verdict }) {
    Object.assign(this, { answer, request, key, verdict });
    this.button = button("Verify", () => this.#run(), "Computes question and answer anew at once, and compares every bit with the answer's receipt");
  }

  /** Ends what runs. */
  stop() {
    this.#ending.abort();
  }

  async #run() {
    this.#ending = new AbortController();
    this.button.disabled = true;
    this.#judge("", "Verifying …");
    const begun = performance.now();
    try {
      const found = await verify(this.answer.receipt, this.request, this.key(), this.#ending.signal);
      this.#tell(found, (performance.now() - begun) / 1000);
    } catch (error) {
      this.#judge("", error.name === "AbortError" ? "" : error.message);
    } finally {
      this.button.disabled = false;
    }
  }

  #tell({ verdict, reason }, seconds) {
    const { latest } = this.answer.times;
    if (verdict === "true") {
      const took = latest ? `, in ${figure(seconds)} s; the answer took ${figure(latest / 1000)} s` : "";
      this.#judge("same", `✓ True: the model gives this answer to this request, bit for bit${took}`);
    } else {
      this.#judge(verdict === "false" ? "differs" : "", `${verdict === "false" ? "✗ False" : "Not checked"}: ${reason}`);
    }
  }

  #judge(kind, words) {
    this.verdict.className = `verdict ${kind}`;
    this.verdict.textContent = words;
  }
}
