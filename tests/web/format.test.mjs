// Golden vectors of FORMAT.md, and what no other language writes: `node --test tests/web/`.

import assert from "node:assert/strict";
import { test } from "node:test";
import { deflateRawSync } from "node:zlib";

import { BundleError, Real, compareTexts, parseCanonical, realText } from "../../qdeploy/web/device/canonical.mjs";
import { fromHex, sha256, toHex } from "../../qdeploy/web/device/digest.mjs";
import { leavesOf, decode } from "../../qdeploy/web/device/pieces.mjs";
import { containerCodes, unpack, unsort } from "../../qdeploy/web/device/planes.mjs";
import { checkCounter, readRoot, signers } from "../../qdeploy/web/device/trust.mjs";

const utf8 = (text) => new TextEncoder().encode(text);
const parse = (text) => parseCanonical(utf8(text), 1000, "it");
const refused = (work, words = /./) => assert.throws(work, (e) => e instanceof BundleError && words.test(e.message));
const rejected = (work, words = /./) => assert.rejects(work, (e) => e instanceof BundleError && words.test(e.message));

test("canonical JSON is taken", () => {
  const value = parse('{"a":[1,-2,{"x":null}],"b":"\\u00e9\\n\\"\\\\/","c":true,"d":1.5}\n');
  assert.deepEqual(value.get("a").slice(0, 2), [1, -2]);
  assert.equal(value.get("b"), 'é\n"\\/');
  assert.deepEqual(value.get("d"), new Real(1.5));
  assert.equal(parse('{"\\ud83d\\ude00":0}\n').get("😀"), 0);
});

test("any other byte form is refused", () => {
  const texts = [
    "", "\n", "1", "1\n\n", " 1\n", "1 \n", "[1, 2]\n", '{"b":1,"a":2}\n', '{"a":1,"a":2}\n', "[1,]\n", "[,1]\n",
    "{,}\n", '"é"\n', '"\\u00E9"\n', '"\\u0061"\n', '"\\/"\n', '"\\u000a"\n', '"a\nb"\n', '"\u007f"\n', "01\n",
    "+1\n", "-0\n", "1.\n", ".5\n", "1.50\n", "1e5\n", "1E+16\n", "1e+5\n", "1e16\n", "1e400\n", "NaN\n",
    "Infinity\n", "nul\n", "tru\n", "[1\n", "{\n", '"\n', "9007199254740992\n", "-9007199254740992\n",
    `${"[".repeat(40)}${"]".repeat(40)}\n`, "0.00001\n", "100000000000000000.0\n",
  ]; // prettier-ignore
  for (const text of texts) {
    refused(() => parse(text), /^it is damaged/);
  }
  refused(() => parseCanonical(new Uint8Array(1001), 1000, "it"), /limit/);
});

test("real numbers have one form", () => {
  const forms = { 1.5: "1.5", 90: "90.0", 0: "0.0", 0.1: "0.1", 0.0001: "0.0001", 1e-5: "1e-05", 1.25e-7: "1.25e-07" };
  for (const [value, text] of Object.entries(forms)) {
    assert.equal(realText(Number(value)), text);
  }
  assert.equal(realText(-0), "-0.0");
  assert.equal(realText(123456789012345680), "1.2345678901234568e+17");
  assert.equal(realText(1234567890123456), "1234567890123456.0");
  assert.equal(realText(-1e300), "-1e+300");
});

test("keys are sorted by code points", () => {
  assert.ok(compareTexts("\ufffd", "😀") < 0, "UTF-16 would have it the other way round");
  assert.ok(compareTexts("a", "ab") < 0 && compareTexts("b", "ab") > 0);
});

test("literal layouts", () => {
  const cases = [
    [[1, 0, 1, 1], 1, false, "b0"],
    [[3, 0, 1, 2, 3], 2, false, "c6c0"],
    [[7, 0, 5], 3, false, "e280"],
    [[7, 0, 5], 3, true, "e0a0"],
    [[9, 6], 4, false, "96"],
    [[17, 31], 5, false, "8fc0"],
    [[17, 31], 5, true, "88f8"],
    [[200, 3], 8, false, "c803"],
  ];
  for (const [symbols, bits, spaced, hex] of cases) {
    assert.deepEqual([...unpack(fromHex(hex), symbols.length, bits, spaced)], symbols, `${bits} ${spaced}`);
  }
  const spare = [
    [3, 2, false, "01"],
    [1, 3, true, "01"],
    [1, 3, true, "e4"],
    [3, 3, false, "e281"],
  ];
  for (const [count, bits, spaced, hex] of spare) {
    refused(() => unpack(fromHex(hex), count, bits, spaced), /unused bit/);
  }
  refused(() => unpack(fromHex("00"), 9, 1, false), /length/);
});

