// One answer: its streamed text, its facts (seed, speed), and the buttons that run it again and compare.

import { answer as stream } from "/page/client.js";
import { elements, reachable, watch } from "/page/tokens.js";

const CROWD = 4; // other requests that run beside an answer that is run again in a crowd

export class Answer {
  /** request: made by client.js. prompt: the text that the answer continues, shown before it. */
  constructor(request, prompt = "") {
    this.request = request;
    this.text = "";
    this.tokens = [];
    this.pending = [];
    this.started = performance.now();
    this.root = make("article", `answer busy${prompt ? " code" : ""}`);
    this.thought = this.root.appendChild(make("div", "thought"));
    this.body = this.root.appendChild(make("div", "text"));
    this.facts = this.root.appendChild(make("ul", "facts"));
    this.facts.setAttribute("aria-label", "About this answer");
    if (prompt) this.body.append(make("span", "given", prompt));
    [this.thought, this.body].forEach(watch);
  }

  /** Streams the answer; resolves when it has ended, with success or without. */
  async run(key, signal, onPiece) {
    try {
      for await (const piece of stream(this.request, key, signal)) {
        this.add(piece);
        onPiece();
      }
      this.end();
    } catch (error) {
      if (error.name === "AbortError") this.end("stopped");
      else this.fail(error.message);
    }
  }

  add({ text, thought, tokens, finish, usage, fingerprint }) {
    this.finish = finish ?? this.finish;
    this.usage = usage ?? this.usage;
    this.fingerprint = fingerprint ?? this.fingerprint;
    this.text += text;
    this.tokens.push(...tokens);
    this.pending.push(...tokens);
    if (tokens.length) this.latest = performance.now();
    if (tokens.length) this.first ??= this.latest;
    if (thought || text) {
      const { made, left } = elements(thought + text, this.pending);
      (text ? this.body : this.thought).append(...made);
      this.pending = left;
    }
    this.tell();
  }

  /** Tokens per second after the first; undefined before there are two. */
  get rate() {
    return this.tokens.length > 1 ? 1000 * (this.tokens.length - 1) / (this.latest - this.first) : undefined;
  }

  end(reason) {
    this.finish ??= reason;
    this.stopped = reason === "stopped";
    this.close();
    if (this.tokens.length) this.root.append(this.again());
  }

  fail(message) {
    this.close();
    const problem = this.root.appendChild(make("p", "problem", message));
    problem.setAttribute("role", "alert");
  }

  close() {
    this.root.classList.remove("busy");
    [this.thought, this.body].forEach(reachable);
    this.tell();
  }

  tell() {
    const { seed } = this.request.body;
    const cached = this.usage?.prompt_tokens_details?.cached_tokens;
    const ended = { length: "cut off at the most tokens", stopped: "stopped", tool_calls: "calls a tool" }[this.finish];
    this.facts.replaceChildren(...[
      fact("seed ", seed), this.fingerprint && fact("", this.fingerprint), fact(`${this.tokens.length} tokens`),
      this.rate && fact(`${this.rate.toFixed(1)} tokens/s`),
      this.first && fact(`first after ${Math.round(this.first - this.started)} ms`),
      cached && fact(`${cached} of ${this.usage.prompt_tokens} prompt tokens cached`),
      ended && fact(ended),
    ].filter(Boolean));
  }

  // ---------------------------------------------------------------- run again

  again() {
    const line = make("div", "again");
    const alone = line.appendChild(button("Run again"));
    const crowd = line.appendChild(button("Run again in a crowd"));
    crowd.title = `Beside ${CROWD} other answers, so that it is computed in other batches`;
    this.verdict = line.appendChild(make("span", "verdict"));
    this.verdict.setAttribute("role", "status");
    alone.addEventListener("click", () => this.repeat(0, [alone, crowd]));
    crowd.addEventListener("click", () => this.repeat(CROWD, [alone, crowd]));
    return line;
  }

  async repeat(strangers, buttons) {
    const ending = new AbortController();
    buttons.forEach(each => { each.disabled = true; });
    this.judge("", "Running again …");
    const others = Array.from({ length: strangers }, (_, i) => this.stranger(i, ending.signal));
    try {
      this.compare(await this.collect(ending.signal), strangers);
    } catch (error) {
      this.judge("", error.message);
    } finally {
      ending.abort();
      await Promise.all(others);
      buttons.forEach(each => { each.disabled = false; });
    }
  }

  /** Runs the request again: {text, tokens}, no further than this answer came if it was stopped. */
  async collect(signal) {
    const found = { text: "", tokens: [] };
    for await (const { text, tokens } of stream(this.request, this.key(), signal)) {
      found.text += text;
      found.tokens.push(...tokens);
      this.judge("", `Running again … ${found.tokens.length} of ${this.tokens.length} tokens`);
      if (this.stopped && found.tokens.length >= this.tokens.length) break;
    }
    return found;
  }

  /** Runs another sample of the same prompt, only to share steps with it: its text and errors are ignored. */
  async stranger(number, signal) {
    const seed = this.request.body.seed + number + 1;
    const request = { ...this.request, body: { ...this.request.body, seed } };
    try {
      for await (const _ of stream(request, this.key(), signal));
    } catch { /* its errors do not matter */ }
  }

  compare(found, strangers) {
    const wanted = this.tokens;
    const at = wanted.findIndex((token, i) => token.text !== found.tokens[i]?.text || token.logprob !== found.tokens[i].logprob);
    const same = at < 0 && (this.stopped || found.tokens.length === wanted.length && found.text === this.text);
    const where = strangers ? ` beside ${strangers} others` : "";
    if (same) this.judge("same", `✓ The same${where}: all ${wanted.length} tokens and their log-probabilities, bit for bit`);
    else this.judge("differs", `✗ Not the same${where}, from token ${(at < 0 ? wanted.length : at) + 1} on`);
  }

  judge(kind, words) {
    this.verdict.className = `verdict ${kind}`;
    this.verdict.textContent = words;
  }

  key() {
    return document.getElementById("key").value;
  }
}

/** An element with a class and text. */
export function make(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

function button(text) {
  const made = make("button", "", text);
  made.type = "button";
  return made;
}

function fact(text, value) {
  const made = make("li", "", text);
  if (value !== undefined) made.append(make("b", "", value));
  return made;
}
