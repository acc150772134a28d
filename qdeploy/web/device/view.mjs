// What stands on the page: pure functions of what is known, and nothing that is asked of a server.

import { toRgba } from "./arrays.mjs";

const LOG_ROWS = 200;
const BEST = 3; // classes that are shown for an image of one's own

export const element = (id) => document.getElementById(id);
export const count = (number) => number.toLocaleString("en");

function make(tag, text = "", attributes = {}) {
  const found = document.createElement(tag);
  found.textContent = text;
  for (const [name, value] of Object.entries(attributes)) {
    found.setAttribute(name, value);
  }
  return found;
}

/** What goes on, for eyes and screen readers. */
export function say(text) {
  element("status").textContent = text;
}

/** One line about what went wrong; an empty one takes it away. */
export function alarm(text) {
  element("alert").textContent = text;
  element("alert").hidden = text === "";
}

export function askForKeys(take) {
  element("keys").hidden = false;
  element("root-file").onchange = async (event) => {
    alarm("");
    await take(event.target.files[0]);
  };
}

export function showRelease({ model, release, digest, signers, threshold }) {
  element("keys").hidden = true;
  element("device").hidden = false;
  element("release").textContent = `${model}, release ${release}`;
  const keys = signers.map((keyid) => keyid.slice(0, 12)).join(" and ");
  const facts = [
    `Ed25519 signatures over the manifest: ${signers.length} of the publisher's keys (${keys}), ${threshold} needed`,
    `The manifest ${digest.slice(0, 12)} and every rule of its format`,
    "SHA-256 of each leaf of 64 KiB before it is kept, and again before it is used",
    "SHA-256 of each piece before it is inflated, and of each level's whole ONNX file before it runs",
    "The release number: never below the highest that this browser took",
  ];
  element("checked").replaceChildren(...facts.map((fact) => make("li", fact)));
}

// --- figures and ladder ----------------------------------------------------------------------------------------------

const percent = (tally) => (tally?.seen ? ((100 * tally.correct) / tally.seen).toFixed(1) : null);
const latency = (tally) => tally?.latency?.toFixed(2) ?? null;

function rowOf(rung) {
  const row = make("tr");
  const bytes = make("div", "", { class: "bytes" });
  const bar = make("progress", "", { max: rung.total, "aria-label": `Bytes of level ${rung.name} held` });
  bytes.append(bar, make("span"));
  const held = make("td", "", { class: "held" });
  held.append(bytes);
  const cells = ["Bits", "To fetch", "Accuracy", "Latency"].map((name) =>
    make("td", "", { class: "number", "data-name": name }),
  );
  const action = make("td");
  action.append(make("button", "", { type: "button", class: "step" }));
  row.append(make("th", rung.name, { scope: "row" }), cells[0], held, ...cells.slice(1), action);
  return row;
}

/** Keep the cells and change their texts, so that focus stays where it is. */
function fillRow(row, rung, known, take) {
  const tally = known.tallies.get(rung.name);
  const [bits, held, lacking, accuracy, time, action] = row.querySelectorAll("td");
  bits.textContent = rung.bits.toFixed(2);
  const there = rung.total - rung.missing + (rung.name === known.step ? known.arriving : 0);
  held.querySelector("progress").value = there;
  held.querySelector("span").textContent = `${count(there)} of ${count(rung.total)} bytes`;
  lacking.textContent = count(rung.total - there);
  accuracy.textContent = percent(tally) === null ? "–" : `${percent(tally)}%`;
  time.textContent = latency(tally) === null ? "–" : `${latency(tally)} ms`;
  const button = action.querySelector("button");
  const current = rung.name === known.level;
  const down = known.rungs.find((one) => one.name === known.level)?.below.includes(rung.name) ?? false;
  row.toggleAttribute("aria-current", current);
  button.textContent = current ? "In force" : rung.name === known.step ? "Coming…" : down ? "Drop" : "Climb";
  const step = `${down ? "Drop" : "Climb"} to ${rung.name}`;
  button.setAttribute("aria-label", current ? `${rung.name} is in force` : step);
  button.classList.toggle("drop", down);
  const idle = !current && known.step === null;
  button.setAttribute("aria-disabled", String(!idle)); // one that is `disabled` would lose the keyboard's focus
  button.onclick = idle ? () => take(rung.name) : null;
}

