// Plots say their figures where a reader points, or goes with Tab and the arrow keys. Without this script the tables do.
"use strict";

const tip = document.createElement("div");
tip.className = "tip";
tip.setAttribute("role", "tooltip");
tip.hidden = true;
document.body.append(tip);

function show(mark) {
  tip.textContent = mark.getAttribute("aria-label");
  tip.hidden = false;
  const box = mark.getBoundingClientRect();
  const own = tip.getBoundingClientRect();
  const left = Math.min(Math.max(4, box.right + 8), document.documentElement.clientWidth - own.width - 4);
  const above = box.top - own.height - 8;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${above > 4 ? above : box.bottom + 8}px`;
}

function hide() {
  tip.hidden = true;
}

function marksOf(plot) {
  return [...plot.querySelectorAll(".mark")];
}

function middle(mark) {
  const box = mark.getBoundingClientRect();
  return [box.left + box.width / 2, box.top + box.height / 2];
}

const WAYS = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };

// The mark that an arrow key leads to: the nearest one in its direction, where being aside counts twice.
function beside(marks, at, [right, down]) {
  const [x, y] = middle(marks[at]);
  let best = at;
  let least = Infinity;
  marks.forEach((mark, i) => {
    const [ox, oy] = middle(mark);
    const along = (ox - x) * right + (oy - y) * down;
    const aside = (ox - x) * down + (oy - y) * right;
    const far = along * along + 4 * aside * aside;
    if (along > 0.5 && far < least) [best, least] = [i, far];
  });
  return best;
}

function go(marks, from, to) {
  marks[from].setAttribute("tabindex", "-1");
  marks[to].setAttribute("tabindex", "0");
  marks[to].focus();
}

for (const plot of document.querySelectorAll(".plot")) {
  plot.addEventListener("pointerover", (event) => {
    const mark = event.target.closest(".mark");
    if (mark) show(mark);
    else hide();
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("focusin", (event) => {
    const mark = event.target.closest(".mark");
    if (mark) show(mark);
  });
  plot.addEventListener("focusout", hide);
  plot.addEventListener("keydown", (event) => {
    const marks = marksOf(plot);
    const at = marks.indexOf(document.activeElement);
    if (at < 0) return;
    const steps = { PageDown: at + 1, PageUp: at - 1, Home: 0, End: marks.length - 1 };
    if (event.key === "Escape") hide();
    const to = event.key in WAYS ? beside(marks, at, WAYS[event.key]) : steps[event.key];
    if (to === undefined) return;
    event.preventDefault();
    go(marks, at, Math.min(Math.max(to, 0), marks.length - 1));
  });
}
// Focus may bring its mark into view by scrolling: what it says then goes along, as under a pointer that stays on a mark.
function follow() {
  const mark = document.querySelector(".mark:hover") ?? document.activeElement?.closest(".mark");
  if (mark && !tip.hidden) {
    show(mark);
  } else {
    hide();
  }
}

window.addEventListener("scroll", follow, { passive: true, capture: true });
