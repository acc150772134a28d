// A worker that runs one level in ONNX Runtime (WebAssembly, one thread). A level that replaces it has a worker of its
// own, so making its session holds up nothing, and ending the old worker frees all its memory.

import * as ort from "./vendor/ort.wasm.min.mjs";

ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = new URL("./vendor/", import.meta.url).href;
ort.env.logLevel = "error";

let session = null;
let shape = null; // of one image

const OPERATIONS = {
  async load({ onnx }) {
    session = await ort.InferenceSession.create(onnx, { executionProviders: ["wasm"], graphOptimizationLevel: "all" });
    const [input] = session.inputMetadata;
    const axes = input.shape.map((axis) => (typeof axis === "number" ? axis : 1));
    if (session.inputNames.length !== 1 || input.type !== "float32" || axes.length !== 4 || axes[0] !== 1) {
      throw new Error(`the model does not read one float32 image [1, C, H, W] but ${input.type} [${input.shape}]`);
    }
    shape = axes.slice(1);
    return { shape };
  },

  /** `images`: float32, one after another. Scores of each and milliseconds of each run. */
  async classify({ images }) {
    const size = shape.reduce((product, axis) => product * axis, 1);
    const [scores, times] = [[], []];
    for (let at = 0; at < images.length; at += size) {
      const feed = new ort.Tensor("float32", images.subarray(at, at + size), [1, ...shape]);
      const start = performance.now();
      const outputs = await session.run({ [session.inputNames[0]]: feed });
      times.push(performance.now() - start);
      scores.push(outputs[session.outputNames[0]].data.slice());
      Object.values(outputs).forEach((tensor) => tensor.dispose());
    }
    return { scores, times };
  },
};

onmessage = async ({ data }) => {
  try {
    postMessage({ id: data.id, result: await OPERATIONS[data.op](data) });
  } catch (error) {
    postMessage({ id: data.id, error: error.message });
  }
};
