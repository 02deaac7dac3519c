// The tokens of an answer, each with the alternatives that the model considered.

const card = document.getElementById("card");
const considered = new WeakMap(); // element -> its tokens, with their alternatives
const MOVES = {
  ArrowRight: (all, at) => all[at + 1], ArrowLeft: (all, at) => all[at - 1], Home: all => all[0], End: all => all.at(-1),
};
let open = null;

/**
 * Finds which tokens wrote which part of a new text: {made: [{text, tokens}, ...], left}. tokens: [{text, logprob, top},
 * ...]. Tokens whose texts do not join to the text (a character of several tokens, text that a stop string held back)
 * share a piece; left: the tokens whose text has not come yet.
 */
export function pieces(text, tokens) {
  const begins = [], ends = [], left = [...tokens];
  let rest = text;
  while (left.length && rest.startsWith(left[0].text)) {
    const token = left.shift();
    rest = rest.slice(token.text.length);
    begins.push(token);
  }
  while (rest && left.length > 1 && rest.endsWith(left.at(-1).text)) {
    const token = left.pop();
    rest = rest.slice(0, rest.length - token.text.length);
    ends.unshift(token);
  }
  const own = token => ({ text: token.text, tokens: [token] });
  const between = rest ? [{ text: rest, tokens: left }] : [];
  return { made: [...begins.map(own), ...between, ...ends.map(own)], left: rest ? [] : left };
}

/** An element for what these tokens wrote, or for a part of it. */
export function element(text, tokens) {
  const made = document.createElement("span");
  made.className = "token";
  made.textContent = text;
  made.tabIndex = -1;
  // text without log-probabilities has no tokens, and counts as certain
  const sure = tokens.reduce((least, token) => Math.min(least, Math.exp(token.logprob)), 1);
  if (sure < 0.9995) made.style.setProperty("--doubt-share", (1 - sure).toFixed(3));
  considered.set(made, tokens);
  return made;
}

document.addEventListener("click", event => considered.has(event.target) || hide());

/** Shows alternatives on hover, focus and tap inside a container; arrow keys go from token to token. */
export function watch(container) {
  container.addEventListener("pointerover", event => event.pointerType === "mouse" && show(event.target));
  container.addEventListener("pointerout", event => event.pointerType === "mouse" && hide());
  container.addEventListener("click", event => show(event.target));
  container.addEventListener("focusin", event => show(event.target));
  container.addEventListener("focusout", hide);
  container.addEventListener("keydown", event => {
    const at = document.activeElement;
    if (event.key === "Escape") hide();
    if (!considered.has(at) || !MOVES[event.key]) return;
    const all = [...container.querySelectorAll(".token")];
    const next = MOVES[event.key](all, all.indexOf(at));
    if (!next) return;
    event.preventDefault();
    at.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
}

/** Lets the Tab key reach the first token of a container; arrow keys reach the others. */
export function reachable(container) {
  const first = container.querySelector(".token");
  if (first && !container.querySelector(".token[tabindex='0']")) first.tabIndex = 0;
}

function show(target) {
  if (!considered.get(target)?.length) return hide();
  hide();
  open = target;
  open.classList.add("open");
  open.setAttribute("aria-describedby", "card");
  card.replaceChildren(...considered.get(target).map(table));
  card.hidden = false;
  place(target.getClientRects()[0]);
}

/** Hides the alternatives, if the element that they belong to is gone. */
export function hideOrphan() {
  if (open && !open.isConnected) hide();
}

export function hide() {
  open?.classList.remove("open");
  open?.removeAttribute("aria-describedby");
  open = null;
  card.hidden = true;
}

/** Places the card below the token, or above it where there is no room. */
function place(at) {
  const gap = 8;
  const { width, height } = card.getBoundingClientRect();
  const below = at.bottom + gap + height < innerHeight;
  card.style.left = `${Math.max(gap, Math.min(at.left, innerWidth - width - gap))}px`;
  card.style.top = `${below ? at.bottom + gap : Math.max(gap, at.top - gap - height)}px`;
}

function table({ text, logprob, top }) {
  const made = document.createElement("table");
  const all = top.some(other => other.text === text) ? top : [...top, { text, logprob }];
  made.append(...all.map(other => row(other, other.text === text)));
  return made;
}

function row({ text, logprob }, chosen) {
  const made = document.createElement("tr");
  const bar = document.createElement("i");
  bar.style.setProperty("--share", Math.exp(logprob).toFixed(4));
  const cells = [visible(text), bar, percent(Math.exp(logprob))].map(content => {
    const cell = document.createElement("td");
    cell.append(content);
    return cell;
  });
  cells[1].className = "bar";
  made.className = chosen ? "chosen" : "";
  made.append(...cells);
  return made;
}

/** A text with visible signs for its white space. */
function visible(text) {
  return text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ +| +$/g, spaces => "␣".repeat(spaces.length));
}

export function percent(share) {
  const value = 100 * share;
  if (!value) return "0 %";
  return value >= 99.95 ? "100 %" : value < 0.01 ? "< 0.01 %" : `${value.toPrecision(value < 1 ? 1 : value < 10 ? 2 : 3)} %`;
}
