// Bytes: SHA-256, hex, and chunks put together.

import { BundleError } from "./canonical.mjs";

/** What the browser must have, or one line that says why it cannot be a device. */
export function subtle() {
  const found = globalThis.crypto?.subtle;
  if (!found) {
    throw new BundleError("this page has no cryptography: open it over https or on localhost");
  }
  return found;
}

export function toHex(bytes) {
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Bytes of an even number of lower-case hex digits, null for any other text. */
export function fromHex(text) {
  if (!/^(?:[0-9a-f]{2})*$/.test(text)) {
    return null;
  }
  return Uint8Array.from(text.match(/../g) ?? [], (pair) => parseInt(pair, 16));
}

/** Lower-case hex SHA-256. */
export async function sha256(data) {
  return toHex(new Uint8Array(await subtle().digest("SHA-256", data)));
}

/** Chunks of `size` bytes in all as one array. */
export function joined(chunks, size) {
  const whole = new Uint8Array(size);
  let at = 0;
  for (const chunk of chunks) {
    whole.set(chunk, at);
    at += chunk.length;
  }
  return whole;
}
