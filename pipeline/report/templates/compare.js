const { make, number, shown, cutNote, textBlock } = report;
const { pairs, unit, cut, with_text: withText } = report.data("compare");
const root = section.querySelector(".browser");
const kinds = [...new Set(pairs.map((pair) => pair.kind))].sort();

const token = (id) => (id === null ? "end" : String(id));

function name(pair) {
  const label = shown(pair.a.prompt_id);
  if (pair.a.sample_index) label.append(make("small", {}, ` #${pair.a.sample_index}`));
  return label;
}

// A completion: what both have is grey, the rest is marked.
function text(row) {
  const node = make("div", { class: "text" });
  if (row.error !== undefined) {
    node.append(make("span", { class: "error" }, shown(row.error)));
    node.append(cutNote(row, "error", cut) ?? "");
    return node;
  }
  const completion = row.completion ?? "";
  const block = make("pre", { class: "text" });
  if (row.skipped)
    block.append(make("span", { class: "equal" }, `… ${number(row.skipped)} equal characters …`));
  const equal = shown(completion.slice(0, row.equal), "span");
  equal.classList.add("equal");
  const rest = shown(completion.slice(row.equal), "mark");
  block.append(equal, completion.length > row.equal ? rest : "");
  node.append(block);
  if (row.cut?.completion !== undefined)
    node.append(make("p", { class: "note" }, `Cut after ${number(cut)} characters.`));
  return node;
}

function details(pair) {
  const prompts = pair.same_prompt
    ? [textBlock(pair.a, "prompt", "Prompt", cut)]
    : [
        textBlock(pair.a, "prompt", "Prompt of A", cut),
        textBlock(pair.b, "prompt", "Prompt of B", cut),
      ];
  const beside = make("div", { class: "beside" });
  for (const [label, row] of [["A", pair.a], ["B", pair.b]]) {
    const facts = [
      row.stop_reason ?? row.finish_reason,
      number(row.completion_tokens) + " tokens",
      row.min_decision_margin === undefined ? null : "margin " + number(row.min_decision_margin),
    ].filter(Boolean);
    const title = make("h4", {}, make("span", { class: `name-${label.toLowerCase()}` }, label));
    title.append(" " + facts.join(", "));
    beside.append(make("div", {}, title, withText || row.error !== undefined ? text(row) : ""));
  }
  return [...prompts.filter(Boolean), beside];
}

function excerpt(pair) {
  const node = make("div", { class: "excerpt" });
  const [a, b] = [pair.a, pair.b].map((row) =>
    (row.error ?? row.completion ?? "").slice(row.error === undefined ? row.equal : 0).slice(0, 60),
  );
  node.append(shown(a.replaceAll("\n", "⏎")), make("b", {}, " / "), shown(b.replaceAll("\n", "⏎")));
  return node;
}

if (root)
  report.browser(root, {
    rows: pairs,
    noun: unit,
    columns: [
      { title: "id", value: (pair) => pair.a.prompt_index * 1e4 + pair.a.sample_index, cell: name },
      { title: "differs by", value: (pair) => pair.kind, cell: (pair) => pair.kind },
      {
        title: "first token",
        number: true,
        value: (pair) => pair.token_index,
        cell: (pair) => number(pair.token_index),
      },
      {
        title: "A / B",
        wide: true,
        value: (pair) => pair.token_a,
        cell: (pair) =>
          pair.token_index === null ? "" : `${token(pair.token_a)} / ${token(pair.token_b)}`,
      },
      {
        title: "margin",
        number: true,
        value: (pair) => pair.margin,
        cell: (pair) => number(pair.margin),
      },
      { title: "from the first difference", value: () => 0, cell: excerpt },
    ],
    filters: [
      {
        label: "Differs by",
        options: [
          ["all", () => true],
          ...kinds.map((kind) => [kind, (pair) => pair.kind === kind]),
        ],
      },
    ],
    searched: ({ a, b }) =>
      [a.prompt_id, a.prompt, a.completion, b.prompt, b.completion, a.error, b.error].join("\n"),
    details,
  });
