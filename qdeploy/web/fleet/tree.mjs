// What is published: releases with their ladders, and the objects that hold them.

import { $, el, fill, say, track } from "./dom.mjs";
import { bytes, count } from "./format.mjs";

let shown = "";

function rules(row) {
  const found = [];
  if (row.percent !== null) found.push(`to ${row.percent}% of the devices`);
  if (row.minimum !== null) found.push(`minimum ${row.minimum}`);
  for (const [name, level] of Object.entries(row.classes).sort()) found.push(`${name} runs ${level}`);
  return found.join(" · ");
}

function ladder(row) {
  const top = Math.max(1, ...row.levels.map((level) => level.bytes));
  const head = [["Level"], ["In all", "number"], ["Climb", "number"], ["Share of the top level", "wide"]];
  const caption = `Levels of ${row.model} release ${row.release}: bytes from nothing, and from the level before`;
  const cells = head.map(([text, kind]) => el("th", { scope: "col", class: kind ?? null }, text));
  const rows = row.levels.map((level) =>
    el("tr", {},
      el("th", { scope: "row" }, level.name),
      el("td", { class: "number", title: `${count(level.bytes)} bytes` }, bytes(level.bytes)),
      el("td", { class: "number", title: `${count(level.step)} bytes` }, bytes(level.step)),
      el("td", { class: "wide" }, track(level.bytes / top))));
  const table = el("table", { "aria-label": caption }, el("thead", {}, el("tr", {}, ...cells)), el("tbody", {}, ...rows));
  return el("div", { class: "scroll" }, table);
}

function release(row) {
  const name = `${row.model} release ${row.release}`;
  const title = el("h3", {}, name, row.channel === null ? " · unsigned" : ` · ${row.channel}`);
  if (row.hold) title.append(" · ", el("span", { class: "state warn" }, "on hold"));
  const programs = row.artifacts.map((program) => `${program.name} ${bytes(program.bytes)}`).join(", ");
  const notes = [rules(row), programs && `compiled programs: ${programs}`].filter(Boolean);
  return el("div", { class: "release" }, title, ...notes.map((text) => el("p", { class: "note" }, text)), ladder(row));
}

function objects(found) {
  const parts = [`${count(found.count)} in the releases in force, ${bytes(found.bytes)}`];
  parts.push(`${count(found.shared)} shared between releases, ${bytes(found.shared_bytes)}`);
  parts.push(`${count(found.stored)} on disk, ${bytes(found.stored_bytes)}`);
  if (found.rows.length < found.count) parts.push(`the ${found.rows.length} largest below`);
  if (found.missing.length) parts.push(`MISSING on disk: ${found.missing.length}`);
  say($("objects-note"), parts.join(" · "));
  const rows = found.rows.map((row) =>
    el("tr", {},
      el("th", { scope: "row" }, el("code", { title: row.sha256 }, row.sha256.slice(0, 12))),
      el("td", { class: "number", title: `${count(row.size)} bytes` }, bytes(row.size)),
      el("td", {}, row.of.join(", ") || "–"),
      el("td", {}, row.releases.join(", "))));
  fill($("objects"), rows, "No objects.");
}

/** Show a tree of /fleet.json; null when it cannot be read. */
export function showTree(tree) {
  const text = JSON.stringify(tree);
  if (text === shown) return;
  shown = text;
  if (tree === null) {
    $("releases").replaceChildren(el("p", { class: "note" }, "Not readable now."));
    return;
  }
  $("releases").replaceChildren(...tree.releases.map(release));
  objects(tree.objects);
}
