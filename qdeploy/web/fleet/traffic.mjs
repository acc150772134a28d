// Rates from counters: what the server sent between one answer and the next.

import { $, say } from "./dom.mjs";
import { bytes, count } from "./format.mjs";

const KEPT_S = 120;
const WIDTH = 600;
const HEIGHT = 120;
let samples = []; // {time, server}
let rates = []; // {time, bytes: a second}

function draw() {
  const svg = $("traffic");
  const end = rates.at(-1).time;
  const top = Math.max(1, ...rates.map((rate) => rate.bytes));
  const place = ({ time, bytes: value }) =>
    `${(WIDTH * (1 - (end - time) / KEPT_S)).toFixed(1)},${(HEIGHT - 4 - ((HEIGHT - 10) * value) / top).toFixed(1)}`;
  const points = rates.map(place);
  const [first, last] = [points[0], points.at(-1)].map((point) => point.split(",")[0]);
  if (!svg.firstChild) {
    for (const tag of ["path", "polyline"]) svg.append(document.createElementNS("http://www.w3.org/2000/svg", tag));
  }
  svg.firstChild.setAttribute("d", `M${first},${HEIGHT}L${points.join("L")}L${last},${HEIGHT}Z`);
  svg.lastChild.setAttribute("points", points.join(" "));
  say($("traffic-note"), `Highest ${bytes(top)}/s. Measured while this page is open, right is now.`);
}

/** Take the counters of an answer; two of them make a rate. */
export function showTraffic(time, server) {
  const before = samples.at(-1);
  say($("now-requests-note"), `${count(server.connections)} connections open`);
  say($("now-rate-note"), `${bytes(server.sent)} since the start`);
  if (before !== undefined && server.requests < before.server.requests) {
    samples = []; // the server was started anew
    rates = [];
  } else if (before !== undefined && time > before.time) {
    const seconds = time - before.time;
    rates.push({ time, bytes: (server.sent - before.server.sent) / seconds });
    rates = rates.filter((rate) => rate.time > time - KEPT_S);
    say($("now-rate"), `${bytes(rates.at(-1).bytes)}/s`);
    say($("now-requests"), `${((server.requests - before.server.requests) / seconds).toFixed(1)}/s`);
    draw();
  }
  samples = [...samples.slice(-1), { time, server }];
}
