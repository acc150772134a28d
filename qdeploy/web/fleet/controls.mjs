// Changes of the rollout: unlocked by a token, reviewed as the server rehearsed them, then signed and published.

import { $, el, say } from "./dom.mjs";

let token = null; // in memory alone: a reload forgets it
let signs = false; // the server has keys
let earlier = {}; // model -> releases to go back to
let releases = [];
let shown = ""; // what the forms were made of
let pending = null; // {change, confirm} under review
let renew = () => {};

async function call(path, body) {
  const headers = { Authorization: `Bearer ${token}` };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const method = body === undefined ? "GET" : "POST";
  const answer = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  if (!answer.ok) throw Object.assign(new Error((await answer.text()).trim()), { status: answer.status });
  return answer.json();
}

function lock(text) {
  token = null;
  shown = "";
  $("unlocked").hidden = true;
  $("unlock").hidden = false;
  say($("control-message"), text);
}

function failed(error) {
  if ($("review").open) say($("review-message"), error.message);
  else say($("control-message"), error.message);
  if (error.status === 401) {
    $("review").close();
    lock(error.message);
  }
}

async function learn() {
  ({ signs, earlier } = await call("/control"));
}

// --- review ----------------------------------------------------------------------------------------------------------

const LABELS = { channel: "Channel", release: "Release", percent: "Share", hold: "Hold", minimum: "Minimum level", levels: "Levels of classes" };

function text(name, value) {
  if (name === "percent") return value === null ? "all devices" : `${value}% of the devices`;
  if (name === "hold") return value ? "on hold" : "no";
  if (name === "levels") return Object.entries(value).sort().map(([key, level]) => `${key}: ${level}`).join(", ") || "none";
  return value === null ? "none" : String(value);
}

function reviewRows({ before, after }) {
  return Object.keys(LABELS).map((name) => {
    const [now, then] = [before, after].map((row) => (row === null ? "–" : text(name, row[name])));
    const label = el("th", { scope: "row" }, LABELS[name]);
    return el("tr", { class: now === then ? null : "differs" }, label, el("td", {}, now), el("td", {}, then));
  });
}

async function review(change) {
  say($("control-message"), "");
  const plan = await call("/control/plan", change);
  pending = { change, confirm: plan.confirm };
  $("review-text").textContent = signs
    ? `What devices of ${change.model} are told, before and after. Nothing is changed yet.`
    : "This server has no keys, so it changes nothing. Run this where the keys are:";
  $("review-table").hidden = !signs;
  $("apply").hidden = !signs;
  $("apply").disabled = false;
  if (signs) $("review-table").tBodies[0].replaceChildren(...reviewRows(plan));
  $("review-command").textContent = plan.command;
  say($("review-message"), "");
  $("review").showModal();
}

async function apply() {
  $("apply").disabled = true;
  const done = await call("/control/apply", pending);
  $("review").close();
  await learn();
  shown = "";
  renew();
  say($("control-message"), `Done: ${done.model} release ${done.release}, ${done.channel}. Devices hear of it when they ask next.`);
}

// --- forms -----------------------------------------------------------------------------------------------------------

function choice(label, name, options, chosen) {
  const list = options.map(([value, shownAs]) => el("option", { value, selected: value === chosen ? "" : null }, shownAs));
  return el("label", {}, label, el("select", { name }, ...list));
}

function form(children, button, read) {
  const made = el("form", { class: "change" }, ...children, el("button", { type: "submit" }, button));
  made.addEventListener("submit", (event) => {
    event.preventDefault();
    review(read(new FormData(made))).catch(failed);
  });
  return made;
}

/** Only what differs from what is in force goes into the change. */
function wishOf(row, data) {
  const change = { model: row.model };
  const hold = data.get("hold") !== null;
  if (hold !== row.hold) change.hold = hold;
  const percent = data.get("percent");
  if (percent && Number(percent) !== row.percent) change.percent = Number(percent);
  const minimum = data.get("minimum");
  if (minimum && minimum !== row.minimum) change.minimum = minimum;
  const levels = {};
  for (const [name, level] of data) {
    if (!name.startsWith("class ")) continue;
    const target = name.slice("class ".length);
    if (level !== (row.classes[target] ?? "")) levels[target] = level;
  }
  if (Object.keys(levels).length) change.levels = levels;
  return change;
}

function settings(row) {
  const levels = row.levels.map((level) => [level.name, level.name]);
  const targets = new Set([...Object.keys(row.classes), ...row.artifacts.map((program) => program.name)]);
  const hold = el("input", { type: "checkbox", name: "hold", checked: row.hold ? "" : null });
  const parts = [];
  if (row.percent !== null) {
    const share = el("input", { type: "number", name: "percent", min: row.percent, max: 100, step: 1, value: row.percent, required: "" });
    parts.push(el("label", {}, "Canary share, % (it only grows)", share));
  }
  parts.push(choice("Minimum level", "minimum", row.minimum === null ? [["", "none"], ...levels] : levels, row.minimum ?? ""));
  for (const target of [...targets].sort()) {
    parts.push(choice(`Level of ${target}`, `class ${target}`, [["", "its own choice"], ...levels], row.classes[target] ?? ""));
  }
  parts.push(el("label", { class: "tick" }, hold, "Hold: no more devices take it"));
  return form(parts, "Review…", (data) => wishOf(row, data));
}

function forms(model) {
  const rows = releases.filter((row) => row.model === model);
  const row = rows.find((one) => one.channel === "canary") ?? rows[0]; // what a change is about, as in qdeploy rollout
  const found = [el("h3", {}, `${model} release ${row.release}, ${row.channel}`), settings(row)];
  if (row.channel === "canary") {
    found.push(form([], `Give release ${row.release} to all devices…`, () => ({ model, promote: true })));
  }
  const back = earlier[model] ?? [];
  if (back.length) {
    const options = back.map((release) => [String(release), `release ${release}`]);
    const label = "Go back (it gets the next number)";
    found.push(form([choice(label, "back", options, options[0][0])], "Review…", (data) => ({ model, back: Number(data.get("back")) })));
  } else if (!signs) {
    found.push(el("p", { class: "note" }, "To go back, publish the old bundle again where the keys are."));
  }
  return el("div", {}, ...found);
}

/** Show forms for what is in force, once the page is unlocked; half-filled ones stay while nothing changed. */
export function showControls(found) {
  const signed = found.tree?.signed ?? false;
  $("controls").hidden = $("to-controls").hidden = !found.controls || !signed;
  if (!signed) return;
  releases = found.tree.releases;
  if (token === null) return;
  const text = JSON.stringify([releases, earlier, signs]);
  if (text === shown) return;
  shown = text;
  const models = [...new Set(releases.map((row) => row.model))];
  $("unlocked").replaceChildren(...models.map(forms));
  $("unlocked").hidden = false;
}

/** Connect the forms; `ask` asks the server for what is in force now. */
export function connectControls(ask) {
  renew = ask;
  $("unlock").addEventListener("submit", (event) => {
    event.preventDefault();
    token = $("token").value;
    $("token").value = "";
    learn().then(() => {
      $("unlock").hidden = true;
      say($("control-message"), signs ? "Unlocked." : "Unlocked. This server has no keys: it says which command to run.");
      renew();
    }).catch((error) => lock(error.message));
  });
  $("apply").addEventListener("click", () => apply().catch((error) => {
    failed(error);
    renew();
  }));
}