test("a sorted plane", () => {
  // prefixes of 2 bits: 1 and 2 are no cell away from zero, 0 and 3 one; below the middle (0, 1) bits are inverted
  const [prefix, stored] = [Uint8Array.of(0, 1, 2, 3, 2), Uint8Array.of(0, 1, 0, 0, 1)];
  assert.deepEqual([...unsort(stored, prefix, 2)], [1, 1, 1, 1, 0]);
  assert.deepEqual([...unsort(Uint8Array.of(1, 0), Uint8Array.of(0, 1), 1)], [0, 0], "one bit held: one context");
});

test("container codes with caps", async () => {
  const area = { count: 4, shape: [2, 2] };
  const parts = [1, 2].map((bits, piece) => ({ bits, layout: "tight", piece, start: 0 }));
  const tensor = { caps: [3, 1], parts };
  const pieces = [fromHex("a0"), fromHex("d0")]; // first bits 1 0 1 0; then 3 1 for the first channel alone
  const entry = { bits: 3, shift: 1, offset: [0, 5, 0, -1] };
  const codes = await containerCodes(tensor, area, entry, async (i) => pieces[i]);
  assert.deepEqual([...new Int8Array(codes.buffer)], [(7 - 4) * 2 - 1, (1 - 4) * 2 - 1, 5, (0 - 1) * 8 + 5]);
  const nothing = { bits: 0, shift: 0, offset: [1, 2, 3, 4] };
  const none = await containerCodes(tensor, area, nothing, async () => assert.fail());
  assert.deepEqual([...none], [4, 4, 2, 2]);
});

test("leaves", () => {
  assert.deepEqual(leavesOf({ sha256: "x", size: 9, leaves: [] }), [{ sha256: "x", start: 0, stop: 9 }]);
  const [, last] = leavesOf({ sha256: "x", size: 65540, leaves: ["a", "b"] });
  assert.deepEqual(last, { sha256: "b", start: 65536, stop: 65540 });
});

test("streams that are not exactly the piece are refused", async () => {
  const raw = new Uint8Array(70000).fill(7);
  const coded = new Uint8Array(deflateRawSync(raw));
  assert.deepEqual(await decode("deflate", coded, raw.length, "it"), raw);
  assert.equal((await decode("deflate", Uint8Array.of(3, 0), 0, "it")).length, 0);
  for (const [bytes, size] of [
    [coded, raw.length - 1],
    [coded, raw.length + 1],
    [coded.subarray(0, -1), raw.length],
    [Uint8Array.of(...coded, 0), raw.length],
    [Uint8Array.of(...coded, ...coded), raw.length],
    [Uint8Array.of(7, 7, 7), 1],
    [new Uint8Array(0), 0],
  ]) {
    await rejected(() => decode("deflate", bytes, size, "it"), /^it (does not inflate|has bytes after)/);
  }
});

test("a decompression bomb is stopped at the size that was said", async () => {
  const bomb = new Uint8Array(deflateRawSync(new Uint8Array(64 << 20)));
  const before = process.memoryUsage().arrayBuffers;
  await rejected(() => decode("deflate", bomb, 1000, "it"), /does not inflate to 1000 bytes/);
  assert.ok(process.memoryUsage().arrayBuffers - before < 16 << 20);
});

// --- signatures ------------------------------------------------------------------------------------------------------

const MANIFEST = utf8('{"format":"qdeploy-bundle/1"}\n');
const PUBLIC = "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8"; // of the private key 00 01 .. 1f
const KEYID = "63d00ee3cf4f5c61ad94efa696c68f13b608fe56ecea13fb144a6fd18e9235b9";
const SIGNATURE =
  "77af1760dc2a08460518ceeebf5ed1f24c036a9a5bb0f591a12c299397fd7e6a" +
  "d36cfee90e5afef9849efe093a711d9defd4e40d03f737efb3feb00e872b080e";

function rootOf(keys, threshold = 1) {
  const entry = ([keyid, hex]) => [keyid, { keytype: "ed25519", keyval: { public: hex }, scheme: "ed25519" }];
  const role = { keyids: keys.map(([keyid]) => keyid), threshold };
  const signed = { _type: "root", keys: Object.fromEntries(keys.map(entry)), roles: { targets: role } };
  return utf8(JSON.stringify({ signatures: [], signed }));
}

