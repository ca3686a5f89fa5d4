// A line across all charts of the section, moved by the pointer or the arrow keys, shows the values
// of one bin.
const { bin_s: width, charts } = report.data("time");
const svgs = [...section.querySelectorAll("svg[data-series]")];

function describe(name, index) {
  const from = report.duration(index * width);
  const values = charts[name].map(([label, list]) => report.number(list[index]) + " " + label);
  return from + ": " + values.join(", ");
}

function point(index) {
  for (const svg of svgs) {
    const name = svg.dataset.series;
    const left = Number(svg.dataset.left);
    const right = Number(svg.dataset.right);
    let line = svg.querySelector(".cursor");
    if (!line) {
      line = document.createElementNS("http://www.w3.org/2000/svg", "path");
      line.setAttribute("class", "cursor");
      svg.append(line);
    }
    const count = charts[name][0][1].length;
    const x = left + ((index + 0.5) / count) * (right - left);
    line.setAttribute("d", index === null ? "" : `M${x.toFixed(1)} 8V${svg.dataset.bottom}`);
    const readout = svg.closest("figure").querySelector(".readout");
    readout.textContent = index === null ? "" : describe(name, index);
  }
}

let current = null;
for (const svg of svgs) {
  const count = charts[svg.dataset.series][0][1].length;
  const at = (index) => Math.min(count - 1, Math.max(0, index));
  svg.setAttribute("tabindex", "0");
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const left = Number(svg.dataset.left);
    current = at(Math.floor(((x - left) / (Number(svg.dataset.right) - left)) * count));
    point(current);
  });
  svg.addEventListener("pointerleave", () => point((current = null)));
  svg.addEventListener("blur", () => point((current = null)));
  svg.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 };
    if (event.key === "Home") current = 0;
    else if (event.key === "End") current = count - 1;
    else if (event.key in steps) current = at((current === null ? 0 : current) + steps[event.key]);
    else return;
    event.preventDefault();
    point(current);
  });
}
