// The form with sampling settings. Changed settings are remembered in this tab; the API key is not.

const form = document.getElementById("sampling");
const field = name => document.getElementById(name);
const NUMBERS = ["temperature", "top_p", "min_p", "top_k", "max_tokens"];
const KEPT = [...NUMBERS, "seed", "system"];
const kept = JSON.parse(sessionStorage.getItem("settings") ?? "{}"); // only the settings that the reader changed

/** The sampling fields of a request. Without a seed a random one is drawn here, so that every answer can be repeated. */
export function settings() {
  const made = Object.fromEntries(NUMBERS.map(name => [name, Number(field(name).value)]));
  return { ...made, seed: field("seed").value ? Number(field("seed").value) : drawn() };
}

function drawn() {
  return crypto.getRandomValues(new Uint32Array(1))[0];
}

/** Restores the remembered settings, and from then on remembers changes and shows the values of sliders. */
export function keepSettings() {
  KEPT.filter(name => name in kept).forEach(name => put(name, kept[name]));
  form.addEventListener("submit", event => event.preventDefault());
  form.addEventListener("input", event => keep(event.target));
  read();
}

/** Shows the model's defaults, {name: number}, in the controls that the reader has not changed. */
export function offer(defaults) {
  NUMBERS.filter(name => name in defaults && !(name in kept)).forEach(name => put(name, String(defaults[name])));
  read();
}

/** Sets a control to a value, even between the steps of a slider or beyond its ends. */
function put(name, value) {
  const control = field(name);
  if (control.type === "range") {
    control.min = Math.min(control.min, value);
    control.max = Math.max(control.max, value);
  }
  control.value = value;
  if (control.type === "range" && Number(control.value) !== Number(value)) {
    control.step = "any";
    control.value = value;
  }
}

function keep(control) {
  if (KEPT.includes(control.id)) kept[control.id] = control.value;
  sessionStorage.setItem("settings", JSON.stringify(kept));
  read();
}

function read() {
  for (const output of form.querySelectorAll("output")) {
    const value = Number(field(output.htmlFor.value).value);
    output.textContent = Number(value.toFixed(2)) === value ? value.toFixed(2) : value;
  }
}
