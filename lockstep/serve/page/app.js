// The page: a conversation, its settings, and what the server is doing.

import { Answer, make } from "/page/answer.js";
import { chat, continuation } from "/page/client.js";
import { settings, keepSettings, offer } from "/page/settings.js";
import { follow } from "/page/figures.js";
import { hide } from "/page/tokens.js";

const $ = id => document.getElementById(id);
const log = $("log");
const prompt = $("prompt");
let messages = [];
let model = null; // the last figures of the server
let running = null; // the AbortController of the answer that streams

keepSettings();
follow(found => {
  if (found.can_chat !== model?.can_chat) introduce(found);
  offer(found.sampling ?? {});
  model = found;
});

function introduce(found) {
  const [greeting, word] = found.can_chat ? ["Ask something.", "Message"]
    : ["Begin a text.", "Text that the model continues"];
  $("greeting").textContent = greeting;
  $("prompt-label").textContent = prompt.placeholder = word;
}

// ---------------------------------------------------------------- sending a message

$("composer").addEventListener("submit", event => {
  event.preventDefault();
  if (prompt.value.trim() && !running && $("sampling").reportValidity()) ask(prompt.value);
});

prompt.addEventListener("keydown", event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
});

prompt.addEventListener("input", grow);

function grow() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

async function ask(text) {
  const canChat = model?.can_chat ?? true;
  $("welcome").hidden = true;
  prompt.value = "";
  grow();
  const known = messages;
  const asked = [...known, { role: "user", content: text }];
  const system = $("system").value.trim();
  const before = system ? [{ role: "system", content: system }] : [];
  const request = canChat ? chat([...before, ...asked], settings()) : continuation(text, settings());
  if (canChat) log.append(make("p", "said", text));
  const answer = new Answer(request, canChat ? "" : text);
  log.append(answer.root);
  log.scrollTop = log.scrollHeight;
  await stream(answer);
  if (messages !== known) return; // the conversation was cleared meanwhile
  if (canChat && answer.text) messages = [...asked, { role: "assistant", content: answer.text }];
  if (!answer.text && !prompt.value) prompt.value = text; // so that it can be sent again
}

async function stream(answer) {
  running = new AbortController();
  busy(true);
  await answer.run($("key").value, running.signal, () => {
    if (log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
  });
  running = null;
  busy(false);
  log.scrollTop = log.scrollHeight;
  $("said").textContent = `The answer ended after ${answer.tokens.length} tokens.`;
}

function busy(yes) {
  $("send").hidden = yes;
  $("stop").hidden = !yes;
  if (!yes) prompt.focus({ preventScroll: true });
}

$("stop").addEventListener("click", () => running?.abort());

$("clear").addEventListener("click", () => {
  running?.abort();
  messages = [];
  hide();
  log.replaceChildren($("welcome"));
  $("welcome").hidden = false;
  prompt.focus();
});

// ---------------------------------------------------------------- appearance

$("toggle-settings").addEventListener("click", event => {
  const open = document.body.classList.toggle("settings-open");
  event.currentTarget.setAttribute("aria-expanded", open);
});

log.addEventListener("scroll", hide);
["shade", "fixed"].forEach(id => $(id).addEventListener("change", dress));
dress();

function dress() {
  log.classList.toggle("shaded", $("shade").checked);
  log.classList.toggle("code", $("fixed").checked);
}
