// The sampling rule (docs/sampling.md), on the step tables of step_table.py.

const bytesOf = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));

// The upper 32 bits of the product of two 32-bit words.
function upperProduct(a, b) {
  const low = b & 0xffff;
  const high = b >>> 16;
  const first = (a >>> 16) * low + (((a & 0xffff) * low) >>> 16);
  const second = (a & 0xffff) * high + (first & 0xffff);
  return ((a >>> 16) * high + (first >>> 16) + (second >>> 16)) >>> 0;
}

// Philox4x32-10 of Salmon et al.: four 32-bit words of counter, two of the key.
function philox([c0, c1, c2, c3], [k0, k1]) {
  for (let round = 0; round < 10; round++) {
    const [first, second] = [upperProduct(0xd2511f53, c0), upperProduct(0xcd9e8d57, c2)];
    const [low0, low2] = [Math.imul(0xd2511f53, c0), Math.imul(0xcd9e8d57, c2)];
    [c0, c1, c2, c3] = [(second ^ c1 ^ k0) >>> 0, low2 >>> 0, (first ^ c3 ^ k1) >>> 0, low0 >>> 0];
    [k0, k1] = [(k0 + 0x9e3779b9) >>> 0, (k1 + 0xbb67ae85) >>> 0];
  }
  return [c0, c1, c2, c3];
}

// The seed of a row, a decimal number below 2^63, as a key.
function keyOf(seed) {
  const value = BigInt(seed);
  return [Number(value & 0xffffffffn), Number(value >> 32n)];
}

// Gumbel noise of a token at a step.
function gumbel(key, step, token) {
  const words = philox([token >>> 1, step, 0, 0], key);
  const [high, low] = token % 2 ? [words[2], words[3]] : [words[0], words[1]];
  const uniform = (high * 2 ** 20 + (low >>> 12) + 0.5) * 2 ** -52;
  return -Math.log(-Math.log(uniform));
}

// Return x as a whole number, halves to the even one; |x| below 2^51.
const rint = (x) => x + 1.5 * 2 ** 52 - 1.5 * 2 ** 52;

const FACTORIALS = [1];
for (let k = 1; k < 14; k++) FACTORIALS.push(FACTORIALS[k - 1] * k);

// rint(exp(x) * 2^bits) by + and * alone, x <= 0: the same bits as nucleus.py.
function mass(x, bits) {
  if (x < -33) return 0;
  const n = rint(x * (1 / Math.LN2));
  const r = x - n * 0.6931471803691238 - n * 1.9082149292705877e-10;
  let total = 1 / FACTORIALS[13];
  for (let k = 12; k >= 0; k--) total = total * r + 1 / FACTORIALS[k];
  return rint(total * 2 ** (n + bits));
}

// Return a step ready to sample: tokens with noise, and groups of tokens by descending logit. A
// group is a level, all tokens with one logit, or a segment, with nodes and their weights.
function readStep(row, index) {
  const data = row.steps[index];
  const key = keyOf(row.seed);
  const step = { index, data, bits: row.vocab_size > 2 ** 16 ? 40 : 46 };
  step.tokens = data.tokens.map(([id, place, logit, text, bytes, own]) => ({
    id, place, text, bytes, own,
    logit: Math.fround(logit),
    noise: gumbel(key, index, id),
  }));
  let start = 0;
  step.groups = [...new Float32Array(bytesOf(data.levels).buffer)].map((logit, level) => {
    const end = start + (data.counts ? data.counts[level] : 1);
    const group = { start, end, low: logit, high: logit, nodes: [logit], weights: [end - start] };
    start = end;
    return group;
  });
  step.levels = step.groups.length;
  const weights = new Float64Array(bytesOf(data.weights).buffer);
  let first = 0;
  for (const [end, low, high, count] of data.segments) {
    const group = { start, end, low, high, weights: [...weights.subarray(first, first + count)] };
    group.nodes = group.weights.map(
      (_, i) => (low + high) / 2 + ((high - low) / 2) * Math.cos((Math.PI * (i + 0.5)) / count),
    );
    step.groups.push(group);
    [start, first] = [end, first + count];
  }
  step.size = start;
  step.largest = step.groups[0].high;
  return step;
}

// How many tokens top_k keeps: ties with the k-th stay.
function keptByTopK(step, topK) {
  return topK ? (step.groups.find((group) => group.end >= topK)?.end ?? step.size) : step.size;
}

// How many tokens reach a logit. Inside of a segment it is an estimate between its first and its
// last token.
function keptByLogit(step, cutoff) {
  const group = step.groups.find((one) => one.low < cutoff);
  if (!group) return step.size;
  if (group.high < cutoff) return group.start;
  const share = (group.high - cutoff) / (group.high - group.low);
  return group.start + inside(share, group.end - group.start - 1);
}

