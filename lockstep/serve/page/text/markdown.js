// Markdown as nodes that nodes.js shows. No text becomes markup: HTML stays text, images are links, and links lead to the
// web or to a mail address, or stay text.

import { Lexer } from "/page/marked/marked.esm.js";

const OPTIONS = { gfm: true, breaks: true };
const PROTOCOLS = ["http:", "https:", "mailto:"];
const DEEPEST = 24; // what is nested deeper is shown as written
const FEW = 500; // characters, or a few more, that share a block where a text is shown as written
const GAP = /\n[ \t]*\n[ \t]*$/;
const REFERENCE = /&(?:#\d{1,7}|#x[\da-f]{1,6}|[a-z][a-z\d]{1,31});/gi;
const policy = globalThis.trustedTypes?.createPolicy("entities", { createHTML: text => text.match(REFERENCE)?.[0] ?? "" });

/**
 * The blocks of a Part in Markdown: {node, start, isApart}. start: where in the source the block begins. isApart: whether
 * an empty line stands before it.
 */
export function blocks(part) {
  const plain = part.renamed(part.text.replaceAll("\r\n", " \n").replaceAll("\r", "\n"));
  try {
    const reader = plain.reader();
    let before = "";
    return new Lexer(OPTIONS).lex(plain.text).map(token => {
      const own = reader.take(token.raw), isApart = GAP.test(before);
      before = token.type === "space" ? before + token.raw : token.raw;
      return { node: block(token, own, 0), start: own.place(0), isApart };
    }).filter(({ node }) => node);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // nested too deeply for the lexer
    return [{ node: asWritten(plain), start: plain.place(0), isApart: false }];
  }
}

function make(tag, children = [], attributes = {}) {
  return { tag, children, attributes };
}

function asWritten(part) {
  return make("p", part.slice(0, part.text.trimEnd().length).runs(), { class: "written" });
}

/** The node of a block; null if there is nothing to see. own: the Part of the block. */
function block(token, own, depth) {
  if (depth > DEEPEST) return asWritten(own);
  switch (token.type) {
    case "space": case "def": return null;
    case "hr": return make("hr");
    case "heading": return make(`h${Math.min(6, token.depth + 2)}`, inline(token.tokens, own, depth));
    case "paragraph": return make("p", inline(token.tokens, own, depth));
    case "code": return code(token, own);
    case "blockquote": return make("blockquote", nested(token.tokens, own, depth));
    case "list": return list(token, own, depth);
    case "table": return table(token, own, depth);
    default: return asWritten(own);
  }
}

function nested(tokens, own, depth) {
  const reader = own.reader();
  return tokens.flatMap(token => {
    const part = reader.take(token.raw);
    if (token.type === "text") return inline(token.tokens ?? [token], part, depth); // the text of a tight list item
    if (token.type === "checkbox") return box(token);
    return block(token, part, depth + 1) ?? [];
  });
}

function code(token, own) {
  const language = (token.lang ?? "").trim().split(/\s/)[0].slice(0, 30);
  const reader = own.reader();
  reader.take(token.raw.slice(0, token.codeBlockStyle === "indented" ? 0 : token.raw.indexOf("\n") + 1)); // the fence
  const copy = make("button", ["Copy"], { type: "button", class: "copy", "aria-label": "Copy the code" });
  const text = make("code", lines(reader.take(token.text)));
  return make("figure", [
    make("figcaption", [make("span", [language || "code"]), copy]),
    make("pre", [text], { tabindex: "0" }),
  ]);
}

/** The nodes of a Part as written. They are several blocks, so that a line more does not lay out all of them again. */
export function lines(part) {
  const made = [];
  for (let from = 0, to; from < part.text.length; from = to) {
    to = part.text.indexOf("\n", from + FEW) + 1 || part.text.length;
    made.push(make("span", part.slice(from, to).runs(), { class: "lines" }));
  }
  return made;
}

function list(token, own, depth) {
  const reader = own.reader();
  const items = token.items.map(item =>
    make("li", nested(item.tokens, reader.take(item.raw), depth), item.task ? { class: "task" } : {}));
  const start = token.ordered && token.start !== 1 ? { start: String(token.start) } : {};
  return make(token.ordered ? "ol" : "ul", items, start);
}

function table(token, own, depth) {
  const reader = own.reader();
  const cell = tag => ({ text, tokens, align }) =>
    make(tag, inline(tokens, reader.take(text), depth), align ? { class: `at-${align}` } : {});
  const head = make("thead", [make("tr", token.header.map(cell("th")))]);
  const body = make("tbody", token.rows.map(row => make("tr", row.map(cell("td")))));
  const attributes = { class: "wide", tabindex: "0", role: "region", "aria-label": "Table" };
  return make("div", [make("table", [head, body])], attributes);
}

function inline(tokens, own, depth) {
  const reader = own.reader();
  return tokens.flatMap(token => span(token, reader.take(token.raw), depth + 1));
}

/** The nodes of an inline token. own: the Part of it, with its marks. */
function span(token, own, depth) {
  if (depth > DEEPEST) return own.runs();
  const inner = () => inline(token.tokens, own, depth);
  switch (token.type) {
    case "strong": case "em": return [make(token.type, inner())];
    case "del": return token.raw.startsWith("~~") ? [make("del", inner())] : own.runs();
    case "codespan": return [make("code", own.reader().take(token.text).runs())];
    case "br": return [make("br")];
    case "checkbox": return [box(token)];
    case "escape": return (/[()[\]]/.test(token.text) ? own : own.reader().take(token.text)).runs(); // \( begins a formula
    case "link": return link(token, own, inner);
    case "image": return link(token, own, () => own.reader().take(token.text).runs(), "image");
    case "text": return token.tokens ? inner() : own.reader().take(decoded(token.text)).runs();
    case "html": return /^<br\s*\/?>$/i.test(token.raw) ? [make("br")] : own.runs();
    default: return own.runs();
  }
}

function box(token) {
  return token.checked ? "☑ " : "☐ ";
}

function link(token, own, inner, kind = "") {
  const href = destination(token.href);
  const children = href ? inner() : [];
  if (!children.length) return own.runs();
  const attributes = { href, title: href, target: "_blank", rel: "noopener noreferrer nofollow", referrerpolicy: "no-referrer" };
  return [make("a", children, kind ? { ...attributes, class: kind } : attributes)];
}

/** The full address of a link, or null where it does not lead to the web or to a mail address. */
function destination(href) {
  const url = URL.canParse(href) ? new URL(href) : null;
  return url && PROTOCOLS.includes(url.protocol) ? url.href : null;
}

/** A text with its character references, such as &lt;, as characters. */
function decoded(text) {
  return text.replace(REFERENCE, reference => {
    const markup = policy ? policy.createHTML(reference) : reference;
    const found = new DOMParser().parseFromString(markup, "text/html").documentElement.textContent;
    return found.length > 2 ? reference : found; // &nothing; begins with &not
  });
}
