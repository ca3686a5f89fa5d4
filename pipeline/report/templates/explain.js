// The explorer: the tokens of a row, a map of all steps, sliders, and the panel of one step.

const MAP_STEP = 0.05;

const root = section.querySelector(".explorer");
const state = { row: null, steps: [], index: 0, settings: {}, colour: "rank", timer: 0 };
const view = {
  facts: make("div", { class: "row-facts" }),
  chips: make("div", { class: "chips", role: "toolbar", "aria-label": "Tokens of the row" }),
  legend: make("ul", { class: "key" }),
  map: make("figure", { class: "map" }),
  heading: make("h3", {}),
  recorded: make("div", {}),
  sliders: make("div", { class: "sliders" }),
  differs: make("p", { class: "note", "aria-live": "polite" }),
  result: make("div", { "aria-live": "polite" }),
  ribbon: make("div", {}),
  figures: make("div", {}),
  table: make("div", {}),
};

// -- the row --------------------------------------------------------------------------------------

function rowFacts(row) {
  const line = make("p", { class: "row-settings" });
  const add = (name, value) => line.append(make("span", {}, `${name} `, make("b", {}, value)));
  for (const [name, value] of Object.entries(row.settings)) add(name, settingText(name, value));
  for (const [name, text] of Object.entries(row.others)) add(name, shown(text));
  add("seed", row.seed);
  add("tokens", number(row.tokens));
  if (row.stop_reason) add("ended by", row.stop_reason);
  const notes = [];
  if (row.adjusted) {
    notes.push(
      "The settings of this row change logits. Logits, ranks and probabilities are of the " +
        "changed ones, which the sampler sees. The log probability is that of the model.",
    );
  }
  const others = state.steps.filter((step) => sample(step, row.settings).id !== step.data.token);
  if (others.length) {
    const why = reasons.length ? ` (${reasons.join(", ")})` : "";
    notes.push(
      `With the recorded settings, another token wins at ${number(others.length)} steps${why}: ` +
        "the logits differ from those of the run.",
    );
  }
  return [line, ...notes.map((text) => make("p", { class: "note" }, text))];
}

function chipOf(step) {
  const { data } = step;
  const chip = make("button", { type: "button", class: "chip", tabindex: "-1" });
  if (data.bytes) chip.append(make("span", { class: "bytes" }, data.bytes));
  else {
    const text = data.text.replaceAll("\n", "⏎").replaceAll("\t", "⇥");
    chip.append(shown(text || `#${data.token}`, "span"));
  }
  chip.addEventListener("focus", () => select(step.index));
  // Safari does not focus a button on a click.
  chip.addEventListener("click", () => chip.focus());
  return chip;
}

function drawChips() {
  const { row, steps } = state;
  const nodes = [];
  if (row.prompt_cut) nodes.push(make("span", { class: "count" }, "…"));
  const prompt = shown(row.prompt, "span");
  prompt.classList.add("prompt");
  nodes.push(prompt);
  state.chips = steps.map(chipOf);
  steps.forEach((step, index) => {
    nodes.push(state.chips[index]);
    if (step.data.text.endsWith("\n")) nodes.push(make("br", {}));
  });
  const left = row.tokens - steps.length;
  if (left) nodes.push(make("span", { class: "count" }, ` … and ${number(left)} more tokens`));
  view.chips.replaceChildren(...nodes);
  const margins = steps.map((step) => step.data.margin ?? Infinity);
  const smallest = margins.indexOf(Math.min(...margins));
  if (margins[smallest] < Infinity) state.chips[smallest].classList.add("smallest");
}

function colourChips() {
  const colour = COLOURS[state.colour];
  state.steps.forEach((step, index) => {
    const { classList } = state.chips[index];
    for (let i = 0; i < 5; i++) classList.toggle(`s${i}`, i === shade(colour, step.data));
  });
  const entry = (kind, text) => make("li", {}, make("span", { class: `chip ${kind}` }, " "), text);
  view.legend.replaceChildren(
    ...colour.labels.map((text, i) => entry(`s${i}`, text)),
    entry("smallest", "smallest margin"),
    entry("differs", "another token wins with these settings"),
  );
}