const releaseOf = (...signatures) => ({ signatures: signatures.map(([keyid, signature]) => ({ keyid, signature })) });

test("the signature of FORMAT.md", async () => {
  const root = await readRoot(rootOf([[KEYID, PUBLIC]]));
  assert.deepEqual(await signers(root, releaseOf([KEYID, SIGNATURE]), MANIFEST), [KEYID]);
});

test("wrong, altered, foreign and too few signatures are refused", async () => {
  const root = await readRoot(rootOf([[KEYID, PUBLIC]]));
  const turned = SIGNATURE.replace(/^7/, "6");
  const other = MANIFEST.map((byte, i) => (i === 5 ? byte ^ 1 : byte));
  await rejected(() => signers(root, releaseOf(), MANIFEST), /nobody signed/);
  await rejected(() => signers(root, releaseOf(["0".repeat(64), SIGNATURE]), MANIFEST), /too few/);
  for (const text of [turned, SIGNATURE.slice(2), `${SIGNATURE}00`, SIGNATURE.toUpperCase(), "", "x".repeat(128)]) {
    await rejected(() => signers(root, releaseOf([KEYID, text]), MANIFEST), /too few/);
  }
  await rejected(() => signers(root, releaseOf([KEYID, SIGNATURE]), other), /too few/);
  const pair = await crypto.subtle.generateKey("Ed25519", true, ["sign", "verify"]);
  const hex = toHex(new Uint8Array(await crypto.subtle.exportKey("raw", pair.publicKey)));
  const keyid = await sha256(utf8(`{"keytype":"ed25519","keyval":{"public":"${hex}"},"scheme":"ed25519"}`));
  const second = toHex(new Uint8Array(await crypto.subtle.sign("Ed25519", pair.privateKey, MANIFEST)));
  const both = await readRoot(rootOf([[KEYID, PUBLIC], [keyid, hex]], 2));
  await rejected(() => signers(both, releaseOf([KEYID, SIGNATURE], [KEYID, SIGNATURE]), MANIFEST), /1 of 2/);
  assert.equal((await signers(both, releaseOf([KEYID, SIGNATURE], [keyid, second]), MANIFEST)).length, 2);
  const three = releaseOf([KEYID, turned], [KEYID, SIGNATURE], [keyid, second]);
  assert.equal((await signers(both, three, MANIFEST)).length, 2);
});

test("only root metadata with sound targets keys is taken", async () => {
  for (const data of [
    utf8(""),
    utf8("null"),
    utf8("[]"),
    Uint8Array.of(255, 254),
    new Uint8Array(512001).fill(32),
    rootOf([[KEYID, PUBLIC]], 0),
    rootOf([[KEYID, PUBLIC]], 2),
    rootOf([[KEYID, PUBLIC], [KEYID, PUBLIC]], 2),
    rootOf([["1".repeat(64), PUBLIC]]),
    rootOf([[KEYID, PUBLIC.toUpperCase()]]),
    rootOf([[KEYID, "00"]]),
    utf8(new TextDecoder().decode(rootOf([[KEYID, PUBLIC]])).replace('"_type":"root"', '"_type":"targets"')),
    utf8(new TextDecoder().decode(rootOf([[KEYID, PUBLIC]])).replace('"ed25519"', '"rsa"')),
  ]) {
    await rejected(() => readRoot(data), /no TUF root metadata/);
  }
});

test("numbers of releases only grow", () => {
  const [one, two] = [{ release: 1, sha256: "a" }, { release: 2, sha256: "b" }];
  checkCounter(undefined, one);
  checkCounter(one, one);
  checkCounter(one, two);
  refused(() => checkCounter(two, one), /^rollback/);
  refused(() => checkCounter(one, { release: 1, sha256: "b" }), /another release 1/);
});

test("a browser that lacks Ed25519 or cryptography is told so", async () => {
  const root = await readRoot(rootOf([[KEYID, PUBLIC]]));
  const { importKey } = crypto.subtle;
  crypto.subtle.importKey = async () => {
    throw new DOMException("no such algorithm", "NotSupportedError");
  };
  try {
    await rejected(() => signers(root, releaseOf([KEYID, SIGNATURE]), MANIFEST), /cannot check Ed25519/);
  } finally {
    crypto.subtle.importKey = importKey;
  }
  const found = Object.getOwnPropertyDescriptor(globalThis, "crypto");
  Object.defineProperty(globalThis, "crypto", { value: {}, configurable: true });
  try {
    await rejected(() => sha256(MANIFEST), /open it over https or on localhost/);
  } finally {
    Object.defineProperty(globalThis, "crypto", found);
  }
});
