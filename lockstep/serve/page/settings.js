// The form of settings, and the switch for thinking. Changed ones are remembered in this tab; the API key is not.

import { store, stored } from "/page/storage.js";

const form = document.getElementById("sampling");
const field = name => document.getElementById(name);
const NUMBERS = ["temperature", "top_p", "min_p", "top_k", "max_tokens"];
const KEPT = [...NUMBERS, "seed", "system", "shade", "markdown"];
const think = field("think");
const kept = stored("settings") ?? {}; // only the settings that the reader changed
let thinking = null; // the switch of the server's model: {variable, default}

/** The fields of a request that are settings; an empty one is left to the server. Without a seed a random one is drawn, so that every answer can be repeated. */
export function settings() {
  const made = Object.fromEntries(NUMBERS.filter(name => field(name).value).map(name => [name, Number(field(name).value)]));
  const variables = thinking && "think" in kept ? { chat_template_kwargs: { [thinking.variable]: kept.think } } : {};
  return { ...made, seed: field("seed").value ? Number(field("seed").value) : drawn(), ...variables };
}

/** A new seed. */
export function drawn() {
  return crypto.getRandomValues(new Uint32Array(1))[0];
}

/** Whether a check box is on. */
export function isOn(name) {
  return field(name).checked;
}

/** Restores the remembered settings, and from then on remembers changes and shows the values of sliders. */
export function keepSettings() {
  const known = { ...stored("offered"), ...kept };
  KEPT.filter(name => name in known).forEach(name => put(name, known[name]));
  form.addEventListener("submit", event => event.preventDefault());
  form.addEventListener("input", ({ target }) => KEPT.includes(target.id) && keep(target.id, value(target)));
  think.addEventListener("click", () => {
    keep("think", think.getAttribute("aria-pressed") !== "true");
    showThinking();
  });
  read();
}

/** Shows what the server's model begins with, in the controls that the reader has not changed. found: its figures. */
export function offer(found) {
  const defaults = { ...found.sampling, markdown: found.writes_markdown };
  KEPT.filter(name => name in defaults && !(name in kept)).forEach(name => put(name, defaults[name]));
  store("offered", defaults); // so that a reload begins with them
  thinking = found.thinking;
  showThinking();
  read();
}

function showThinking() {
  think.hidden = !thinking;
  if (thinking) think.setAttribute("aria-pressed", kept.think ?? thinking.default);
}

function value(control) {
  return control.type === "checkbox" ? control.checked : control.value;
}

/** Sets a control to a value, even between the steps of a slider or beyond its ends. */
function put(name, value) {
  const control = field(name);
  if (control.type === "checkbox") control.checked = value;
  if (control.type === "range") {
    control.min = Math.min(control.min, value);
    control.max = Math.max(control.max, value);
  }
  if (control.type !== "checkbox") control.value = value;
  if (control.type === "range" && Number(control.value) !== Number(value)) {
    control.step = "any";
    control.value = value;
  }
}

function keep(name, value) {
  kept[name] = value;
  store("settings", kept);
  read();
}

function read() {
  for (const output of form.querySelectorAll("output")) {
    const value = Number(field(output.htmlFor.value).value);
    output.textContent = Number(value.toFixed(2)) === value ? value.toFixed(2) : value;
  }
}
