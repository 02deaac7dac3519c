// A Source on the page: as Markdown, or as written.

import { blocks, lines } from "/page/text/markdown.js";
import { show } from "/page/text/nodes.js";
import { hideOrphan, reachable, watch } from "/page/text/tokens.js";

export class ShownText {
  #done = []; // nodes of blocks that no further text can change
  #from = 0; // where the other blocks begin

  /** given: a text that stands before it. */
  constructor(source, given = "") {
    Object.assign(this, { source, given });
    this.root = document.createElement("div");
    this.root.className = "text";
    watch(this.root);
  }

  #last = ""; // what was shown the last time

  /** Shows the text so far. A text that still grows is parsed from its last two blocks on only. */
  show(isMarkdown, isWhole) {
    const last = `${isMarkdown} ${isWhole} ${this.source.text.length}`;
    if (last === this.#last) return;
    this.#last = last;
    this.root.classList.toggle("markdown", isMarkdown);
    show(this.root, isMarkdown ? this.#markdown(isWhole) : this.#written());
    hideOrphan();
    if (isWhole) reachable(this.root);
  }

  #written() {
    if (!this.given) return lines(this.source.part());
    return [{ tag: "span", attributes: { class: "given" }, children: [this.given] }, ...this.source.part().runs()];
  }

  #markdown(isWhole) {
    if (isWhole) [this.#done, this.#from] = [[], 0]; // a definition at the end can change links before it
    const found = blocks(this.source.part(this.#from));
    // the last two can change: "2" becomes "2.", and then belongs to the list before
    const last = isWhole ? 0 : Math.max(0, found.findLastIndex(({ isApart }, i) => isApart && i <= found.length - 2));
    this.#done.push(...found.slice(0, last).map(({ node }) => node));
    const rest = found.slice(last);
    if (last) this.#from = rest[0].start;
    return [...this.#done, ...rest.map(({ node }) => node)];
  }
}
