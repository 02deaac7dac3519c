// The page: a conversation, its settings, and what the server is doing.

import { Answer, count } from "/page/answer.js";
import { MOST } from "/page/client.js";
import { Conversation, Turn } from "/page/conversation.js";
import { announce, grow } from "/page/elements.js";
import { Figures } from "/page/figures.js";
import { Follow } from "/page/follow.js";
import { drawn, isOn, keepSettings, offer, settings } from "/page/settings.js";
import { store, stored } from "/page/storage.js";
import { hide } from "/page/text/tokens.js";
import { TurnView } from "/page/turn_view.js";

const $ = id => document.getElementById(id);
const log = $("log");
const prompt = $("prompt");
const key = () => $("key").value;
const follow = new Follow(log, $("to-end"));
const figures = new Figures(key, introduce);
let conversation = new Conversation();
let views = []; // of the conversation's turns
let cleared = null; // the conversation before the last "New chat"
let running = null; // the AbortController of the answer that streams
let isMarkdown = null; // whether answers are shown so
let asked = ""; // a message that waits until the server's abilities are known
let told = null; // the server's fingerprint that answers were compared with
let isLeft = false; // whether the reader has left the page: an answer that breaks off then is interrupted, not failed

/** What the views of turns and answers need of the page. */
const page = {
  key, markdown: () => isOn("markdown"), fingerprint: () => figures.known?.system_fingerprint,
  again, choose, change: (view, text) => isReady() && ask(text, views.indexOf(view)),
};

keepSettings();
dress();
try {
  open(Conversation.restored());
} catch { // what another version of the page stored is no conversation
  open(new Conversation());
}
type(stored("draft") ?? "");
figures.follow();

// ---------------------------------------------------------------- the server

/** Fits the page to the abilities of the server's model. */
function introduce(found) {
  const [greeting, word] = found.can_chat ? ["Ask something.", "Message"] : ["Begin a text.", "Text that the model continues"];
  $("greeting").textContent = greeting;
  $("max_tokens").placeholder = found.can_chat ? MOST.chat : MOST.continuation;
  $("prompt-label").textContent = prompt.placeholder = word;
  offer(found);
  dress();
  if (told !== found.system_fingerprint) views.forEach(({ view }) => view?.tell());
  told = found.system_fingerprint;
}

// ---------------------------------------------------------------- asking

$("composer").addEventListener("submit", event => {
  event.preventDefault();
  if (prompt.value.trim() && isReady()) send();
});

prompt.addEventListener("keydown", event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
});

prompt.addEventListener("input", () => grow(prompt));

function busy() {
  return running !== null;
}

/** Whether something can be asked now. Shows the settings where one of them is wrong. */
function isReady() {
  if (busy()) return false;
  if ($("sampling").checkValidity()) return true;
  showSettings(true);
  return $("sampling").reportValidity();
}

/** Sends what the field for messages has; it gets it back where that cannot be sent. */
async function send() {
  asked = prompt.value;
  type("");
  if (!await ask(asked)) return;
  if (!prompt.value) type(asked);
  asked = "";
}

/**
 * Asks in the place of the turns from a number on, once the server has said what its model can do. Resolves to whether
 * the conversation is still the same.
 */
function ask(text, number = views.length) {
  return answered(async signal => {
    const turn = new Turn(text, !(await figures.abilities(signal)).can_chat);
    asked = "";
    $("welcome").hidden = true;
    notice("");
    forget(number);
    conversation.turns.push(turn);
    views.push(new TurnView(turn, conversation, page));
    log.append(views.at(-1).root);
    choices();
    await answer(views.at(-1), signal);
  });
}

function type(text) {
  prompt.value = text;
  grow(prompt);
}

/** Answers a turn once more, with another seed; a failed answer is replaced, and what followed is forgotten. */
function again(view) {
  if (!isReady()) return;
  if (isCertain(view.turn.answer)) {
    notice("At temperature 0 every seed gives the same answer. Settings has the temperature.");
    return;
  }
  forget(views.indexOf(view) + 1);
  answered(signal => answer(view, signal, view.turn.answer.problem ? undefined : drawn()));
}

/** Whether an answer would come out the same with every seed, as the settings are now. */
function isCertain({ settings: { receipt: _, ...before }, system, problem, finish }) {
  const now = settings();
  const isSame = JSON.stringify({ ...before, seed: 0 }) === JSON.stringify({ ...now, seed: 0 }) && system === $("system").value.trim();
  return now.temperature === 0 && isSame && !problem && finish === "stop";
}

