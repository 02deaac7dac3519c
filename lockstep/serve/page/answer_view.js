// An answer on the page: its thought, its text, its figures, and what can be done with it.

import { button, copy, make } from "/page/elements.js";
import { figure } from "/page/answer.js";
import { Repeat } from "/page/repeat.js";
import { Verification } from "/page/verify.js";
import { ShownText } from "/page/text/shown_text.js";

const FRAME = 30; // milliseconds between two updates of an answer that streams in
const SHARE = 4; // an update that takes longer than a part of that waits so many times as long for the next one

export class AnswerView {
  #timer = 0;
  #cost = 0; // milliseconds that the last update took, and the browser then took to paint it
  #painting = 0;
  #isWhole = false;

  /**
   * page: what the view needs of the page: markdown(), fingerprint(), key(), again(view) to make another answer, and
   * edit(view) where a text is continued. given: the text that the answer continues, or "".
   */
  constructor(answer, request, page, given = "") {
    Object.assign(this, { answer, request, page, given });
    this.root = make("article", `answer${given ? " continues" : ""}`);
    this.root.setAttribute("aria-label", "Answer");
    this.thought = this.root.appendChild(make("details", "thought"));
    this.summary = this.thought.appendChild(make("summary", ""));
    this.summary.addEventListener("click", () => { this.isFoldedByReader = true; });
    this.texts = { thought: new ShownText(answer.thought), text: new ShownText(answer.text, given) };
    this.thought.append(this.texts.thought.root);
    this.root.append(this.texts.text.root);
    this.root.addEventListener("click", ({ target }) => {
      if (target.matches?.(".copy")) copy(target.closest("figure").querySelector("code").textContent, target);
    });
    this.facts = this.root.appendChild(make("ul", "facts"));
    this.facts.setAttribute("aria-label", "About this answer");
    this.end = this.root.appendChild(make("div", "end"));
  }

  /** Shows the answer as far as it came, soon; at most so often that the page stays at ease. grow(change): see follow.js. */
  soon(grow) {
    this.#timer ||= setTimeout(() => {
      const begun = performance.now();
      const since = () => performance.now() - begun;
      grow(() => this.show());
      this.#cost = since();
      requestAnimationFrame(() => setTimeout(() => { this.#painting = since() - this.#cost - FRAME; }));
      this.#timer = 0;
    }, Math.max(FRAME, SHARE * (this.#cost + Math.max(0, this.#painting))));
  }

  /** Shows the answer as far as it came. isWhole: nothing more will come. */
  show(isWhole = false) {
    this.#isWhole = isWhole;
    this.root.classList.toggle("busy", !isWhole);
    this.root.setAttribute("aria-busy", !isWhole);
    this.dress();
    this.tell();
    if (isWhole) this.#close();
  }

  /** Shows its texts as the settings want them. */
  dress() {
    const isMarkdown = this.page.markdown() && !this.given;
    this.texts.text.show(isMarkdown, this.#isWhole);
    this.#showThought(isMarkdown);
  }

  #showThought(isMarkdown) {
    const isWhole = this.#isWhole;
    const { thought, text, times } = this.answer;
    this.thought.hidden = !thought.text;
    if (!thought.text) return;
    const isThinking = !isWhole && !text.text;
    if (!this.isFoldedByReader) this.thought.open = isThinking;
    const seconds = ((times.thought ?? times.latest) - times.thinks) / 1000;
    this.summary.textContent = isThinking ? "Thinking …" : seconds >= 0.1 ? `Thought for ${figure(seconds)} s` : "Thought";
    this.texts.thought.show(isMarkdown, isWhole);
  }

  /** Shows the figures. */
  tell() {
    const facts = this.answer.facts(this.page.fingerprint());
    this.facts.replaceChildren(...facts.map(([name, words]) => make("li", name, words)));
  }

  #close() {
    const { answer } = this;
    clearTimeout(this.#timer);
    this.#stop();
    const verdict = make("span", "verdict"), { key } = this.page;
    verdict.setAttribute("role", "status");
    this.check = answer.receipt && !answer.problem ? new Verification(answer, this.request, { key, verdict }) : null;
    this.repeat = answer.tokens?.length && !answer.problem ? new Repeat(answer, this.request, {
      key, verdict,
      isSameServer: () => !answer.fingerprint || answer.fingerprint === this.page.fingerprint(),
    }) : null;
    this.end.replaceChildren(...[this.#problem(), this.#actions()].filter(Boolean));
  }

  #problem() {
    if (!this.answer.problem) return null;
    const made = make("p", "problem", this.answer.problem);
    made.setAttribute("role", "alert");
    return made;
  }

  #actions() {
    const { answer, page, check, repeat } = this;
    const made = make("div", "actions");
    const copies = answer.text.text && button("Copy", event => copy(answer.text.text, event.currentTarget), "Copies the answer as it was written");
    const another = answer.problem ? button("Try again", () => page.again(this))
      : button("Another answer", () => page.again(this), "Answers once more, with another seed and the settings of now");
    const edit = this.given && button("Edit", () => page.edit(this), "Changes the text that is continued");
    made.append(...[copies, edit, another].filter(Boolean), ...(check ? [check.button] : []), ...(repeat ? [...repeat.buttons, repeat.verdict] : []));
    another.classList.add("another");
    return made;
  }

  /** Ends what it does. */
  stop() {
    clearTimeout(this.#timer);
    this.#stop();
  }

  #stop() {
    this.check?.stop();
    this.repeat?.stop();
  }
}
