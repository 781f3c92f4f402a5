// A student in onnxruntime-web: samples in, text out.
import * as ort from "./ort/ort.wasm.min.mjs";

ort.env.wasm.numThreads = 1; // more need headers that few static servers send
ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;

const LONGEST = 20; // seconds that are recognised at once
const WINDOW = 0.2; // seconds over which the level is looked at where audio is cut

export class Student {
  static async load() {
    const about = await (await fetch("student.json")).json();
    const model = new Uint8Array(await (await fetch("model.onnx")).arrayBuffer());
    return new Student(about, await ort.InferenceSession.create(model));
  }

  constructor(about, session) {
    this.about = about;
    this.session = session;
    this.rate = about.sampling_rate;
    this.longest = Math.floor(Math.min(LONGEST, about.max_seconds) * this.rate);
  }

  // Text of a Float32Array of samples at this.rate, no longer than this.longest.
  async recognise(samples) {
    if (samples.length < this.about.least_samples) return "";
    const { log_probs, log_prob_lengths } = await this.session.run({
      speech: new ort.Tensor("float32", samples, [1, samples.length]),
      speech_lengths: new ort.Tensor("int64", BigInt64Array.of(BigInt(samples.length)), [1]),
    });
    const frames = Number(log_prob_lengths.data[0]);
    return toText(this.about, bestTokens(log_probs.data, frames, log_probs.dims[2], this.about));
  }

  // Texts of samples of any length, cut at pauses; onText is called after each piece.
  async transcribe(samples, onText = () => {}) {
    const texts = [];
    for (let rest = samples; rest.length > 0; ) {
      const end = rest.length > this.longest ? quietest(rest.subarray(0, this.longest), this.rate) : rest.length;
      const text = await this.recognise(rest.slice(0, end));
      if (text.trim()) texts.push(text.trim());
      onText(join(texts));
      rest = rest.subarray(end);
    }
    return join(texts);
  }
}

// Greedy CTC search: the best label of every frame, repeats merged, blanks and tokens that are no text dropped.
export function bestTokens(logProbs, frames, width, about) {
  const found = [];
  let last = -1;
  for (let t = 0; t < frames; t++) {
    let best = 0;
    for (let v = 1; v < width; v++) {
      if (logProbs[t * width + v] > logProbs[t * width + best]) best = v;
    }
    if (best !== last && best !== about.blank && !about.no_text.includes(best)) found.push(about.tokens[best]);
    last = best;
  }
  return found;
}

export function toText(about, tokens) {
  if (about.token_type === "word") return tokens.join(" ");
  if (about.token_type === "bpe") return tokens.join("").replaceAll("▁", " ").trim();
  return tokens.map((t) => (t === about.space_symbol ? " " : t)).join("");
}

// Scripts that are written without blanks between words, at the end and at the beginning of a text.
const UNSPACED = ["Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar"];
const UNSPACED_CHARACTER = `[${UNSPACED.map((name) => `\\p{Script=${name}}`).join("")}]`;
const ENDS = new RegExp(`${UNSPACED_CHARACTER}$`, "u");
const BEGINS = new RegExp(`^${UNSPACED_CHARACTER}`, "u");

// The texts of pieces as one text.
export function join(texts) {
  const add = (all, text) => all + (ENDS.test(all) && BEGINS.test(text) ? "" : " ") + text;
  return texts.slice(1).reduce(add, texts[0] ?? "");
}

// Middle of the quietest window in the second half of samples.
export function quietest(samples, rate) {
  const half = Math.floor(samples.length / 2);
  const window = Math.floor(WINDOW * rate);
  let level = 0;
  let lowest = Infinity;
  let at = half;
  for (let i = half; i < samples.length; i++) {
    level += samples[i] ** 2 - (i - half >= window ? samples[i - window] ** 2 : 0);
    if (i - half >= window - 1 && level < lowest) {
      lowest = level;
      at = i + 1 - Math.ceil(window / 2);
    }
  }
  return at;
}
