// HTTP: bounded reads, ranges that resume where a connection broke, and a pace.

import { BundleError } from "./canonical.mjs";
import { joined } from "./digest.mjs";

const TRIES = 4; // without a new byte in between

/** The server could not be reached or broke off too often; asking again later may help. */
export class NetworkError extends Error {
  name = "NetworkError";
}

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Lets bytes through at a rate that may change; 0 is as fast as they come. */
export class Pace {
  rate = 0; // bytes a second
  #ready = 0;

  async pass(bytes) {
    if (this.rate > 0) {
      const now = performance.now();
      this.#ready = Math.max(this.#ready, now) + (1000 * bytes) / this.rate;
      await sleep(this.#ready - now);
    }
  }
}

/**
 * @typedef {object} Line how to ask
 * @property {URL} base root of the published tree, with a slash at its end
 * @property {Pace} pace
 * @property {number} pauseMs before the second try; twice as long before each further one
 * @property {(row: {path: string, range: string, status: number, bytes: number}) => void} log one row an answer
 */

async function ask(line, path, headers) {
  let response;
  try {
    response = await fetch(new URL(path, line.base), { headers, cache: "no-store", redirect: "error" });
  } catch (error) {
    throw new NetworkError(`${path}: no answer (${error.message})`);
  }
  if (response.status >= 500 || response.status === 429) {
    await response.body?.cancel();
    throw new NetworkError(`${path}: the server answers ${response.status}`);
  }
  return response;
}

/** Yields the bytes of an answer, paced; how many came is logged, also when the reader stops or the line breaks. */
async function* body(line, response, path, range) {
  const reader = response.body.getReader();
  let bytes = 0;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) {
        return;
      }
      for (let at = 0; at < value.length; at += 4096) {
        const part = value.subarray(at, at + 4096);
        await line.pace.pass(part.length);
        bytes += part.length;
        yield part;
      }
    }
  } catch (error) {
    throw error instanceof BundleError ? error : new NetworkError(`${path}: the answer broke off (${error.message})`);
  } finally {
    await reader.cancel().catch(() => {});
    line.log({ path, range, status: response.status, bytes });
  }
}

async function persistently(line, work) {
  for (let left = TRIES, pause = line.pauseMs; ; left -= 1, pause *= 2) {
    try {
      return await work();
    } catch (error) {
      if (!(error instanceof NetworkError) || left <= 1) {
        throw error;
      }
      await sleep(pause);
    }
  }
}

/** A small file of at most `limit` bytes. */
export async function fetchFile(line, path, limit) {
  return persistently(line, async () => {
    const response = await ask(line, path, {});
    if (response.status !== 200) {
      await response.body?.cancel();
      throw new BundleError(`${path} is not there (the server answers ${response.status})`);
    }
    const parts = [];
    let size = 0;
    for await (const part of body(line, response, path, "all")) {
      parts.push(part);
      size += part.length;
      if (size > limit) {
        throw new BundleError(`${path} has more than ${limit} bytes`);
      }
    }
    return joined(parts, size);
  });
}

/** One answer for bytes `from` to `to` of a file of `size` bytes; yields exactly as many, fewer if the line breaks. */
async function* someBytes(line, path, from, to, size) {
  const whole = from === 0 && to === size;
  const range = `${from}-${to - 1}`;
  const response = await ask(line, path, whole ? {} : { Range: `bytes=${range}` });
  const partial = response.status === 206;
  const fits = partial ? response.headers.get("Content-Range") === `bytes ${range}/${size}` : response.status === 200;
  if (!fits || (whole && partial)) {
    await response.body?.cancel();
    throw new BundleError(`${path}: the server does not answer with the bytes that were asked for`);
  }
  let at = partial ? from : 0; // a server without ranges sends the whole file
  for await (const part of body(line, response, path, partial ? range : "all")) {
    const [start, stop] = [Math.max(from - at, 0), Math.min(to - at, part.length)];
    if (start < stop) {
      yield part.subarray(start, stop);
    }
    at += part.length;
    if (at >= to) {
      return;
    }
  }
  throw new NetworkError(`${path}: the answer ended at byte ${at} of ${to}`);
}

/**
 * Bytes `start` to `stop` of a file of `size` bytes as they come; a broken line is taken up at the byte where it ended.
 * @param {Line} line
 */
export async function* fetchRange(line, path, start, stop, size) {
  let [at, tries, pause] = [start, TRIES, line.pauseMs];
  while (at < stop) {
    try {
      for await (const part of someBytes(line, path, at, stop, size)) {
        at += part.length;
        [tries, pause] = [TRIES, line.pauseMs];
        yield part;
      }
    } catch (error) {
      tries -= 1;
      if (!(error instanceof NetworkError) || tries === 0) {
        throw error;
      }
      await sleep(pause);
      pause *= 2;
    }
  }
}