/**
 * @param {object} known the page's state, with the level in force, the tallies and whether it is paused
 * @param {(name: string) => void} take what a rung's button does
 */
export function render(known, take) {
  const body = element("ladder").tBodies[0];
  if (body.rows.length !== known.rungs.length) {
    body.replaceChildren(...known.rungs.map(rowOf));
  }
  known.rungs.forEach((rung, i) => fillRow(body.rows[i], rung, known, take));
  const tally = known.tallies.get(known.level);
  const rung = known.rungs.find((one) => one.name === known.level);
  element("now-level").textContent = known.level ?? "–";
  element("now-bits").textContent = rung ? `${rung.bits.toFixed(2)} bits a weight` : "";
  element("now-accuracy").textContent = percent(tally) === null ? "–" : `${percent(tally)}%`;
  element("now-seen").textContent = tally ? `of ${count(tally.seen)} images` : "";
  element("now-latency").textContent = latency(tally) ?? "–";
  element("now-fetched").textContent = count(known.fetched);
  element("pause").textContent = known.paused ? "Go on" : "Pause";
  element("pause").hidden = known.sample === null;
}

// --- requests --------------------------------------------------------------------------------------------------------

let requests = 0;

/** One more row of the log. */
export function addRow({ path, range, status, bytes }) {
  const rows = element("log").tBodies[0];
  const row = make("tr");
  row.append(
    make("td", path),
    make("td", range),
    make("td", String(status), { class: "number" }),
    make("td", count(bytes), { class: "number" }),
  );
  rows.append(row);
  if (rows.rows.length > LOG_ROWS) {
    rows.deleteRow(0);
  }
  requests += 1;
  element("log-count").textContent = count(requests);
}

// --- images ----------------------------------------------------------------------------------------------------------

const nameOf = (classes, number) => classes?.[number] ?? `class ${number}`;

export function showSample(sample) {
  element("sample-note").textContent = `${count(sample.count)} images with labels, over and over, and what it says.`;
}

function draw(canvas, pixels, shape) {
  const [, height, width] = shape;
  [canvas.width, canvas.height] = [width, height];
  canvas.getContext("2d").putImageData(toRgba(pixels, shape), 0, 0);
}

/** The images of a batch with the level's answers. */
export function showBatch(sample, { at, guesses }) {
  const strip = element("strip");
  while (strip.children.length < guesses.length) {
    const item = make("li");
    item.append(make("canvas", "", { "aria-hidden": "true" }), make("span"));
    strip.append(item);
  }
  [...strip.children].forEach((item, i) => {
    item.hidden = i >= guesses.length;
    if (item.hidden) {
      return;
    }
    const label = sample.labels[at + i];
    const right = guesses[i] === label;
    draw(item.firstChild, sample.image(at + i), sample.shape);
    item.lastChild.className = right ? "right" : "wrong";
    const answer = nameOf(sample.classes, guesses[i]);
    item.lastChild.textContent = right ? `✓ ${answer}` : `✗ ${answer}, not ${nameOf(sample.classes, label)}`;
  });
}

/** A picture's middle, as large as the model reads it; its pixels. */
export function drawOwn(bitmap, [, height, width]) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  const scale = Math.max(width / bitmap.width, height / bitmap.height);
  const [w, h] = [bitmap.width * scale, bitmap.height * scale];
  context.imageSmoothingQuality = "high";
  context.fillStyle = "#fff"; // under what is transparent
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, (width - w) / 2, (height - h) / 2, w, h);
  return context.getImageData(0, 0, width, height);
}

/** What the model read of somebody's picture, and its best answers. */
export function showOwn(pixels, shape, scores, classes) {
  element("own").hidden = false;
  draw(element("own-canvas"), pixels, shape);
  const highest = Math.max(...scores);
  const weights = Array.from(scores, (score) => Math.exp(score - highest));
  const sum = weights.reduce((total, weight) => total + weight, 0);
  const best = weights.map((weight, i) => [weight / sum, i]).sort((a, b) => b[0] - a[0]);
  const texts = best.slice(0, BEST).map(([share, i]) => `${nameOf(classes, i)}: ${(100 * share).toFixed(1)}%`);
  element("own-scores").replaceChildren(...texts.map((text) => make("li", text)));
}
