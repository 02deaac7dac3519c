// Loss against bytes: a point for each trial, and the line of those that no other beats.

const HEIGHT = 380, ROOM = { left: 62, right: 16, top: 16, bottom: 44 };
const TICK_GAP = 22; // between the lines of two ticks, at least: a label and a little air

/** Draws the plot for the loss and the size that are chosen; onTrial gets the trial that is asked for. */
function drawPlot(onTrial) {
  const [error, size] = [$("plot-error").value, $("plot-size").value];
  const points = data.trials.filter(t => t.status === "done" && t.metrics[error] != null && t.metrics[size] != null);
  const width = Math.max(280, $("plot").clientWidth);
  const picture = shape("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, role: "group" });
  picture.setAttribute("aria-label", `${data.words[error]} against bytes of ${data.words[size]}, ${points.length} trials`);
  const x = sizeScale(points.map(t => t.metrics[size]), width);
  const y = errorScale(points, error);
  drawAxes(picture, x, y, width, data.words[size], data.words[error]);
  drawFrontier(picture, x, y, data.frontiers[`${error}/${size}`].map(id => trialOf.get(String(id)).metrics), error, size);
  drawPoints(picture, points, t => [x.at(t.metrics[size]), y.at(t.metrics[error])], y, error, size, onTrial);
  $("plot").replaceChildren(picture);
  listFrontier(data.frontiers[`${error}/${size}`], error, size, onTrial);
}

function sizeScale(values, width) {
  let low = Math.min(...values), high = Math.max(...values);
  if (low === high) [low, high] = [low * 0.9, high * 1.1 || 1];
  const pad = 0.05 * (high - low), [from, to] = [low - pad, high + pad];
  const at = value => ROOM.left + (value - from) / (to - from) * (width - ROOM.left - ROOM.right);
  return { at, ticks: roundNumbers(from, to, Math.max(3, Math.floor(width / 120))) };
}

/** Linear next to 0, logarithmic farther away, so that noise and loss can both be seen; the caption says where. */
function errorScale(points, error) {
  const values = points.map(t => t.metrics[error]);
  const sizes = values.map(Math.abs).filter(v => v > 0).sort((a, b) => a - b);
  const knee = sizes.length ? sizes[Math.floor(sizes.length / 10)] : 1;
  const bend = value => Math.asinh(value / knee);
  const from = Math.min(0, ...values), to = Math.max(knee, ...values);
  const low = bend(from), high = bend(to), pad = 0.06 * (high - low);
  const at = value => HEIGHT - ROOM.bottom - (bend(value) - low + pad) / (high - low + 2 * pad) * (HEIGHT - ROOM.top - ROOM.bottom);
  const scale = `(logarithmic, linear within ±${tickText(+knee.toPrecision(1))})`;
  return { at, scale, ticks: errorTicks(from, to, knee, at) };
}

/** 0 and round numbers of both signs, as many as have room: powers of ten first, the largest of them before others. */
function errorTicks(low, high, knee, at) {
  const made = [0];
  const last = Math.floor(Math.log10(Math.max(high, -low))), first = Math.floor(Math.log10(knee)) - 1;
  for (const digit of [1, 3, 2, 5])
    for (let power = last; power >= first; power--)
      for (const value of [digit, -digit].map(signed => Number(`${signed}e${power}`)))
        if (low <= value && value <= high && made.every(other => Math.abs(at(other) - at(value)) >= TICK_GAP)) made.push(value);
  return made;
}

function drawAxes(picture, x, y, width, sizeWords, errorWords) {
  for (const value of y.ticks) {
    const at = y.at(value);
    picture.append(shape("line", { x1: ROOM.left, x2: width - ROOM.right, y1: at, y2: at, class: value ? "axis" : "zero" }));
    picture.append(shape("text", { x: ROOM.left - 8, y: at + 4, "text-anchor": "end" }, tickText(value)));
  }
  const floor = HEIGHT - ROOM.bottom;
  picture.append(shape("line", { x1: ROOM.left, x2: width - ROOM.right, y1: floor, y2: floor, class: "axis" }));
  for (const value of x.ticks)
    picture.append(shape("text", { x: x.at(value), y: floor + 18, "text-anchor": "middle" }, bytesText(value)));
  picture.append(shape("text", { x: width - ROOM.right, y: HEIGHT - 6, "text-anchor": "end" }, `${sizeWords}, bytes →`));
  picture.append(shape("text", { x: 0, y: 10 }, `↑ ${errorWords} ${y.scale}`));
}

function drawFrontier(picture, x, y, frontier, error, size) {
  let path = "";
  frontier.forEach((metrics, i) => {
    const [px, py] = [x.at(metrics[size]), y.at(metrics[error])];
    path += i ? `H${px.toFixed(1)}V${py.toFixed(1)}` : `M${px.toFixed(1)} ${py.toFixed(1)}`;
  });
  if (path) picture.append(shape("path", { d: path, class: "frontier" }));
}

/** The mouse takes the nearest point; the keyboard has one stop, and arrow keys go from point to point. */
function drawPoints(picture, points, place, y, error, size, onTrial) {
  const best = new Set(data.frontiers[`${error}/${size}`]);
  const order = [...points].sort((a, b) => place(a)[0] - place(b)[0] || place(a)[1] - place(b)[1]);
  const spread = shape("line", { class: "spread" });
  const made = [...order].sort((a, b) => best.has(a.id) - best.has(b.id)).map(trial => {
    const [cx, cy] = place(trial), on = best.has(trial.id);
    const label = `${trial.name}: ${data.words[error]} ${trial.words[error]}, ${trial.words[size]}`;
    const circle = shape("circle", { cx, cy, r: on ? 5.5 : 4.5, class: on ? "point on" : "point", role: "button", tabindex: -1, "aria-label": label });
    if (trial.id === data.winner) picture.append(shape("circle", { cx, cy, r: 9.5, class: "ring" }));
    picture.append(circle);
    return { trial, circle, cx, cy };
  });
  picture.append(spread);
  const by = new Map(made.map(point => [point.trial, point])), row = order.map(trial => by.get(trial));
  const show = point => {
    made.forEach(other => other.circle.classList.toggle("near", other === point));
    showSpread(spread, point, y, error);
    point ? showCard(point.circle, point.trial) : ($("card").hidden = true);
  };
  const nearest = event => near(made, picture, event);
  picture.addEventListener("pointermove", event => show(nearest(event)));
  picture.addEventListener("pointerleave", () => show(null));
  picture.addEventListener("click", event => { const point = nearest(event); if (point) onTrial(point.trial, point.circle); });
  rove(row.map(point => point.circle), (i, key) => key === "ArrowRight" || key === "ArrowDown" ? i + 1 : i - 1);
  for (const point of row) {
    point.circle.addEventListener("focus", () => show(point));
    point.circle.addEventListener("blur", () => show(null));
    point.circle.addEventListener("keydown", event => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); onTrial(point.trial, point.circle); }
    });
  }
}

