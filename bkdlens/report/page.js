// Draws a figure when it comes near the window, all of them before printing, and fits them to paper.
"use strict";
const specs = new Map();
for (const box of document.querySelectorAll(".plot"))
  specs.set(box, JSON.parse(document.getElementById(box.id + "-data").textContent));
const config = {responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "",
  displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
  modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"]};
function draw(box) {
  const spec = specs.get(box);
  if (!spec) return;
  specs.delete(box);
  Plotly.newPlot(box, spec.data, spec.layout, config);
}
const boxes = [...specs.keys()];
if ("IntersectionObserver" in window) {
  const observer = new IntersectionObserver(entries => {
    for (const entry of entries)
      if (entry.isIntersecting) { observer.unobserve(entry.target); draw(entry.target); }
  }, {rootMargin: "600px"});
  boxes.forEach(box => observer.observe(box));
} else boxes.forEach(draw);
for (const link of document.querySelectorAll("a[data-csv]")) {
  const text = document.getElementById(link.dataset.csv).content.textContent;
  link.href = URL.createObjectURL(new Blob([text], {type: "text/csv"}));
}
for (const box of document.querySelectorAll(".search")) {
  const rows = [...box.parentElement.querySelectorAll("tbody tr")];
  box.querySelector("input").addEventListener("input", event => {
    const wanted = event.target.value.toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
    box.querySelector("output").value = `${rows.filter(row => !row.hidden).length} of ${rows.length}`;
  });
}
window.addEventListener("beforeprint", () => {
  document.body.classList.add("paper");
  for (const fold of document.querySelectorAll("details.record, #ab details")) fold.open = true;
  for (const box of boxes) {
    draw(box);
    Plotly.relayout(box, {width: box.clientWidth, autosize: false});
  }
});
window.addEventListener("afterprint", () => {
  document.body.classList.remove("paper");
  for (const box of boxes) Plotly.relayout(box, {width: null, autosize: true});
});
