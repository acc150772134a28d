// The table of devices: sorted, narrowed and paged by the server; and one device's changes.

import { $, el, fill, say } from "./dom.mjs";
import { bytes, count, span, utc } from "./format.mjs";

const TROUBLES = { behind: ["behind", "warn"], stale: ["stale", "warn"], errors: ["error", "bad"], silent: ["silent", "warn"] };
const view = { sort: "device", order: "asc", only: "", find: "", start: 0 };
let known = new Map(); // device -> its row and what it said
let page = { count: 0, start: 0, size: 25 };

/** The view as a URL's query. */
export const query = () => new URLSearchParams(view).toString();

function state(row) {
  const parts = row.trouble.map((name) => {
    const [text, kind] = TROUBLES[name];
    return el("span", { class: `state ${kind}` }, name === "errors" ? `error: ${row.error}` : text);
  });
  if (row.otherwise !== null) parts.push(el("span", { class: "note" }, `to run ${row.otherwise}`));
  if (!parts.length) parts.push(el("span", { class: "state good" }, "ok"));
  return el("td", {}, ...parts.flatMap((part, index) => (index ? [" · ", part] : [part])));
}

function cells(row, now) {
  const level = row.wanted === row.reached ? row.reached : `${row.reached}, wants ${row.wanted}`;
  const button = el("button", { type: "button", "data-device": row.device, title: "Its changes" }, row.device);
  return [
    el("th", { scope: "row" }, button),
    state(row),
    el("td", { title: level }, level),
    el("td", { class: "number" }, `${row.model} ${row.release}`),
    el("td", { title: row.target }, row.target),
    el("td", {}, row.channel ?? "–"),
    el("td", { class: "number", title: `${count(row.fetched)} bytes` }, bytes(row.fetched)),
    el("td", { class: "number", title: utc(row.seen) }, `${span(now - row.seen)} ago`),
  ];
}

/** A row for a device; one that was there keeps its elements, so that focus stays. */
function place(row, now) {
  const { seen, ...lasting } = row;
  const said = JSON.stringify(lasting);
  const before = known.get(row.device);
  const made = cells(row, now);
  if (before === undefined) return { said, tr: el("tr", {}, ...made) };
  [...before.tr.cells].slice(1).forEach((cell, index) => {
    if (cell.outerHTML !== made[index + 1].outerHTML) cell.replaceWith(made[index + 1]);
  });
  before.tr.classList.toggle("fresh", before.said !== said);
  return { said, tr: before.tr };
}

/** Show the page of devices of an answer; null on a server that takes no reports. */
export function showDevices(devices, now) {
  if (devices === null) {
    known = new Map();
    fill($("table"), [], "This server takes no reports: start it with --devices FILE.");
    say($("count"), "");
    return;
  }
  page = devices;
  view.start = devices.start;
  const next = new Map(devices.rows.map((row) => [row.device, place(row, now)]));
  const order = [...next.keys()].join("\n");
  if (order !== [...known.keys()].join("\n") || !next.size) {
    const focused = document.activeElement?.dataset?.device;
    fill($("table"), [...next.values()].map(({ tr }) => tr), "No device.");
    if (focused !== undefined) next.get(focused)?.tr.querySelector("button").focus({ preventScroll: true });
  }
  known = next;
  const end = devices.start + devices.rows.length;
  const narrowed = view.only || view.find ? " found" : "";
  say($("count"), `${count(devices.count)} ${devices.count === 1 ? "device" : "devices"}${narrowed}`);
  say($("range"), end ? `${count(devices.start + 1)} to ${count(end)} of ${count(devices.count)}` : "");
  for (const button of document.querySelectorAll("[data-page]")) {
    const back = ["first", "previous"].includes(button.dataset.page);
    button.disabled = back ? devices.start === 0 : end >= devices.count;
  }
}

async function showHistory(device) {
  const answer = await fetch(`/devices/${encodeURIComponent(device)}`);
  if (!answer.ok) return;
  const rows = (await answer.json()).devices.reverse().map((row) =>
    el("tr", {},
      el("td", {}, utc(row.seen)),
      el("td", { class: "number" }, `${row.model} ${row.release}`),
      el("td", {}, row.wanted === row.reached ? row.reached : `${row.reached}, wants ${row.wanted}`),
      el("td", {}, [row.stale && "stale", row.error].filter(Boolean).join(" · ") || "ok")));
  $("history-title").textContent = `Changes of ${device}`;
  fill($("history").querySelector("table"), rows, "No change is kept.");
  $("history").showModal();
}

/** Connect the controls of the table; `renew` asks the server again. */
export function connectDevices(renew) {
  const change = (wish) => {
    Object.assign(view, wish);
    renew();
  };
  for (const button of document.querySelectorAll("[data-sort]")) {
    button.addEventListener("click", () => {
      const turn = view.sort === button.dataset.sort && view.order === "asc";
      for (const head of $("table").tHead.rows[0].cells) head.removeAttribute("aria-sort");
      button.parentElement.setAttribute("aria-sort", turn ? "descending" : "ascending");
      change({ sort: button.dataset.sort, order: turn ? "desc" : "asc", start: 0 });
    });
  }
  for (const button of document.querySelectorAll("[data-page]")) {
    button.addEventListener("click", () => {
      const starts = { first: 0, previous: page.start - page.size, next: page.start + page.size, last: page.count };
      change({ start: Math.max(0, starts[button.dataset.page]) });
    });
  }
  $("filter").addEventListener("submit", (event) => event.preventDefault());
  $("find").addEventListener("input", () => change({ find: $("find").value, start: 0 }));
  $("only").addEventListener("change", () => change({ only: $("only").value, start: 0 }));
  $("table").tBodies[0].addEventListener("click", (event) => {
    const device = event.target.closest("button")?.dataset.device;
    if (device !== undefined) showHistory(device).catch(() => {}); // the next poll says what is wrong
  });
}