function near(points, picture, event) {
  const box = picture.getBoundingClientRect(), scale = picture.viewBox.baseVal.width / box.width;
  const [x, y] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  let best = null, least = 28 ** 2;
  for (const point of points) {
    const away = (point.cx - x) ** 2 + (point.cy - y) ** 2;
    if (away < least) [best, least] = [point, away];
  }
  return best;
}

function showSpread(line, point, y, error) {
  const { delta_low: low, delta_high: high } = point && error === "delta_nll" ? point.trial.metrics : {};
  line.style.display = low == null ? "none" : "";
  if (low == null) return;
  for (const [key, value] of [["x1", point.cx], ["x2", point.cx], ["y1", y.at(low)], ["y2", y.at(high)]]) line.setAttribute(key, value);
}

function showCard(anchor, trial) {
  const card = $("card"), box = anchor.getBoundingClientRect();
  card.replaceChildren(element("b", {}, trial.name), facts(trial.facts.slice(0, 8)));
  card.hidden = false;
  const left = Math.max(8, Math.min(box.left + 16, document.documentElement.clientWidth - card.offsetWidth - 8));
  const above = box.top - card.offsetHeight - 8;
  card.style.left = `${left}px`;
  card.style.top = `${above > 48 ? above : box.bottom + 10}px`;
}

function listFrontier(ids, error, size, onTrial) {
  $("frontier").replaceChildren(...ids.map(id => {
    const trial = trialOf.get(String(id));
    const button = element("button", { type: "button", className: "link", onclick: () => onTrial(trial, button) }, trial.name);
    const words = ` ${trial.words[size]}, ${data.words[error]} ${trial.words[error]}`;
    return element("li", {}, button, element("span", { className: "quiet" }, words));
  }));
}