// Arrow keys move from token to token; up and down move by lines.
view.chips.addEventListener("keydown", (event) => {
  const { chips, index } = state;
  const box = chips[index].getBoundingClientRect();
  const onLine = (direction) => {
    let [nearest, smallest] = [index, Infinity];
    chips.forEach((chip, number) => {
      const one = chip.getBoundingClientRect();
      const down = (one.top - box.top) * direction;
      const distance = down * 1e4 + Math.abs(one.left - box.left);
      if (down > box.height / 2 && distance < smallest) [nearest, smallest] = [number, distance];
    });
    return nearest;
  };
  const targets = {
    ArrowRight: () => index + 1,
    ArrowLeft: () => index - 1,
    Home: () => 0,
    End: () => chips.length - 1,
    ArrowUp: () => onLine(-1),
    ArrowDown: () => onLine(1),
  };
  if (!(event.key in targets)) return;
  event.preventDefault();
  chips[targets[event.key]()]?.focus();
});

// -- the map of all steps -------------------------------------------------------------------------

// Steps are drawn some at a time, so that the sliders stay responsive.
function drawMap() {
  const { steps, settings } = state;
  const chart = draw("svg", {
    class: "steps", viewBox: `0 0 ${steps.length} ${highest}`, preserveAspectRatio: "none",
    role: "img", "aria-label": "For each step, the token that wins at each temperature",
  });
  state.now = draw("path", { class: "now" });
  state.here = draw("rect", { class: "here", y: 0, width: 1, height: highest });
  const drawSome = (first) => {
    const end = performance.now() + 30;
    let index = first;
    for (; index < steps.length && performance.now() < end; index++) {
      const column = mapColumn(steps[index], index, settings);
      state.now.before(...column);
    }
    state.timer = index < steps.length ? setTimeout(drawSome, 0, index) : 0;
  };
  chart.append(state.now, state.here);
  chart.addEventListener("click", (event) => {
    const box = chart.getBoundingClientRect();
    const index = Math.floor(((event.clientX - box.left) / box.width) * steps.length);
    state.chips[Math.min(Math.max(index, 0), steps.length - 1)].focus();
  });
  const scale = make("div", { class: "scale", "aria-hidden": "true" });
  for (let tick = highest; tick >= 0; tick--) scale.append(make("span", {}, String(tick)));
  const entry = (text, ...kinds) => {
    const swatches = kinds.map((kind) => {
      const swatch = draw("svg", { class: "swatch", viewBox: "0 0 10 10", "aria-hidden": "true" });
      swatch.append(draw("rect", { class: `bar ${kind}`, width: 10, height: 10 }));
      return swatch;
    });
    return make("li", {}, ...swatches, text);
  };
  view.map.replaceChildren(
    make("figcaption", {}, "The winner of each step (across) at each temperature (up)"),
    make("div", { class: "plot" }, scale, chart),
    make("ul", { class: "key" },
      entry("the recorded token", "c1"),
      entry("other tokens of the step, from the lowest temperature up", "c3", "c2", "c6", "c5"),
      make("li", {}, "dashed: the temperature of the slider")),
  );
  place();
  drawSome(0);
}

function mapColumn(step, index, settings) {
  const parts = ribbon(step, settings, highest, MAP_STEP);
  const classes = colours(parts, step.data.token);
  return parts.map(({ token, from, to }) => draw("rect", {
    class: `bar ${classes.get(token.id)}`, x: index + 0.04, width: 0.92,
    y: (highest - to).toFixed(3), height: (to - from).toFixed(3),
  }));
}

// Mark the temperature and the step in the map.
function place() {
  const at = highest - Math.min(state.settings.temperature, highest);
  state.now.setAttribute("d", `M0 ${at}H${state.steps.length}`);
  state.here.setAttribute("x", state.index);
}

// -- the sliders ----------------------------------------------------------------------------------

