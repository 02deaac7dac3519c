// How answers are sampled, as the form says. It is remembered in this tab; the API key is not.

const form = document.getElementById("sampling");
const field = name => document.getElementById(name);
const NUMBERS = ["temperature", "top_p", "min_p", "top_k", "max_tokens"];
const KEPT = [...NUMBERS, "seed", "system"];

/** The sampling fields of a request. A seed is drawn where none is given, so that every answer can be had again. */
export function settings() {
  const made = Object.fromEntries(NUMBERS.map(name => [name, Number(field(name).value)]));
  return { ...made, seed: field("seed").value ? Number(field("seed").value) : drawn() };
}

function drawn() {
  return crypto.getRandomValues(new Uint32Array(1))[0];
}

/** Restores the form, and keeps it and its readings up to date from then on. */
export function keepSettings() {
  const known = JSON.parse(sessionStorage.getItem("settings") ?? "{}");
  KEPT.filter(name => name in known).forEach(name => { field(name).value = known[name]; });
  form.addEventListener("submit", event => event.preventDefault());
  form.addEventListener("input", update);
  update();
}

function update() {
  for (const output of form.querySelectorAll("output")) {
    output.textContent = Number(field(output.htmlFor.value).value).toFixed(2);
  }
  const values = Object.fromEntries(KEPT.map(name => [name, field(name).value]));
  sessionStorage.setItem("settings", JSON.stringify(values));
}
