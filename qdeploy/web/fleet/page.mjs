// The fleet page: asks for /fleet.json every two seconds and shows it.

import { connectControls, showControls } from "./controls.mjs";
import { connectDevices, query, showDevices } from "./devices.mjs";
import { $, el, fill, say, track } from "./dom.mjs";
import { bytes, count, share, span } from "./format.mjs";
import { showTraffic } from "./traffic.mjs";
import { showTree } from "./tree.mjs";

const EVERY_MS = 2000;
const PATIENCE_MS = 10000;
const RUNS = 8; // rows of "who runs what"
let paused = false;
let timer = null;
let asked = 0; // requests so far: an answer to an older one comes too late

function showRuns(fleet) {
  const runs = [...(fleet?.runs ?? [])].sort((a, b) => b.devices - a.devices);
  const rows = runs.slice(0, RUNS).map((row) =>
    el("tr", {},
      el("th", { scope: "row" }, row.model),
      el("td", {}, row.channel ?? "–"),
      el("td", { class: "number" }, row.release),
      el("td", {}, row.level),
      el("td", { class: "number" }, count(row.devices)),
      el("td", { class: "wide" }, track(row.devices / fleet.devices))));
  fill($("runs"), rows, fleet === null ? "This server takes no reports: start it with --devices FILE." : "No device has reported yet.");
  say($("runs-note"), runs.length > RUNS ? `and ${count(runs.length - RUNS)} smaller groups` : "");
}

function showFigures({ fleet, tree, time }) {
  const troubles = fleet?.troubles;
  say($("now-devices"), fleet ? count(fleet.devices) : "–");
  say($("now-devices-note"), fleet ? `${count(troubles.silent)} silent for a day, ${count(troubles.stale)} stale` : "no reports are taken");
  say($("now-reached"), fleet ? share(fleet.devices - troubles.behind, fleet.devices) : "–");
  say($("now-reached-note"), fleet ? `${count(troubles.behind)} behind, ${count(troubles.errors)} with an error` : "");
  const until = tree?.expires.timestamp ? Date.parse(tree.expires.timestamp) / 1000 - time : null;
  say($("now-expires"), until === null ? "–" : until > 0 ? `in ${span(until)}` : "expired");
  $("now-expires").className = until !== null && until < 86400 ? "bad" : "";
  say($("now-expires-note"), until === null ? "nothing is signed" : "run qdeploy refresh before");
}

function summary({ fleet, tree }) {
  const releases = (tree?.releases ?? []).map((row) => {
    const share = row.percent === null ? "" : ` to ${row.percent}%`;
    return `${row.model} release ${row.release}${row.channel ? `, ${row.channel}` : ""}${share}${row.hold ? ", on hold" : ""}`;
  });
  if (!fleet) return releases.join("; ");
  const devices = `${count(fleet.devices)} ${fleet.devices === 1 ? "device" : "devices"}, ${count(fleet.troubles.behind)} behind`;
  return [...releases, devices, `${bytes(fleet.fetched_bytes)} fetched in all`].join("; ");
}

function show(found) {
  say($("summary"), summary(found));
  showFigures(found);
  showTraffic(found.time, found.server);
  showTree(found.tree);
  showRuns(found.fleet);
  showDevices(found.devices, found.time);
  showControls(found);
  complain(found.problem);
}

function complain(text) {
  $("alert").hidden = !text;
  say($("alert"), text ?? "");
}

async function ask() {
  asked += 1;
  const mine = asked;
  clearTimeout(timer);
  try {
    const answer = await fetch(`/fleet.json?${query()}`, { signal: AbortSignal.timeout(PATIENCE_MS) });
    if (!answer.ok) throw new Error((await answer.text()).trim() || `status ${answer.status}`);
    const found = await answer.json();
    if (mine !== asked) return;
    show(found);
    say($("clock"), `as of ${new Date(found.time * 1000).toLocaleTimeString("en-GB")}`);
  } catch (error) {
    if (mine !== asked) return;
    complain(`The server does not answer as it should (${error.message}): trying again.`);
  }
  if (!paused) timer = setTimeout(ask, EVERY_MS);
}

$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", String(paused));
  $("pause").textContent = paused ? "Paused: go on" : "Pause";
  clearTimeout(timer);
  if (!paused) ask();
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden) clearTimeout(timer);
  else if (!paused) ask();
});
connectDevices(ask);
connectControls(ask);
ask();
