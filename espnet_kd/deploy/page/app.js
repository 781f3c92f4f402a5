// The page: a file or the microphone in, text out.
import { Student, join, quietest } from "./recognise.js";

const element = (id) => document.getElementById(id);
const show = (text) => (element("text").textContent = text);
const state = (text) => (element("state").textContent = text);
const INTERVAL = 1000; // milliseconds between two looks at what is being recorded

let student;
let recording = null;

// Samples of an audio file, channels averaged, at the student's rate.
async function decode(bytes) {
  const context = new OfflineAudioContext(1, 1, student.rate);
  const audio = await context.decodeAudioData(bytes);
  const samples = new Float32Array(audio.length);
  for (let c = 0; c < audio.numberOfChannels; c++) {
    audio.getChannelData(c).forEach((x, i) => (samples[i] += x / audio.numberOfChannels));
  }
  return samples;
}

async function openFile(file) {
  state(`recognising ${file.name} …`);
  show("");
  const begun = performance.now();
  try {
    const samples = await decode(await file.arrayBuffer());
    await student.transcribe(samples, show);
    const seconds = samples.length / student.rate;
    state(`${file.name}: ${seconds.toFixed(1)} s of audio in ${((performance.now() - begun) / 1000).toFixed(2)} s`);
  } catch (error) {
    state(`${file.name} cannot be read: ${error.message ?? error}`);
  }
}

class Recording {
  static async begin() {
    const audio = { channelCount: 1, echoCancellation: false, noiseSuppression: false };
    const media = await navigator.mediaDevices.getUserMedia({ audio });
    const context = new AudioContext({ sampleRate: student.rate });
    await context.audioWorklet.addModule("recorder.js");
    return new Recording(media, context);
  }

  constructor(media, context) {
    this.media = media;
    this.context = context;
    this.done = []; // texts of pieces that have ended
    this.held = new Float32Array(0);
    this.node = new AudioWorkletNode(context, "recorder");
    this.arrived = [];
    this.node.port.onmessage = ({ data }) => this.arrived.push(data);
    context.createMediaStreamSource(media).connect(this.node);
    this.running = this.follow();
  }

  // Shows what was recorded so far until the recording ends.
  async follow() {
    while (!this.ended) {
      await new Promise((resolve) => setTimeout(resolve, INTERVAL));
      await this.look();
    }
  }

  async look() {
    const parts = [this.held, ...this.arrived.splice(0)];
    this.held = new Float32Array(parts.reduce((sum, part) => sum + part.length, 0));
    parts.reduce((at, part) => (this.held.set(part, at), at + part.length), 0);
    while (this.held.length > student.longest) {
      const end = quietest(this.held.subarray(0, student.longest), student.rate);
      const piece = this.held.slice(0, end);
      this.held = this.held.slice(end);
      this.done.push((await student.recognise(piece)).trim());
    }
    const text = await student.recognise(this.held.slice(0, student.longest));
    show(join([...this.done, text.trim()].filter(Boolean)));
  }

  async end() {
    this.ended = true;
    this.media.getTracks().forEach((track) => track.stop());
    await this.context.close();
    await this.running;
    await this.look();
  }
}

async function toggle() {
  element("record").disabled = true;
  try {
    if (recording) {
      await recording.end();
      recording = null;
      state("ready");
    } else {
      show("");
      recording = await Recording.begin();
      state("recording …");
    }
  } catch (error) {
    recording = null;
    state(`the microphone cannot be used: ${error.message ?? error}`);
  }
  element("record").textContent = recording ? "Stop" : "Record";
  element("record").disabled = false;
}

async function start() {
  try {
    student = await Student.load();
  } catch (error) {
    state(`the recogniser cannot be loaded: ${error.message ?? error}`);
    return;
  }
  const { name, parameters, sampling_rate } = student.about;
  element("about").textContent = `${name}: ${(parameters / 1e6).toFixed(2)} million parameters, ${sampling_rate} Hz`;
  element("file").onchange = ({ target }) => target.files[0] && openFile(target.files[0]);
  element("record").onclick = toggle;
  element("file").disabled = false;
  element("record").disabled = !navigator.mediaDevices; // browsers give the microphone to https and localhost alone
  state("ready");
}

start();