function drawSliders() {
  const { row } = state;
  state.inputs = Object.keys(row.settings).map((name) => {
    const stops = stopsOf(name, row.settings[name], row.vocab_size);
    const input = make("input", { type: "range", min: 0, max: stops.length - 1, step: 1 });
    const output = make("b", {});
    input.addEventListener("input", () => change({ [name]: stops[input.value] }));
    const show = () => {
      const value = state.settings[name];
      input.value = stops.reduce((near, stop, i) =>
        Math.abs(stop - value) < Math.abs(stops[near] - value) ? i : near, 0);
      const text = settingText(name, value);
      input.setAttribute("aria-valuetext", text);
      output.textContent = text;
      output.classList.toggle("changed", value !== row.settings[name]);
    };
    return { show, node: make("label", {}, make("span", {}, name, output), input) };
  });
  const reset = make("button", { type: "button" }, "As recorded");
  reset.addEventListener("click", () => change({ ...row.settings }));
  view.sliders.replaceChildren(...state.inputs.map(({ node }) => node), reset);
}

function change(settings) {
  const filters = ["top_k", "top_p", "min_p"];
  const isNew = filters.some((name) => name in settings && settings[name] !== state.settings[name]);
  Object.assign(state.settings, settings);
  for (const { show } of state.inputs) show();
  drawStep();
  place();
  let count = 0;
  state.steps.forEach((step, index) => {
    const differs = sample(step, state.settings).id !== step.data.token;
    state.chips[index].classList.toggle("differs", differs);
    count += differs;
  });
  const part = `${number(count)} of ${number(state.steps.length)} steps`;
  view.differs.textContent = count
    ? `With these settings, another token wins at ${part}, each after the recorded tokens.`
    : "With these settings, the recorded token wins at every step.";
  if (!isNew) return;
  clearTimeout(state.timer);
  state.timer = setTimeout(drawMap, 150);
}

// -- the step -------------------------------------------------------------------------------------

function select(index) {
  state.chips.forEach((chip, number) => {
    chip.tabIndex = number === index ? 0 : -1;
    chip.setAttribute("aria-pressed", String(number === index));
  });
  state.index = index;
  drawStep();
  place();
}

function drawStep() {
  const step = state.steps[state.index];
  const { settings } = state;
  const count = keptCount(step, settings);
  view.heading.replaceChildren(`Step ${step.index}: `, named(recordedToken(step)));
  view.recorded.replaceChildren(recordedFacts(step));
  view.result.replaceChildren(verdict(step, settings, count));
  view.ribbon.replaceChildren(
    ribbonFigure(step, settings, highest, (temperature) =>
      change({ temperature: Math.round(Math.min(temperature, 2) * 100) / 100 })),
  );
  view.figures.replaceChildren(figures(step, settings, count));
  view.table.replaceChildren(stepTable(step, settings, count, highest));
}

function open(row) {
  state.row = row;
  state.steps = row.steps.map((_, index) => {
    const step = readStep(row, index);
    return Object.assign(step, { vocabSize: row.vocab_size, adjusted: row.adjusted });
  });
  state.settings = { ...row.settings };
  state.index = 0;
  view.facts.replaceChildren(...rowFacts(row));
  drawChips();
  colourChips();
  drawSliders();
  clearTimeout(state.timer);
  drawMap();
  select(0);
  change({});
}

function choice(label, options, choose) {
  const list = make("select", {});
  options.forEach(([text], index) => list.append(make("option", { value: index }, text)));
  list.addEventListener("change", () => choose(options[list.value][1]));
  return make("label", {}, make("span", {}, label), list);
}

const controls = make("div", { class: "controls" });
if (rows.length > 1) {
  const options = rows.map((row) => {
    const sample = row.sample ? ` #${row.sample}` : "";
    return [shown(row.id).textContent + sample, row];
  });
  controls.append(choice("Row", options, open));
}
controls.append(
  choice("Colour", Object.keys(COLOURS).map((name) => [name, name]), (name) => {
    state.colour = name;
    colourChips();
  }),
);
root.append(
  controls, view.facts, view.chips, view.legend, view.map,
  make("div", { class: "step" },
    view.heading, view.recorded, view.sliders, view.differs, view.result, view.ribbon,
    view.figures, view.table),
);
open(rows[0]);
