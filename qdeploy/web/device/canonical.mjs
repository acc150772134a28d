// Canonical JSON (FORMAT.md): one byte form for each value. The parser refuses every other form, so nothing is
// serialised again to compare.

/** A release, an object or what a server sent is not what it must be. The message is one line for people. */
export class BundleError extends Error {
  name = "BundleError";

  constructor(message) {
    super(message.replace(/\p{Cc}/gu, "\ufffd").slice(0, 500)); // names come from manifests that may be hostile
  }
}

/** A number that was written with a fraction or an exponent: never an integer of the format. */
export class Real {
  constructor(value) {
    this.value = value;
  }
}

const MAX_DEPTH = 32;
const STRING = /"((?:[ !#-\[\]-~]|\\(?:["\\bfnrt]|u[0-9a-f]{4}))*)"/y;
const NUMBER = /-?(?:0|[1-9][0-9]*)(\.[0-9]+)?(e[+-][0-9]+)?/y;

/** Shortest decimal that gives the number back; exponents below -4 and from 16 on are written as such, e.g. 1e-05. */
export function realText(value) {
  const [, sign, digits, power] = /^(-?)([0-9.]+)e([+-][0-9]+)$/.exec(
    Object.is(value, -0) ? "-0e+0" : value.toExponential(),
  );
  const exponent = Number(power);
  if (exponent < -4 || exponent >= 16) {
    return `${sign}${digits}e${exponent < 0 ? "-" : "+"}${String(Math.abs(exponent)).padStart(2, "0")}`;
  }
  const plain = digits.replace(".", "");
  if (exponent < 0) {
    return `${sign}0.${"0".repeat(-exponent - 1)}${plain}`;
  }
  const whole = plain.slice(0, exponent + 1).padEnd(exponent + 1, "0");
  return `${sign}${whole}.${plain.slice(exponent + 1) || "0"}`;
}

/** The one way to write a text: ASCII, \u escapes in lower case, short escapes where there are any. */
export function textForm(text) {
  return JSON.stringify(text).replace(
    /[\u007f-\uffff]/g,
    (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
}

/** Negative if text `a` comes before `b` by code points, as keys are sorted. */
export function compareTexts(a, b) {
  const left = Array.from(a, (c) => c.codePointAt(0));
  const right = Array.from(b, (c) => c.codePointAt(0));
  for (let i = 0; i < Math.min(left.length, right.length); i += 1) {
    if (left[i] !== right[i]) {
      return left[i] - right[i];
    }
  }
  return left.length - right.length;
}

class Parser {
  constructor(text) {
    this.text = text;
    this.at = 0;
  }

  want(condition, why = "it is not canonical JSON") {
    if (!condition) {
      throw new BundleError(`${why} (byte ${this.at})`);
    }
  }

  take(token) {
    this.want(this.text.startsWith(token, this.at));
    this.at += token.length;
  }

  match(pattern) {
    pattern.lastIndex = this.at;
    const found = pattern.exec(this.text);
    this.want(found !== null);
    this.at = pattern.lastIndex;
    return found;
  }

  string() {
    const [whole] = this.match(STRING);
    const text = JSON.parse(whole);
    this.want(textForm(text) === whole);
    return text;
  }

  number() {
    const [whole, fraction, exponent] = this.match(NUMBER);
    const value = Number(whole);
    if (fraction === undefined && exponent === undefined) {
      this.want(whole !== "-0");
      this.want(Number.isSafeInteger(value), "an integer is not below 2^53");
      return value;
    }
    this.want(Number.isFinite(value) && realText(value) === whole);
    return new Real(value);
  }

  list(depth) {
    const values = [];
    this.take("[");
    while (this.text[this.at] !== "]") {
      if (values.length) {
        this.take(",");
      }
      values.push(this.value(depth + 1));
    }
    this.take("]");
    return values;
  }

  object(depth) {
    const entries = new Map();
    let last = null;
    this.take("{");
    while (this.text[this.at] !== "}") {
      if (last !== null) {
        this.take(",");
      }
      const key = this.string();
      this.want(last === null || compareTexts(last, key) < 0, "keys are not sorted or one appears twice");
      this.take(":");
      entries.set(key, this.value(depth + 1));
      last = key;
    }
    this.take("}");
    return entries;
  }

  value(depth) {
    this.want(depth < MAX_DEPTH, "it is nested too deeply");
    switch (this.text[this.at]) {
      case "{":
        return this.object(depth);
      case "[":
        return this.list(depth);
      case '"':
        return this.string();
      case "t":
        this.take("true");
        return true;
      case "f":
        this.take("false");
        return false;
      case "n":
        this.take("null");
        return null;
      default:
        return this.number();
    }
  }
}

/**
 * Parse canonical JSON. Objects become Maps, integers numbers, all other numbers `Real`.
 * @param {Uint8Array} data the file's bytes
 * @param {number} limit most bytes
 * @param {string} what for messages
 */
export function parseCanonical(data, limit, what) {
  if (data.length > limit) {
    throw new BundleError(`${what} has ${data.length} bytes, the limit is ${limit}`);
  }
  const text = new TextDecoder("latin1").decode(data); // one character a byte; what is not ASCII is refused below
  const parser = new Parser(text);
  try {
    const value = parser.value(0);
    parser.want(text.slice(parser.at) === "\n");
    return value;
  } catch (error) {
    if (error instanceof BundleError) {
      throw new BundleError(`${what} is damaged: ${error.message}`);
    }
    throw error;
  }
}
