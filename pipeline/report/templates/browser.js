// report.browser(root, options) builds a table with search, filters, sorting and 50 rows at a time.
//
// options: rows; noun; columns, each {title, value(row), cell(row), number, wide}; filters, each
// {label, options: [[text, test(row)], ...]}; searched(row), the text to search in; details(row),
// the nodes below an opened row.
report.browser = function (root, options) {
  const { make } = report;
  const PER_VIEW = 50;
  const state = { sort: null, descending: false, first: 0 };
  const texts = new Map();

  const search = make("input", { type: "search", spellcheck: "false", autocomplete: "off" });
  const selects = options.filters.map((filter) => {
    const select = make("select", {});
    filter.options.forEach(([text], index) =>
      select.append(make("option", { value: index }, text)),
    );
    return select;
  });
  const count = make("output", { class: "count", "aria-live": "polite" });
  const previous = make("button", { type: "button" }, "Previous");
  const next = make("button", { type: "button" }, "Next");
  const head = make("tr", {});
  const body = make("tbody", {});
  const buttons = options.columns.map((column, index) => {
    const button = make("button", { type: "button", class: "sort" }, column.title);
    button.addEventListener("click", () => {
      state.descending = state.sort === index ? !state.descending : Boolean(column.number);
      state.sort = index;
      state.first = 0;
      draw();
    });
    const kind = [column.number && "number", column.wide && "wide-cell"].filter(Boolean).join(" ");
    head.append(make("th", { scope: "col", class: kind || null }, button));
    return button;
  });

  function text(row) {
    if (!texts.has(row)) texts.set(row, options.searched(row).toLowerCase());
    return texts.get(row);
  }

  function chosen() {
    const words = search.value.toLowerCase();
    const tests = selects.map((select, index) => options.filters[index].options[select.value][1]);
    const rows = options.rows.filter(
      (row) => tests.every((test) => test(row)) && (!words || text(row).includes(words)),
    );
    if (state.sort === null) return rows;
    const { value } = options.columns[state.sort];
    const sign = state.descending ? -1 : 1;
    const isMissing = (key) => key === null || key === undefined;
    return rows
      .map((row) => [value(row), row])
      .sort(([a], [b]) => {
        if (isMissing(a) || isMissing(b)) return isMissing(a) - isMissing(b);
        return sign * (typeof a === "number" ? a - b : a < b ? -1 : a > b ? 1 : 0);
      })
      .map(([, row]) => row);
  }

  function toggle(row, line, button) {
    const isOpen = button.getAttribute("aria-expanded") === "true";
    button.setAttribute("aria-expanded", String(!isOpen));
    if (isOpen) line.nextElementSibling.remove();
    else {
      const cell = make("td", { colspan: options.columns.length });
      cell.append(...options.details(row));
      line.after(make("tr", { class: "details" }, cell));
    }
  }

  function line(row) {
    const node = make("tr", {});
    options.columns.forEach((column, index) => {
      const content = column.cell(row);
      const kind = [column.number && "number", column.wide && "wide-cell"].filter(Boolean).join(" ");
      if (index) {
        node.append(make("td", { class: kind || null }, content));
        return;
      }
      const button = make("button", { type: "button", class: "open", "aria-expanded": "false" });
      button.append(content);
      button.addEventListener("click", () => toggle(row, node, button));
      node.append(make("th", { scope: "row" }, button));
    });
    return node;
  }

  function draw() {
    const rows = chosen();
    state.first = Math.min(state.first, Math.max(0, rows.length - 1));
    state.first -= state.first % PER_VIEW;
    const last = Math.min(state.first + PER_VIEW, rows.length);
    body.replaceChildren(...rows.slice(state.first, last).map(line));
    count.textContent = rows.length
      ? `${state.first + 1} to ${last} of ${report.number(rows.length)} ${options.noun}`
      : `no ${options.noun}`;
    previous.disabled = state.first === 0;
    next.disabled = last >= rows.length;
    buttons.forEach((button, index) => {
      const order = index !== state.sort ? "none" : state.descending ? "descending" : "ascending";
      button.parentElement.setAttribute("aria-sort", order);
    });
  }

  function restart() {
    state.first = 0;
    draw();
  }

  let timer = 0;
  search.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(restart, 80);
  });
  for (const select of selects) select.addEventListener("change", restart);
  previous.addEventListener("click", () => {
    state.first -= PER_VIEW;
    draw();
  });
  next.addEventListener("click", () => {
    state.first += PER_VIEW;
    draw();
  });
  // Arrow keys move from row to row.
  body.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step || !event.target.classList.contains("open")) return;
    const all = [...body.querySelectorAll("button.open")];
    const target = all[all.indexOf(event.target) + step];
    if (target) target.focus();
    event.preventDefault();
  });

  const controls = make("div", { class: "controls", role: "search" });
  controls.append(make("label", {}, make("span", {}, "Search"), search));
  selects.forEach((select, index) =>
    controls.append(make("label", {}, make("span", {}, options.filters[index].label), select)),
  );
  controls.append(make("div", { class: "places" }, count, previous, next));
  const table = make("table", { class: "rows" }, make("thead", {}, head), body);
  root.append(controls, make("div", { class: "scroll" }, table));
  draw();
};

// "/" moves to the search of the first browser in view; without one, of the first browser.
addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.target.matches("input, select, textarea")) return;
  const browsers = [...document.querySelectorAll(".browser")];
  const inView = browsers.find((browser) => {
    const { top, bottom } = browser.getBoundingClientRect();
    return top < innerHeight && bottom > 0;
  });
  const browser = inView ?? browsers[0];
  if (!browser) return;
  event.preventDefault();
  browser.querySelector("input[type=search]").focus();
});
