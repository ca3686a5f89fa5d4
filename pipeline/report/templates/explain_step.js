// What the explorer shows of one step.

const { make, number, shown } = report;
const RIBBON_STEP = 0.01;

// Return an SVG element.
function draw(name, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

// Return a token's text with visible spaces and line ends, its bytes if it is part of a character,
// or its id if it has no text.
function named({ id, text, bytes }) {
  const visible = text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
  const node = bytes ? make("span", {}, bytes) : shown(visible || `#${id}`, "span");
  node.className = bytes ? "token bytes" : "token text";
  node.title = bytes ? `token ${id}, bytes of a part of a character` : `token ${id}`;
  return node;
}

const recordedToken = ({ data }) => ({ id: data.token, text: data.text, bytes: data.bytes });

function percent(share) {
  if (share === null) return "";
  if (share >= 0.9995) return "100 %";
  return share >= 1e-4 ? `${Number((share * 100).toPrecision(3))} %` : share.toExponential(1);
}

const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);
const fixed = (value) => (value < 0 ? "−" : "") + Math.abs(value).toFixed(2);

// Whole numbers are exact; the filters cut a segment at an estimate.
const isExact = (step, count) => step.groups.some((group) => group.end === count);

// Return a class of colour for each token of a ribbon: c1 is the recorded one.
function colours(parts, recorded) {
  const others = ["c3", "c2", "c6", "c5", "c4"];
  const classes = new Map([[recorded, "c1"]]);
  for (const { token } of parts) {
    if (!classes.has(token.id)) classes.set(token.id, others[(classes.size - 1) % others.length]);
  }
  return classes;
}

function pairs(entries) {
  const list = make("dl", { class: "pairs facts" });
  for (const [name, ...content] of entries) {
    list.append(make("div", {}, make("dt", {}, name), make("dd", {}, ...content)));
  }
  return list;
}

// The figures of `replay --trace`, at the settings of the row.
function recordedFacts(step) {
  const { data } = step;
  const runnersUp = data.runners_up.flatMap(([id, text, bytes, probability], index) => [
    index ? ", " : "",
    named({ id, text, bytes }),
    ` ${percent(probability)}`,
  ]);
  return pairs([
    ["rank", number(data.rank)],
    ["log probability", number(data.logprob).replace("-", "−")],
    ["probability among the kept", percent(data.probability)],
    ["kept tokens", number(data.kept)],
    ["decision margin", data.margin === null ? "no other token" : number(data.margin)],
    ["runners-up", ...(runnersUp.length ? runnersUp : ["none"])],
  ]);
}

// The bar of the tokens that win from temperature 0 to `highest`.
function ribbonFigure(step, settings, highest, choose) {
  const parts = ribbon(step, settings, highest, RIBBON_STEP);
  const classes = colours(parts, step.data.token);
  const chart = draw("svg", {
    class: "ribbon", viewBox: `0 0 ${highest * 100} 10`, preserveAspectRatio: "none", role: "img",
    "aria-label": `The token that wins at temperatures 0 to ${highest}`,
  });
  const key = make("ol", { class: "key" });
  for (const { token, from, to } of parts) {
    chart.append(draw("rect", {
      class: `bar ${classes.get(token.id)}`, x: from * 100, width: (to - from) * 100, height: 10,
    }));
    const range =
      parts.length === 1 ? "at every temperature" : `${from.toFixed(2)} to ${to.toFixed(2)}`;
    const swatch = draw("svg", { class: "swatch", viewBox: "0 0 10 10", "aria-hidden": "true" });
    swatch.append(draw("rect", { class: `bar ${classes.get(token.id)}`, width: 10, height: 10 }));
    const note = token.id === step.data.token ? " (recorded)" : "";
    key.append(make("li", {}, swatch, named(token), ` ${range}${note}`));
  }
  const at = Math.min(settings.temperature, highest) * 100;
  chart.append(draw("path", { class: "now", d: `M${at} 0V10` }));
  chart.addEventListener("click", (event) => {
    const box = chart.getBoundingClientRect();
    choose(((event.clientX - box.left) / box.width) * highest);
  });
  const scale = make("div", { class: "scale", "aria-hidden": "true" });
  for (let tick = 0; tick <= highest; tick++) scale.append(make("span", {}, String(tick)));
  return make("figure", { class: "step-ribbon" },
    make("figcaption", {}, "The winner of this step at each temperature"),
    chart, scale, key);
}

// The sentence about the winner.
function verdict(step, settings, count) {
  const [best, second] = bestTwo(step, count, settings.temperature);
  const { token } = best;
  const line = make("p", { class: "verdict" }, named(token));
  if (second) {
    line.append(` wins by ${number(best.score - second.score)} over `, named(second.token));
  } else line.append(" is the only token that the filters keep");
  const isRecorded = token.id === step.data.token;
  line.append(isRecorded ? ", as in the run." : ". In the run, ");
  if (!isRecorded) line.append(named(recordedToken(step)), " won.");
  line.classList.add(isRecorded ? "same" : "other");
  const noise = `${number(settings.temperature)} × noise ${fixed(token.noise)}`;
  const formula = `logit ${fixed(token.logit)} + ${noise} = ${fixed(best.score)}`;
  line.append(make("small", {}, formula));
  return line;
}

