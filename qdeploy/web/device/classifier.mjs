// Inference without end over the sample, and the change of levels under it: between two batches, never within one.

import { toInput } from "./arrays.mjs";
import { Asker } from "./workers.mjs";

const BATCH = 10; // images of one request
const WINDOW = 100; // batches whose latency counts

export function argmax(scores) {
  return scores.reduce((best, score, i) => (score > scores[best] ? i : best), 0);
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted.length ? sorted[sorted.length >> 1] : null;
}

/** What one level did: for each image of the sample whether it was right, and milliseconds of batches. */
class Tally {
  constructor(count) {
    this.right = new Int8Array(count).fill(-1);
    this.times = [];
  }

  add(at, right, time) {
    this.right.set(right, at);
    this.times = [...this.times, time].slice(-WINDOW);
  }

  get seen() {
    return this.right.reduce((sum, one) => sum + (one >= 0), 0);
  }

  get correct() {
    return this.right.reduce((sum, one) => sum + (one > 0), 0);
  }

  get latency() {
    return median(this.times);
  }
}

export class Classifier {
  #sample = null;
  #at = 0; // image of the sample that the next batch begins with
  #current = null; // {name, runner, shape}
  #next = null; // takes over before the next batch
  #busy = false;
  #onBatch;
  #onFailure;
  paused = false;
  tallies = new Map();

  /**
   * @param {(batch: {level: string, at: number, guesses: number[]}) => void} onBatch
   * @param {(error: Error) => void} onFailure inference failed; it waits for another sample
   */
  constructor(onBatch, onFailure) {
    this.#onBatch = onBatch;
    this.#onFailure = onFailure;
  }

  get level() {
    return this.#current?.name ?? null;
  }

  get shape() {
    return this.#current?.shape ?? null;
  }

  /**
   * Make a session of a level's ONNX file in a worker of its own; resolves once it is in force. The old one runs on
   * until then, and for good if this one fails.
   */
  async use(name, onnx) {
    const runner = new Asker(new URL("./runner.worker.mjs", import.meta.url));
    try {
      const { shape } = await runner.ask("load", { onnx }, [onnx.buffer]);
      await new Promise((taken) => {
        this.#next = { name, runner, shape, taken };
        if (!this.#busy) {
          this.#switch();
        }
      });
    } catch (error) {
      runner.end();
      throw error;
    }
  }

  #switch() {
    if (this.#next !== null) {
      this.#current?.runner.end();
      this.#current = this.#next;
      this.#next = null;
      this.#current.taken();
    }
  }

  /** Images with labels to go over; what levels did on others is forgotten. */
  set sample(sample) {
    [this.#sample, this.#at] = [sample, 0];
    this.tallies.clear();
  }

  /** Scores of one image, by the level in force. */
  async scores(pixels) {
    const { scores } = await this.#current.runner.ask("classify", { images: toInput(pixels) });
    return scores[0];
  }

  /** Classify the sample round and round, for good. A page that is not visible rests: it gets no frames. */
  async run() {
    for (;;) {
      await new Promise(requestAnimationFrame);
      if (this.paused || this.#current === null || this.#sample === null) {
        continue;
      }
      this.#busy = true;
      try {
        await this.#batch(this.#sample, this.#at);
      } catch (error) {
        this.#sample = null;
        this.#onFailure(error);
      } finally {
        this.#busy = false;
        this.#switch();
      }
    }
  }

  async #batch(sample, at) {
    const { name, runner, shape } = this.#current;
    if (String(shape) !== String(sample.shape)) {
      throw new Error(`the sample's images are [${sample.shape}], the model reads [${shape}]`);
    }
    const stop = Math.min(at + BATCH, sample.count);
    const pixels = Array.from({ length: stop - at }, (_, i) => sample.image(at + i));
    const images = new Float32Array(pixels.length * pixels[0].length);
    pixels.forEach((one, i) => images.set(toInput(one), i * one.length));
    const { scores, times } = await runner.ask("classify", { images }, [images.buffer]);
    if (sample !== this.#sample) {
      return; // another one was chosen meanwhile
    }
    this.#at = stop === sample.count ? 0 : stop;
    const guesses = scores.map(argmax);
    const right = guesses.map((guess, i) => Number(guess === sample.labels[at + i]));
    if (!this.tallies.has(name)) {
      this.tallies.set(name, new Tally(sample.count));
    }
    const mean = times.reduce((sum, time) => sum + time, 0) / times.length;
    this.tallies.get(name).add(at, right, mean);
    this.#onBatch({ level: name, at, guesses });
  }
}
