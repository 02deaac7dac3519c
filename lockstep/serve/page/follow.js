// Keeps the end of the conversation in sight while it grows, unless the reader has scrolled away from it.

const NEAR = 4; // pixels from the end that still count as the end: rounding, but no scrolling by hand
const FAR = 100; // pixels from the end where a button leads back to it

export class Follow {
  #isAtEnd = true;
  #height = 0; // of what is seen of the conversation, when that was found out

  /** scroller: the element that scrolls. toEnd: the button that leads to its end, shown where that is out of sight. */
  constructor(scroller, toEnd) {
    Object.assign(this, { scroller, toEnd });
    scroller.addEventListener("scroll", () => this.#look());
    new ResizeObserver(() => this.#isAtEnd ? this.end() : this.#look()).observe(scroller);
    toEnd.addEventListener("click", () => this.end());
  }

  /** Makes a change that lets the conversation grow; where its end was in sight before, it is afterwards. */
  grow(change) {
    const hasChanged = this.scroller.clientHeight !== this.#height; // as the field for messages has grown, say
    const wasAtEnd = this.#left < NEAR || hasChanged && this.#isAtEnd;
    change();
    if (wasAtEnd) this.end();
    else this.#look();
  }

  end() {
    this.scroller.scrollTop = this.scroller.scrollHeight;
    this.#look();
  }

  get #left() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    return scrollHeight - scrollTop - clientHeight;
  }

  #look() {
    this.#isAtEnd = this.#left < NEAR;
    this.#height = this.scroller.clientHeight;
    this.toEnd.hidden = this.#left < FAR;
  }
}
