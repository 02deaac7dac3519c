// A turn of the conversation on the page: what the reader said, which can be edited, and one of its answers.

import { AnswerView } from "/page/answer_view.js";
import { button, grow, make } from "/page/elements.js";

export class TurnView {
  /** page: what the view needs of the page, see AnswerView; also change(view, text) and choose(view, number). */
  constructor(turn, conversation, page) {
    Object.assign(this, { turn, conversation, page });
    this.root = make("section", "turn");
    this.said = make("div", "said");
    if (!turn.continues) this.root.append(this.said);
    this.#showSaid();
    this.choice = make("div", "choice");
  }

  /** Shows the chosen answer; returns its view. */
  draw() {
    const { turn } = this;
    this.view?.stop();
    this.view?.root.remove();
    const page = { ...this.page, again: () => this.page.again(this), edit: () => this.edit() };
    this.view = new AnswerView(turn.answer, this.conversation.request(turn, turn.answer), page, turn.continues ? turn.said : "");
    this.root.append(this.view.root);
    return this.view;
  }

  /** Lets the reader go from answer to answer, where there are several. Only the last turn's can be changed: the others
   * are what the conversation went on from. */
  offerChoice(isLast) {
    const { turn, choice } = this;
    choice.remove();
    if (turn.answers.length < 2 || !isLast) return;
    const step = (by, sign, label) => {
      const made = button(sign, () => this.page.choose(this, turn.chosen + by));
      made.setAttribute("aria-label", label);
      made.disabled = !turn.answers[turn.chosen + by];
      return made;
    };
    choice.replaceChildren(step(-1, "‹", "The answer before"), make("span", "", `${turn.chosen + 1} of ${turn.answers.length}`),
      step(1, "›", "The next answer"));
    this.view.end.prepend(choice);
  }

  #showSaid() {
    this.said.className = "said";
    const edit = button("Edit", () => this.edit(), "Changes this message, and goes on from there");
    edit.className = "edit";
    this.said.replaceChildren(make("p", "", this.turn.said), edit);
  }

  /** Puts a field in the place of what was said. */
  edit() {
    if (document.body.classList.contains("answering")) return;
    const form = make("form", "editing");
    const field = form.appendChild(document.createElement("textarea"));
    field.value = this.turn.said;
    field.setAttribute("aria-label", "Edit the message");
    const line = form.appendChild(make("div", "line"));
    line.append(make("span", "quiet", "What follows is answered anew."), button("Cancel", () => this.#cancel()));
    const send = line.appendChild(make("button", "primary", "Send"));
    send.type = "submit";
    form.addEventListener("submit", event => {
      event.preventDefault();
      if (field.value.trim()) this.page.change(this, field.value);
    });
    field.addEventListener("input", () => grow(field));
    field.addEventListener("keydown", event => {
      if (event.key === "Escape") this.#cancel();
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      form.requestSubmit();
    });
    if (this.turn.continues) this.root.prepend(this.said);
    this.said.className = "said wide";
    this.said.replaceChildren(form);
    grow(field);
    field.focus();
  }

  #cancel() {
    this.#showSaid();
    if (this.turn.continues) this.said.remove();
    else this.said.querySelector(".edit").focus();
  }
}