/**
 * Does what needs the server, an async function of an AbortSignal, as the only thing at a time. Resolves to whether the
 * conversation is still the same.
 */
async function answered(does) {
  const own = running = new AbortController();
  show(true);
  let problem = "";
  try {
    await does(own.signal);
  } catch (error) {
    if (error.name !== "AbortError") problem = error.message;
  }
  if (running !== own) return false; // another conversation was opened meanwhile
  running = null;
  show(false);
  notice(problem, true);
  keep();
  return true;
}

/** Streams one more answer to a turn. */
async function answer(view, signal, seed) {
  const { turn } = view;
  // a receipt names the model by its content, which a server knows once it has a fingerprint
  const receipt = figures.known?.system_fingerprint && { receipt: true };
  const made = new Answer({ ...settings(), ...receipt, ...(seed !== undefined && { seed }) }, $("system").value.trim());
  if (turn.answer?.problem && !turn.answer.text.text) turn.answers.splice(turn.chosen, 1);
  turn.chosen = turn.answers.push(made) - 1;
  const shown = view.draw();
  shown.show();
  follow.end();
  keep();
  await made.run(shown.request, key(), signal, () => shown.soon(change => follow.grow(change)));
  if (!views.includes(view)) return;
  follow.grow(() => {
    shown.show(true);
    choices();
  });
  announce(`The answer ended after ${count(made.numTokens, "token")}.`);
}

/** Says something above the field for messages. */
function notice(words, isProblem = false) {
  $("notice").textContent = words;
  $("notice").hidden = !words;
  $("notice").classList.toggle("problem", isProblem && words !== "");
}

function show(isAnswering) {
  document.body.classList.toggle("answering", isAnswering);
  $("send").hidden = isAnswering;
  $("stop").hidden = !isAnswering;
  if (isAnswering) notice(figures.known ? "" : "Waiting for the server …");
  else if ([document.body, $("stop"), $("send")].includes(document.activeElement)) prompt.focus({ preventScroll: true });
}

$("stop").addEventListener("click", () => running?.abort());
prompt.addEventListener("keydown", ({ key, isComposing }) => key === "Escape" && !isComposing && running?.abort());

// ---------------------------------------------------------------- the conversation

function choose(view, number) {
  if (busy()) return;
  view.turn.chosen = number;
  follow.grow(() => {
    view.draw().show(true);
    choices();
  });
  keep();
}

function choices() {
  views.forEach((view, i) => view.offerChoice(i === views.length - 1));
}

/** Forgets the turns from a number on. */
function forget(number) {
  conversation.turns.length = number;
  views.splice(number).forEach(close);
}

function close({ view, root }) {
  view?.stop();
  root.remove();
}

/** Shows a conversation instead of the one that is shown. */
function open(other) {
  running?.abort();
  running = null;
  hide();
  asked = "";
  notice("");
  views.forEach(close);
  conversation = other;
  views = other.turns.map(turn => new TurnView(turn, other, page));
  for (const view of views) {
    log.append(view.root);
    view.draw().show(true);
  }
  choices();
  $("welcome").hidden = views.length > 0;
  show(false);
  follow.end();
}

/** Stores the conversation; says so where it has no room. */
function keep() {
  if (isLeft) return;
  $("unkept").hidden = conversation.store();
}

$("clear").addEventListener("click", () => {
  if (conversation.turns.length) cleared = conversation;
  open(new Conversation());
  keep();
  $("back").hidden = !cleared;
  prompt.focus();
});

$("back").addEventListener("click", () => {
  open(cleared);
  cleared = null;
  $("back").hidden = true;
  keep();
  prompt.focus();
});

addEventListener("pagehide", () => {
  keep();
  isLeft = true;
  store("draft", prompt.value || asked || null);
});
addEventListener("pageshow", () => { isLeft = false; });

// ---------------------------------------------------------------- appearance

$("toggle-settings").addEventListener("click", () => showSettings(!document.body.classList.contains("settings-open")));

/** Shows or hides the settings where there is no room for them beside the conversation. */
function showSettings(yes) {
  document.body.classList.toggle("settings-open", yes);
  $("toggle-settings").setAttribute("aria-expanded", yes);
}

log.addEventListener("scroll", hide);
$("sampling").addEventListener("input", ({ target }) => target.type === "checkbox" && dress());

function dress() {
  log.classList.toggle("shaded", isOn("shade"));
  if (isMarkdown === isOn("markdown")) return;
  isMarkdown = isOn("markdown");
  follow.grow(() => views.forEach(({ view }) => view?.dress()));
}