function figures(step, settings, count) {
  const before = summarize(step, step.size, 1);
  const after = summarize(step, count, settings.temperature);
  const about = isExact(step, count) ? "" : "about ";
  const choices = (entropy) => number(Math.exp(entropy));
  const forbidden = step.vocabSize - step.size;
  return pairs([
    ["kept tokens", `${about}${number(Math.round(count))} of ${number(step.size)}`],
    ["kept probability mass", after.share === null ? "greedy" : about + percent(after.share)],
    [
      "entropy, before → after",
      `${number(before.entropy)} → ${about}${number(after.entropy)} nats`,
    ],
    ["effective choices", `${choices(before.entropy)} → ${about}${choices(after.entropy)}`],
    ...(forbidden ? [["forbidden tokens", number(forbidden)]] : []),
  ]);
}

// The tokens of the table: the likeliest, and those that win somewhere, by logit.
function tableTokens(step, settings, count, highest, likely) {
  const chosen = new Set(step.tokens.slice(0, likely));
  for (const { token } of ribbon(step, settings, highest, RIBBON_STEP)) chosen.add(token);
  for (const one of bestTwo(step, count, settings.temperature)) if (one) chosen.add(one.token);
  for (const token of step.tokens) if (token.id === step.data.token) chosen.add(token);
  return step.tokens.filter((token) => chosen.has(token));
}

function bar(className, from, to) {
  return draw("rect", {
    class: className, x: Math.min(from, to).toFixed(2), y: 3,
    width: Math.max(0.4, Math.abs(to - from)).toFixed(2), height: 10,
  });
}

const barChart = () =>
  draw("svg", {
    class: "cell-bar", viewBox: "0 0 100 16", preserveAspectRatio: "none", "aria-hidden": "true",
  });

// Before as an outline, after as a filled bar.
function probabilityBar(before, after, largest) {
  const chart = barChart();
  if (after) chart.append(bar("bar c1", 0, (after / largest) * 100));
  chart.append(bar("before", 0, (before / largest) * 100));
  return chart;
}

// The logit, and the noise from its end to the score.
function scoreBar(token, temperature, [low, high], best) {
  const at = (value) => ((value - low) / (high - low)) * 100;
  const chart = barChart();
  const score = scoreOf(token, temperature);
  chart.append(bar("bar c5", 0, at(token.logit)));
  const noise = bar(score < token.logit ? "bar loss" : "bar c2", at(token.logit), at(score));
  if (score !== token.logit) chart.append(noise);
  chart.append(draw("path", { class: "now", d: `M${at(best).toFixed(2)} 0V16` }));
  return chart;
}

function stepTable(step, settings, count, highest) {
  const { temperature } = settings;
  const tokens = tableTokens(step, settings, count, highest, 20);
  const [best] = bestTwo(step, count, temperature);
  const all = summarize(step, step.size, 1).total;
  const kept = summarize(step, count, temperature).total;
  const before = (token) => Math.exp(token.logit - step.largest) / all;
  const after = (token) => {
    if (token.place >= count) return 0;
    if (temperature === 0) return token === best.token ? 1 : 0;
    return Math.exp((token.logit - step.largest) / temperature) / kept;
  };
  const largest = Math.max(...tokens.map((token) => Math.max(before(token), after(token))));
  const ends = tokens.flatMap((token) => [token.logit, scoreOf(token, temperature)]);
  const range = [Math.min(...ends) - 0.5, Math.max(...ends) + 0.1];
  const body = make("tbody", {});
  let wasKept = true;
  for (const token of tokens) {
    const isKept = token.place < count;
    const notes = [
      isKept ? "" : "left-out",
      wasKept && !isKept ? "first-left-out" : "",
      token === best.token ? "winner" : "",
    ];
    wasKept = isKept;
    const own = step.adjusted
      ? [make("td", { class: "wide-cell" }, token.own === undefined ? "" : fixed(token.own))]
      : [];
    const marks = [
      token === best.token ? make("span", { class: "mark" }, "wins") : null,
      token.id === step.data.token ? make("span", { class: "mark recorded" }, "recorded") : null,
    ];
    body.append(make("tr", { class: notes.join(" ").trim() || null },
      make("td", { class: "place" }, number(token.place + 1)),
      make("th", { scope: "row" }, named(token), ...marks),
      make("td", { class: "bars" }, probabilityBar(before(token), after(token), largest)),
      make("td", { class: "wide-cell" }, percent(before(token))),
      make("td", {}, isKept ? percent(after(token)) : "left out"),
      make("td", { class: "bars" }, scoreBar(token, temperature, range, best.score)),
      ...own,
      make("td", { class: "wide-cell" }, fixed(token.logit)),
      make("td", { class: "wide-cell" }, signed(temperature * token.noise)),
      make("td", { class: "wide-cell" }, fixed(scoreOf(token, temperature)))));
  }
  const heads = [
    ["rank", ""], ["token", ""], ["probability", "bars"], ["before", "wide-cell"], ["after", ""],
    ["logit + temperature × noise", "bars"],
    ...(step.adjusted ? [["model's logit", "wide-cell"]] : []),
    ["logit", "wide-cell"], ["T × noise", "wide-cell"], ["score", "wide-cell"],
  ];
  const head = make("tr", {});
  for (const [text, kind] of heads) {
    head.append(make("th", { scope: "col", class: kind || null }, text));
  }
  const label = "The likeliest tokens and those that can win";
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label },
    make("table", { class: "tokens" }, make("thead", {}, head), body));
}
