// The text of an answer as it streams in, and which token wrote which part of it.

/** A text that grows by pieces, {text, tokens}: the text of one token, or what several tokens wrote only together. */
export class Source {
  text = "";
  pieces = [];
  #starts = []; // where in the text each piece begins

  add(pieces) {
    for (const piece of pieces) {
      this.#starts.push(this.text.length);
      this.pieces.push(piece);
      this.text += piece.text;
    }
  }

  /** The text from a place to its end. */
  part(from = 0) {
    return new Part(this, this.text.slice(from), from);
  }

  /** The piece at a place, and the place where it ends: {piece, end}. */
  at(place) {
    let low = 0, high = this.#starts.length;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (this.#starts[middle] <= place) low = middle;
      else high = middle;
    }
    return { piece: this.pieces[low], end: this.#starts[low + 1] ?? this.text.length };
  }
}

/**
 * Some of a source's characters, in its order, such as a list item without its indentation. places: of the first one,
 * where all of them follow each other in the source; or of every one, -1 for characters that are not in the source.
 */
class Part {
  constructor(source, text, places) {
    this.source = source;
    this.text = text;
    this.places = places;
  }

  place(index) {
    return typeof this.places === "number" ? this.places + index : this.places[index];
  }

  slice(from, to) {
    const places = typeof this.places === "number" ? this.places + from : this.places.slice(from, to);
    return new Part(this.source, this.text.slice(from, to), places);
  }

  /** The same characters under other names: as many as before. */
  renamed(text) {
    return new Part(this.source, text, this.places);
  }

  /** A reader of the part, from its beginning. */
  reader() {
    return new Reader(this);
  }

  /** Its pieces: {text, piece} each, where only a part of the piece's text may be in this part; or a plain text. */
  runs() {
    const made = [];
    for (let from = 0, to; from < this.text.length; from = to) {
      const place = this.place(from);
      const { piece, end } = place < 0 ? { end: 0 } : this.source.at(place);
      const belongs = piece ? other => other >= place && other < end : other => other < 0;
      for (to = from + 1; to < this.text.length && belongs(this.place(to)); to++);
      const text = this.text.slice(from, to);
      made.push(piece ? { text, piece } : text);
    }
    return made;
  }
}

/** Finds texts in a part one after the other, though some of the part's characters are in none of them. */
class Reader {
  #part;
  #at = 0;

  constructor(part) {
    this.#part = part;
  }

  /** The next part that has this text. */
  take(text) {
    const found = this.#part.text.indexOf(text, this.#at);
    if (found < 0) return this.#gather(text);
    this.#at = found + text.length;
    return this.#part.slice(found, this.#at);
  }

  #gather(text) {
    const places = [];
    for (let i = 0; i < text.length; i++) {
      const found = this.#part.text.indexOf(text[i], this.#at);
      places.push(found < 0 ? -1 : this.#part.place(found));
      if (found >= 0) this.#at = found + 1;
    }
    return new Part(this.#part.source, text, places);
  }
}
