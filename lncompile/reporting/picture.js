"use strict";
// The norm under the pointer, or with the focus, is explained beside the drawing; #site-3 names one.
const details = document.getElementById("details");
const rows = Array.from(document.querySelectorAll(".row[data-site]"));
let chosen = null;

function choose(row) {
  if (!row || row === chosen) return;
  if (chosen) chosen.removeAttribute("aria-current");
  chosen = row;
  row.setAttribute("aria-current", "true");
  const more = row.querySelector(".more").cloneNode(true);
  more.hidden = false;
  details.replaceChildren(more);
  details.dataset.site = row.dataset.site;
}

function chooseNamed() {
  const row = rows.find((candidate) => "#" + candidate.id === location.hash);
  choose(row);
  return row;
}

for (const row of rows) {
  row.addEventListener("mouseenter", () => choose(row));
  row.addEventListener("focus", () => choose(row));
  row.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const next = step && rows[rows.indexOf(row) + step];
    if (next) {
      event.preventDefault();
      next.focus();
    }
  });
}
addEventListener("hashchange", chooseNamed);
// Something to read from the start: a norm that stays, where there is one.
if (!chooseNamed()) choose(rows.find((row) => row.classList.contains("stays")) || rows[0]);
