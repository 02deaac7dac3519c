// A conversation: what was said, and the answers. It survives a reload of the page.

import { Answer } from "/page/answer.js";
import { chat, continuation } from "/page/client.js";
import { store, stored } from "/page/storage.js";

const NAME = "conversation", VERSION = 1;

/** What the reader said, and the answers to it, of which one is chosen. continues: a text that the model continues. */
export class Turn {
  answers = [];
  chosen = 0;

  constructor(said, continues) {
    Object.assign(this, { said, continues });
  }

  get answer() {
    return this.answers[this.chosen];
  }
}

export class Conversation {
  turns = [];
  #lean = 0; // how many of them, the oldest ones, were stored without what the model considered

  /** The request whose answer this is, an answer of one of the turns. */
  request(turn, answer) {
    if (turn.continues) return continuation(turn.said, answer.settings);
    const messages = answer.system ? [{ role: "system", content: answer.system }] : [];
    const before = this.turns.slice(0, this.turns.indexOf(turn)).filter(each => !each.continues && each.answer?.text.text);
    for (const { said, answer } of before) {
      messages.push({ role: "user", content: said }, { role: "assistant", content: answer.text.text });
    }
    return chat([...messages, { role: "user", content: turn.said }], answer.settings);
  }

  /**
   * Stores it for the next load of the page; false if not even the texts have room. Where only what the model considered
   * for each word has no room, that is left out, of the oldest answers first.
   */
  store() {
    if (!this.turns.length) return store(NAME, null);
    this.#lean = Math.min(this.#lean, this.turns.length - 1);
    for (let lean = this.#lean; lean <= this.turns.length; lean += Math.ceil((this.turns.length - lean + 1) / 4)) {
      this.#lean = lean;
      if (store(NAME, this.#packed(lean))) return true;
    }
    store(NAME, null); // rather nothing than what the conversation was some time ago
    return false;
  }

  #packed(lean) {
    const turns = this.turns.map(({ said, continues, answers, chosen }, i) =>
      ({ said, continues, chosen, answers: answers.map(answer => answer.packed(i >= lean)) }));
    return { version: VERSION, turns };
  }

  /** The stored conversation, or a new one. */
  static restored() {
    const made = new Conversation();
    const found = stored(NAME);
    if (found?.version !== VERSION) return made;
    for (const { said, continues, answers, chosen } of found.turns) {
      const turn = new Turn(said, continues);
      turn.answers = answers.map(Answer.unpacked);
      turn.chosen = chosen;
      if (turn.answer) made.turns.push(turn);
    }
    return made;
  }
}
