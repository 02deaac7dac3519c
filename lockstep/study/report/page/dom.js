// Makers of elements: all text goes in as text.

const SVG = "http://www.w3.org/2000/svg";
const $ = id => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const trialOf = new Map(data.trials.map(trial => [String(trial.id), trial]));

/** An element with properties and children. */
function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

/** An SVG element with attributes. */
function shape(name, attributes = {}, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

/** A list of names and values. */
function facts(rows) {
  const made = element("dl", { className: "facts" });
  for (const [name, value] of rows) made.append(element("dt", {}, name), element("dd", {}, value));
  return made;
}

/** A number for an axis. */
function tickText(x) {
  const size = Math.abs(x);
  const text = x === 0 || (size >= 1e-3 && size < 1e5) ? String(+x.toPrecision(3)) : x.toExponential(0);
  return text.replaceAll("-", "−");
}

/** Bytes for an axis. */
function bytesText(x) {
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) if (x >= size) return `${+(x / size).toPrecision(3)} ${unit}`;
  return `${+x.toPrecision(3)} B`;
}

/** About so many round numbers from low to high. */
function roundNumbers(low, high, many) {
  const rough = (high - low || Math.abs(high) || 1) / many, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(x => x * power >= rough);
  const made = [];
  for (let x = Math.ceil(low / step); x * step <= high; x++) made.push(x * step);
  return made;
}
