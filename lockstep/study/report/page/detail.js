// What is known of one site or one trial, beside the report.

let opener = null; // where the focus goes back to

/** Shows a site. */
function showSite(name, from) {
  const site = data.sites[name];
  const parts = [facts(site.facts)];
  const drawn = element("div");
  if (site.histogram) parts.push(element("h3", {}, "What calibration saw"), drawn);
  parts.push(element("h3", {}, "Grids that were tried"), site.grids.length ? grids(site) : element("p", { className: "quiet" }, "None."));
  open(name, parts, from);
  if (site.histogram) drawn.append(histogram(site.histogram, drawn.clientWidth));
}

/** Shows a trial. */
function showTrial(trial, from) {
  const status = trial.status === "done" ? [] : [["status", trial.status]];
  open(trial.name, [facts([...status, ...trial.facts]), element("h3", {}, "Plan"), element("pre", {}, trial.plan)], from);
}

function open(title, parts, from) {
  document.querySelector("[aria-current]")?.removeAttribute("aria-current");
  opener = from;
  from.setAttribute("aria-current", "true");
  $("detail-title").textContent = title;
  $("detail-body").replaceChildren(...parts);
  $("card").hidden = true;
  if (!$("detail").open) $("detail").show();
  $("detail").scrollTop = 0;
  if (from.closest(".heats")) from.focus(); // so that arrow keys go on to the next cell
  else $("close").focus();
  $("said").textContent = `${title} is shown.`;
}

/** Closes it; the focus goes back to what opened it. */
function closeDetail() {
  if (!$("detail").open) return;
  $("detail").close();
  opener?.removeAttribute("aria-current");
  opener?.focus();
}

/** A row for each grid; under it what else is known of it, and of each head that has a grid of its own. */
function grids(site) {
  const made = table(site.heads, site.grids.map(grid => grid.row));
  const rows = [...made.tBodies[0].rows];
  site.grids.forEach((grid, i) => rows[i].after(more(site, grid)));
  return element("div", { className: "scroll-x" }, made);
}

function more(site, grid) {
  const cell = element("td", { colSpan: site.heads.length }, element("small", {}, grid.more));
  if (grid.by_head.length) {
    const inner = table(["head", ...site.every.slice(1)], grid.by_head);
    cell.append(element("details", {}, element("summary", {}, `${grid.by_head.length} heads`), inner));
  }
  return element("tr", { className: "more" }, cell);
}

function table(heads, rows) {
  const head = element("tr", {}, ...heads.map(word => element("th", { scope: "col" }, word)));
  const body = rows.map(row => element("tr", {}, ...row.map(text => element("td", {}, text))));
  return element("table", {}, element("thead", {}, head), element("tbody", {}, ...body));
}

/** Bars whose widths are those of the bins; heights are logarithms, because tails matter. */
function histogram({ edges, counts }, width) {
  const height = 150, floor = height - 22;
  const picture = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  const [low, high] = [edges[0], edges.at(-1)], most = Math.log1p(Math.max(...counts, 1));
  const x = value => 4 + (value - low) / (high - low || 1) * (width - 8);
  picture.setAttribute("aria-label", `Histogram from ${tickText(low)} to ${tickText(high)}, heights logarithmic`);
  counts.forEach((count, i) => {
    if (!count) return;
    const tall = Math.max(1, Math.log1p(count) / most * (floor - 6)), wide = Math.max(1, x(edges[i + 1]) - x(edges[i]) - 0.5);
    picture.append(shape("rect", { x: x(edges[i]), y: floor - tall, width: wide, height: tall, class: "count" }));
  });
  picture.append(shape("line", { x1: 4, x2: width - 4, y1: floor, y2: floor, class: "axis" }));
  const ends = [[low, "start"], [high, "end"]];
  if (low < 0 && high > 0 && x(0) > 60 && x(0) < width - 60) ends.push([0, "middle"]);
  for (const [value, anchor] of ends)
    picture.append(shape("text", { x: x(value), y: height - 5, "text-anchor": anchor }, tickText(value)));
  return picture;
}
