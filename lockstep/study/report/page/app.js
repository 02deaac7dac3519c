// Ties the parts together.

for (const hidden of document.querySelectorAll("[data-scripted]")) hidden.hidden = false;
document.querySelectorAll("table.sortable").forEach(makeSortable);
document.querySelectorAll("table.heats").forEach(makeHeatMap);

document.addEventListener("click", event => {
  const button = event.target.closest("[data-site], [data-trial]");
  if (!button) return;
  if (button.dataset.site !== undefined) showSite(button.dataset.site, button);
  else showTrial(trialOf.get(button.dataset.trial), button);
});
document.addEventListener("keydown", event => { if (event.key === "Escape") closeDetail(); });
$("close").addEventListener("click", closeDetail);

if ($("plot")) {
  const draw = () => drawPlot(showTrial);
  $("plot-error").addEventListener("change", draw);
  $("plot-size").addEventListener("change", draw);
  let width = 0;
  new ResizeObserver(() => { if ($("plot").clientWidth !== width) { width = $("plot").clientWidth; draw(); } }).observe($("plot"));
}

$("copy")?.addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText($("winner").textContent);
    $("copy").textContent = "Copied";
  } catch { // a page of a file may not be allowed to: the text is selected instead
    getSelection().selectAllChildren($("winner"));
    $("copy").textContent = "Selected";
  }
});