const inside = (share, size) => Math.min(Math.max(Math.round(share * size), 1), size);

// How many tokens the nucleus keeps of the first `count`. Masses of levels are whole numbers; two
// sums of up to 32 bits keep them exact.
function keptByTopP(step, count, temperature, topP) {
  const UNIT = 2 ** 23;
  const sums = [];
  let [high, low] = [0, 0];
  step.groups.every((group, number) => {
    if (group.end > count) return false;
    sums.push(high * UNIT + low);
    if (number < step.levels) {
      const whole = mass((group.high - step.largest) / temperature, step.bits);
      const rest = whole % UNIT;
      low += rest * group.weights[0];
      high += ((whole - rest) / UNIT) * group.weights[0];
    } else low += groupSum(group, step.largest, temperature) * 2 ** step.bits;
    return true;
  });
  const total = high * UNIT + low;
  let last = sums.findIndex((above) => !(above < topP * total)) - 1;
  if (last < 0) last = sums.length - 1;
  const group = step.groups[last];
  if (last < step.levels) return group.end;
  const share = (topP * total - sums[last]) / ((sums[last + 1] ?? total) - sums[last]);
  return group.start + inside(share, group.end - group.start);
}

// Sum of exp((z - largest) / temperature) over the tokens of a group.
function groupSum(group, largest, temperature) {
  let sum = 0;
  for (let i = 0; i < group.nodes.length; i++)
    sum += group.weights[i] * Math.exp((group.nodes[i] - largest) / temperature);
  return sum;
}

// How many tokens the filters keep: the first ones by logit.
function keptCount(step, { temperature, top_k, top_p, min_p }) {
  if (temperature === 0) return step.groups[0].end;
  const byTopK = keptByTopK(step, top_k);
  let count = byTopK;
  if (top_p < 1) count = Math.min(count, keptByTopP(step, byTopK, temperature, top_p));
  if (min_p > 0) {
    const cutoff = step.largest + temperature * Math.log(min_p);
    count = Math.min(count, keptByLogit(step, cutoff));
  }
  return count;
}

const scoreOf = (token, temperature) => token.logit + temperature * token.noise;

// The two tokens with the largest scores of the first `count`, the smaller id first among equals.
function bestTwo(step, count, temperature) {
  let [best, second] = [null, null];
  const precedes = (token, score, other) =>
    !other || score > other.score || (score === other.score && token.id < other.token.id);
  for (const token of step.tokens) {
    if (token.place >= count) continue;
    const score = scoreOf(token, temperature);
    if (precedes(token, score, best)) [best, second] = [{ token, score }, best];
    else if (precedes(token, score, second)) second = { token, score };
  }
  return [best, second];
}

// The token that wins with these settings.
const sample = (step, settings) =>
  bestTwo(step, keptCount(step, settings), settings.temperature)[0].token;

// Sums over the first `count` tokens: their share of all, and their entropy in nats.
function summarize(step, count, temperature) {
  if (temperature === 0) return { share: null, entropy: 0, total: 1 };
  let [all, kept, moment] = [0, 0, 0];
  for (const group of step.groups) {
    const sum = groupSum(group, step.largest, temperature);
    all += sum;
    if (group.start >= count) continue;
    // of a segment that the cutoff divides, a part
    const part = Math.min(1, (count - group.start) / (group.end - group.start));
    kept += part * sum;
    for (let i = 0; i < group.nodes.length; i++) {
      const x = (group.nodes[i] - step.largest) / temperature;
      moment += part * group.weights[i] * Math.exp(x) * x;
    }
  }
  return { share: kept / all, entropy: Math.log(kept) - moment / kept, total: kept };
}

// The winners from temperature 0 to `highest`: [{token, from, to}], found at steps of `width`.
function ribbon(step, settings, highest, width) {
  const parts = [];
  const count = Math.round(highest / width);
  for (let i = 0; i <= count; i++) {
    const temperature = i * width;
    const token = sample(step, { ...settings, temperature });
    const last = parts[parts.length - 1];
    if (last && last.token === token) last.to = temperature;
    else {
      if (last) last.to = boundary(step, settings, last.token, last.to, temperature);
      parts.push({ token, from: last ? last.to : 0, to: temperature });
    }
  }
  return parts;
}

// The temperature between two at which a token stops to win.
function boundary(step, settings, token, low, high) {
  while (high - low > 0.005) {
    const middle = (low + high) / 2;
    if (sample(step, { ...settings, temperature: middle }) === token) low = middle;
    else high = middle;
  }
  return (low + high) / 2;
}

// For tests, and for the console of a browser.
report.sampling = { readStep, sample, keptCount };
