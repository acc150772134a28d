// A worker that fetches, verifies and assembles, so that the page never waits for it. Requests: {id, op, ...};
// answers: {id, result} or {id, error}; in between {event: "row" | "progress", value}.

import { Device } from "./device.mjs";
import { Pace } from "./download.mjs";
import { BrowserStore } from "./store.mjs";

const NEWS_MS = 100;

const pace = new Pace();
let device = null;
let told = 0; // when the page last heard of progress

function news(event, value) {
  postMessage({ event, value });
}

function progress() {
  if (performance.now() - told > NEWS_MS) {
    told = performance.now();
    news("progress", { rungs: device.rungs(), arriving: device.arriving });
  }
}

const OPERATIONS = {
  async connect({ base, root }) {
    const line = { base: new URL(base), pace, pauseMs: 300, log: (row) => news("row", row) };
    device = new Device(line, await BrowserStore.open(), progress);
    await device.connect(root);
    const { model, release } = device.manifest;
    const { signers, threshold, digest } = device;
    return { model, release, digest, signers, threshold, rungs: device.rungs(), start: await device.remembered() };
  },

  async bring({ name }) {
    return { onnx: await device.bring(name), rungs: device.rungs() };
  },

  async inForce({ name }) {
    await device.inForce(name);
  },
};

// one request after the other: two climbs at once could fetch a leaf twice
let last = Promise.resolve();

onmessage = ({ data }) => {
  if (data.op === "rate") {
    pace.rate = data.rate;
    return;
  }
  last = last.then(async () => {
    try {
      const result = await OPERATIONS[data.op](data);
      postMessage({ id: data.id, result }, result?.onnx ? [result.onnx.buffer] : []);
    } catch (error) {
      postMessage({ id: data.id, error: error.message });
    }
  });
};
