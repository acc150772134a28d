// The page: what people see and press. Fetching and decoding happen in one worker, inference in another.

import { fromRgba, makeSample, readNpy } from "./arrays.mjs";
import { Classifier } from "./classifier.mjs";
import { BrowserStore } from "./store.mjs";
import * as view from "./view.mjs";
import { Asker } from "./workers.mjs";

const BASE = new URL("../../", import.meta.url); // the published tree begins where /ui/ does
const SAMPLE = ["images.npy", "labels.npy", "classes.npy"];
const { element } = view;

const state = {
  release: null, // what connecting said
  rungs: [],
  sample: null,
  fetched: 0, // object bytes of this visit
  arriving: 0, // object bytes that came and are not verified yet
  step: null, // level that is being fetched
};

function failed(error) {
  view.say("");
  view.alarm(error.message);
}

const classifier = new Classifier((batch) => {
  view.showBatch(state.sample, batch);
  render();
}, failed);

const loader = new Asker(new URL("./loader.worker.mjs", import.meta.url), (event, value) => {
  if (event === "progress") {
    Object.assign(state, value);
  } else {
    state.fetched += value.path.startsWith("objects/") ? value.bytes : 0;
    view.addRow(value);
  }
  render();
});

function render() {
  view.render({ ...state, level: classifier.level, tallies: classifier.tallies, paused: classifier.paused }, take);
}

// --- levels ----------------------------------------------------------------------------------------------------------

/** Bring a level and put it in force, while the one before it goes on classifying. */
async function take(name) {
  const before = classifier.level;
  const fetchedBefore = state.fetched;
  state.step = name;
  view.alarm("");
  view.say(before === null ? `Bringing level ${name}…` : `Bringing level ${name} while ${before} classifies…`);
  render();
  try {
    const { onnx, rungs } = await loader.ask("bring", { name });
    Object.assign(state, { rungs, arriving: 0 });
    view.say(`Level ${name} is verified; making its session…`);
    await classifier.use(name, onnx);
    await loader.ask("inForce", { name });
    const bytes = state.fetched - fetchedBefore;
    view.say(`Level ${name} is in force: ${view.count(bytes)} bytes were fetched for it.`);
  } catch (error) {
    failed(before === null ? error : new Error(`${error.message}. Level ${before} stays in force.`));
  } finally {
    Object.assign(state, { step: null, arriving: 0 });
    render();
  }
}

// --- start -----------------------------------------------------------------------------------------------------------

/** A file beside the page that the operator may have put there; null if not. */
async function optional(path) {
  const response = await fetch(new URL(path, import.meta.url), { cache: "no-cache" });
  if (response.status === 404) {
    return null;
  }
  if (!response.ok) {
    throw new Error(`${path}: the server answers ${response.status}`);
  }
  return response.arrayBuffer();
}

/** The sample of three files: images, labels, and names of classes, which may be missing. */
function useSample(images, labels, classes) {
  const sample = makeSample(readNpy(images), readNpy(labels), classes === null ? null : readNpy(classes));
  classifier.sample = sample;
  state.sample = sample;
  view.showSample(sample);
  render();
}

async function loadSample() {
  const [images, labels, classes] = await Promise.all(SAMPLE.map((name) => optional(`./sample/${name}`)));
  if (images !== null && labels !== null) {
    useSample(images, labels, classes);
  }
}

async function connect(root) {
  view.say("Asking for the release and checking its signature…");
  state.release = await loader.ask("connect", { base: BASE.href, root });
  state.rungs = state.release.rungs;
  view.showRelease(state.release);
  await take(state.release.start);
}

/** The root that somebody chose on this page comes before the one that the operator put beside it. */
async function start() {
  const store = await BrowserStore.open();
  const chosen = await store.get("root");
  const served = chosen ?? (await optional("./root.json"));
  await loadSample();
  if (served === null) {
    view.say("No keys are known yet.");
    view.askForKeys(async (file) => {
      const root = new Uint8Array(await file.arrayBuffer());
      await connect(root).catch(failed);
      if (state.release !== null) {
        await store.set("root", root);
      }
    });
    return;
  }
  await connect(new Uint8Array(served));
}

// --- controls --------------------------------------------------------------------------------------------------------

element("rate").onchange = (event) => loader.tell("rate", { rate: Number(event.target.value) });

element("pause").onclick = () => {
  classifier.paused = !classifier.paused;
  render();
};

element("forget").onclick = () => {
  if (!confirm("Forget levels, keys and the highest release number that this browser has seen?")) {
    return;
  }
  loader.end();
  const request = indexedDB.deleteDatabase("qdeploy-device");
  request.onsuccess = () => location.reload();
  request.onerror = () => failed(new Error("the browser did not delete what this page keeps: close its other tabs"));
};

element("sample-files").onchange = async (event) => {
  const chosen = new Map(Array.from(event.target.files, (file) => [file.name, file]));
  try {
    const buffers = SAMPLE.map((name) => chosen.get(name)?.arrayBuffer() ?? null);
    const [images, labels, classes] = await Promise.all(buffers);
    if (images === null || labels === null) {
      throw new Error("choose images.npy and labels.npy together, and classes.npy if there is one");
    }
    useSample(images, labels, classes);
    view.alarm("");
  } catch (error) {
    failed(error);
  }
};

async function classifyOwn() {
  const [file] = element("own-file").files;
  if (!file || classifier.shape === null) {
    return;
  }
  try {
    const rgba = view.drawOwn(await createImageBitmap(file), classifier.shape);
    const pixels = fromRgba(rgba, classifier.shape, element("own-invert").checked);
    view.showOwn(pixels, classifier.shape, await classifier.scores(pixels), state.sample?.classes ?? null);
  } catch (error) {
    failed(new Error(`this image cannot be classified: ${error.message}`));
  }
}

element("own-file").onchange = classifyOwn;
element("own-invert").onchange = classifyOwn;

render();
classifier.run();
start().catch(failed);
