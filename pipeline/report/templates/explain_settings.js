// How the explorer colours tokens, and the values of its sliders.

const {
  rows, level_tokens: levelTokens, large_top_ks: largeTopKs, highest, reasons,
} = report.data("explorer");

const COLOURS = {
  rank: {
    value: (data) => data.rank,
    limits: [1, 10, 100, 1000],
    labels: ["rank 1", "2 to 10", "to 100", "to 1,000", "beyond"],
  },
  probability: {
    value: (data) => -data.probability,
    limits: [-0.5, -0.2, -0.05, -0.01],
    labels: ["from 50 %", "from 20 %", "from 5 %", "from 1 %", "below"],
  },
  margin: {
    value: (data) => -(data.margin ?? Infinity),
    limits: [-1, -0.3, -0.1, -0.01],
    labels: ["from 1", "from 0.3", "from 0.1", "from 0.01", "below"],
  },
};

function shade({ value, limits }, data) {
  const found = limits.findIndex((limit) => value(data) <= limit);
  return found < 0 ? limits.length : found;
}

// The values of the sliders, in order; the recorded one is among them.
function stopsOf(name, recorded, vocabSize) {
  const decades = (from, to, digits) => {
    const found = [];
    for (let power = from; power <= to; power++) {
      for (const digit of digits) found.push(Number(`${digit}e${power}`));
    }
    return found;
  };
  const order = (value) => (name === "top_k" && value === 0 ? Infinity : value);
  const values = {
    temperature: () => Array.from({ length: 201 }, (_, i) => i / 100),
    top_k: () => [
      ...decades(0, 0, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
      ...decades(1, 2, [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8]).filter((k) => k <= levelTokens),
      ...largeTopKs.filter((k) => k < vocabSize),
      0,
    ],
    top_p: () => [...Array.from({ length: 99 }, (_, i) => (i + 1) / 100), 0.995, 0.999, 1],
    min_p: () => [0, ...decades(-4, -1, [1, 1.5, 2, 3, 5, 7]), 1],
  }[name]();
  return [...new Set([...values, recorded])].sort((a, b) => order(a) - order(b));
}

function settingText(name, value) {
  if (name === "top_k" && value === 0) return "all";
  if ((name === "top_p" && value === 1) || (name === "min_p" && value === 0)) return "off";
  return name === "temperature" ? number(value, 4) : String(value);
}
