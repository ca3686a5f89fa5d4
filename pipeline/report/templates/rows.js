const { make, number, shown, duration } = report;
const { rows, unit, cut, output, with_text: withText } = report.data("rows");

const seconds = (row) =>
  row.prefill_s === undefined ? null : row.prefill_s + (row.decode_s ?? 0);
const ended = (row) => row.stop_reason ?? row.finish_reason;
const groups = [...new Set(rows.flatMap((row) => row.groups))];
const ends = [...new Set(rows.map(ended))].sort();

function name(row) {
  const label = shown(row.prompt_id);
  if (row.sample_index) label.append(make("small", {}, ` #${row.sample_index}`));
  return label;
}

function excerpt(row) {
  const node = make("div", { class: "excerpt" });
  if (row.error !== undefined) node.append(make("span", { class: "error" }, shown(row.error)));
  else {
    const start = shown((row.prompt ?? "").slice(-60).replaceAll("\n", "⏎"));
    start.classList.add("prompt");
    node.append(start, shown((row.completion ?? "").slice(0, 160).replaceAll("\n", "⏎")));
  }
  return node;
}

const textBlock = (row, field, title) => report.textBlock(row, field, title, cut);

const TIMES = ["queue_s", "prefill_s", "decode_s", "total_s", "time_to_first_token_s"];
const IN_TEXT = ["prompt", "completion", "error", "metadata", "groups", "cut", "token_logprobs"];

function value(row, key) {
  if (TIMES.includes(key)) return duration(row[key]);
  return typeof row[key] === "number" ? number(row[key], 5) : shown(String(row[key]));
}

// A bar per token, as high as its negative log probability.
function logprobs(row) {
  if (!row.token_logprobs || !row.token_logprobs.length) return null;
  const NAMESPACE = "http://www.w3.org/2000/svg";
  const list = row.token_logprobs.map((item) => -(item ?? 0));
  const high = Math.max(1, ...list);
  const chart = document.createElementNS(NAMESPACE, "svg");
  chart.setAttribute("class", "logprobs");
  chart.setAttribute("viewBox", `0 0 ${list.length * 4} 40`);
  chart.setAttribute("preserveAspectRatio", "none");
  chart.setAttribute("role", "img");
  chart.setAttribute("aria-label", "Negative log probability of each token");
  const path = document.createElementNS(NAMESPACE, "path");
  path.setAttribute("class", "bar c3");
  path.setAttribute(
    "d",
    list.map((item, index) => `M${index * 4} 40V${(40 - (item / high) * 40).toFixed(1)}h3V40Z`).join(""),
  );
  chart.append(path);
  const title = `Negative log probability of each token, up to ${number(high)} nats`;
  return make("div", { class: "block" }, make("h4", {}, title), chart);
}

function details(row) {
  const list = make("dl", { class: "pairs" });
  for (const key of Object.keys(row)) {
    if (IN_TEXT.includes(key)) continue;
    list.append(make("div", {}, make("dt", {}, key), make("dd", {}, value(row, key))));
  }
  const quoted = (text) => "'" + text.replaceAll("'", "'\\''") + "'";
  const sample = row.sample_index ? ` --sample ${row.sample_index}` : "";
  const command = `gptbatch replay ${quoted(output)} --prompt-id ${quoted(row.prompt_id)}${sample}`;
  return [
    textBlock(row, "error", "Error"),
    textBlock(row, "prompt", "Prompt"),
    textBlock(row, "completion", "Completion"),
    logprobs(row),
    textBlock(row, "metadata", "Metadata"),
    list,
    make("p", { class: "note" }, `Among the rows as: ${row.groups.join(", ")}.`),
    row.error === undefined
      ? make("p", { class: "note" }, "Each token explained: ", shown(command, "code"))
      : null,
  ].filter(Boolean);
}

const any = ["all", () => true];
report.browser(section.querySelector(".browser"), {
  rows,
  noun: unit,
  columns: [
    { title: "id", value: (row) => row.prompt_index * 1e4 + row.sample_index, cell: name },
    { title: "ended by", value: ended, cell: ended },
    { title: "prompt", number: true, wide: true, value: (row) => row.prompt_tokens, cell: (row) => number(row.prompt_tokens) },
    { title: "new", number: true, value: (row) => row.completion_tokens, cell: (row) => number(row.completion_tokens) },
    { title: "time", number: true, wide: true, value: seconds, cell: (row) => duration(seconds(row)) },
    { title: "margin", number: true, wide: true, value: (row) => row.min_decision_margin, cell: (row) => number(row.min_decision_margin) },
    { title: withText ? "text" : "error", value: (row) => row.completion ?? row.error ?? null, cell: excerpt },
  ],
  filters: [
    { label: "Rows", options: [any, ...groups.map((group) => [group, (row) => row.groups.includes(group)])] },
    { label: "Ended by", options: [any, ...ends.map((end) => [end, (row) => ended(row) === end])] },
  ],
  searched: (row) =>
    [row.prompt_id, row.prompt, row.completion, row.error, row.metadata, row.seed].join("\n"),
  details,
});
