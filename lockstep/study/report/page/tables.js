// Tables that can be sorted, and groups of which one member is in the tab order.

/** Makes the heads of a table buttons that sort it. */
function makeSortable(table) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = element("button", { type: "button", onclick: () => sortBy(table, head, column) }, head.textContent);
    head.replaceChildren(button);
  });
}

function sortBy(table, head, column) {
  const up = head.getAttribute("aria-sort") !== "ascending", body = table.tBodies[0];
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const order = (a, b) => compare(valueOf(a.cells[column]), valueOf(b.cells[column]), up);
  body.append(...[...body.rows].sort(order));
}

function valueOf(cell) {
  if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
  return cell.classList.contains("number") ? null : cell.textContent;
}

/** What is not there comes last, up or down. */
function compare(a, b, up) {
  if (a === null || b === null) return (a === null) - (b === null);
  const order = typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
  return up ? order : -order;
}

/** One of the elements is in the tab order; arrow keys go to others. next: (index, key) gives an index. */
function rove(elements, next) {
  elements.forEach((one, i) => {
    one.tabIndex = i ? -1 : 0;
    one.addEventListener("focus", () => elements.forEach(other => { other.tabIndex = other === one ? 0 : -1; }));
    one.addEventListener("keydown", event => {
      if (!event.key.startsWith("Arrow")) return;
      const other = elements[next(i, event.key)];
      event.preventDefault();
      other?.focus();
    });
  });
}

/** Arrow keys go over a heat map, past cells that are empty. */
function makeHeatMap(table) {
  const buttons = [...table.querySelectorAll("button")];
  const at = new Map(buttons.map(b => [`${b.closest("tr").rowIndex},${b.closest("td").cellIndex}`, b]));
  const most = Math.max(table.rows.length, table.rows[0].cells.length);
  rove(buttons, (i, key) => {
    const [dy, dx] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[key];
    const [y, x] = [buttons[i].closest("tr").rowIndex, buttons[i].closest("td").cellIndex];
    for (let far = 1; far <= most; far++) {
      const found = at.get(`${y + dy * far},${x + dx * far}`);
      if (found) return buttons.indexOf(found);
    }
    return i;
  });
}
