// One answer: its text and thought as they stream in, their tokens, and the figures about it.

import { answer as stream } from "/page/client.js";
import { Source } from "/page/text/source.js";
import { pieces } from "/page/text/tokens.js";

const ENDINGS = { stopped: "stopped", interrupted: "interrupted", tool_calls: "calls a tool", content_filter: "held back" };

export class Answer {
  /** settings: the fields of the request except for the conversation. system: the system message, or "". */
  constructor(settings, system) {
    Object.assign(this, { settings, system });
    this.text = new Source();
    this.thought = new Source();
    this.tokens = []; // all of them, in order; null where a restored answer has its text only
    this.parts = []; // what came, in order: [0 for a thought or 1, text, number of tokens]
    this.pending = []; // tokens whose text has not come yet
    this.times = {}; // milliseconds after the request: first and latest token, begin and end of the thought
  }

  /** Streams the answer of a request; resolves when it has ended, with success or without. Calls changed() often. */
  async run(request, key, signal, changed) {
    this.begun = performance.now();
    try {
      for await (const piece of stream(request, key, signal)) {
        this.add(piece);
        changed();
      }
      this.finish ??= "stop";
    } catch (error) {
      if (error.name === "AbortError") this.finish = "stopped";
      else this.problem = error.message;
    }
  }

  add({ text, thought, tokens, finish, receipt, usage, fingerprint }) {
    const now = performance.now() - this.begun;
    this.finish = finish ?? this.finish;
    this.receipt = receipt ?? this.receipt;
    this.usage = usage ?? this.usage;
    this.fingerprint = fingerprint ?? this.fingerprint;
    this.tokens.push(...tokens);
    this.pending.push(...tokens);
    if (tokens.length) {
      this.times.latest = now;
      this.times.first ??= now;
    }
    if (thought) this.times.thinks ??= now;
    if (text && this.times.thinks !== undefined) this.times.thought ??= now;
    for (const [kind, part] of [thought, text].entries()) if (part) this.#place(kind, part);
  }

  #place(kind, part) {
    const { made, left } = pieces(part, this.pending);
    this.pending = left;
    this.#source(kind).add(made);
    this.parts.push(...made.map(piece => [kind, piece.text, piece.tokens.length]));
  }

  #source(kind) {
    return kind ? this.text : this.thought;
  }

  /** Tokens per second after the first one; undefined before there are two. */
  get rate() {
    const { first, latest } = this.times;
    return latest > first ? 1000 * (this.numTokens - 1) / (latest - first) : undefined;
  }

  get numTokens() {
    return this.usage?.completion_tokens ?? this.tokens?.length ?? this.numLost;
  }

  /** What a reader may want to know about it, in words: [name, words] each. server: the server's fingerprint now. */
  facts(server) {
    const { prompt_tokens: prompt, prompt_tokens_details: details } = this.usage ?? {};
    const cached = details?.cached_tokens ? ` (${details.cached_tokens} from cache)` : "";
    return [
      ["tokens", count(this.numTokens, "token")],
      this.rate && ["speed", `${figure(this.rate)} tokens/s`],
      this.times.first !== undefined && ["first", `${figure(this.times.first / 1000)} s to first word`],
      prompt && ["prompt", count(prompt, "prompt token") + cached],
      ["seed", `seed ${this.settings.seed}`],
      this.fingerprint && server && this.fingerprint !== server && ["origin", `from ${this.fingerprint}, not this server`],
      this.#ending && !this.problem && ["end", this.#ending],
    ].filter(Boolean);
  }

  get #ending() {
    return this.finish === "length" ? `cut off after ${count(this.numTokens, "token")}` : ENDINGS[this.finish];
  }

  // ---------------------------------------------------------------- kept over a reload

  /** The answer as JSON has it. withTokens: also what the model considered, about 200 characters a token. */
  packed(withTokens = true) {
    const { settings, system, finish, usage, fingerprint, problem, times } = this;
    const tokens = withTokens && this.tokens;
    const receipt = withTokens ? this.receipt : undefined;
    const parts = tokens ? this.parts : [[0, this.thought.text, 0], [1, this.text.text, 0]].filter(([, text]) => text);
    return { settings, system, finish, receipt, usage, fingerprint, problem, times, parts, numLost: this.numTokens,
      tokens: tokens ? tokens.map(({ text, logprob, top }) => [text, logprob, top.map(each => [each.text, each.logprob])]) : null };
  }

  static unpacked({ settings, system, finish, receipt, usage, fingerprint, problem, times, parts, tokens, numLost }) {
    const made = new Answer(settings, system);
    const token = ([text, logprob]) => ({ text, logprob });
    Object.assign(made, { receipt, usage, fingerprint, problem, times, parts, numLost, finish: finish ?? (problem ? undefined : "interrupted") });
    made.tokens = tokens?.map(each => ({ ...token(each), top: each[2].map(token) })) ?? null;
    let at = 0;
    for (const [kind, text, number] of parts) {
      const own = made.tokens?.slice(at, at + number) ?? [];
      at += number;
      made.#source(kind).add([{ text, tokens: own }]);
    }
    return made;
  }
}

/** A positive number with as many digits as a reader needs. */
export function figure(value) {
  return value >= 9.95 ? value.toFixed(0) : value >= 0.095 ? value.toFixed(1) : value.toFixed(2);
}

export function count(number, word) {
  return `${number} ${word}${number === 1 ? "" : "s"}`;
}
