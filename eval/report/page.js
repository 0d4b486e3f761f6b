"use strict";

// Every head of a table sorts it; the flips can be filtered. Without this script the page shows the same.

const collator = new Intl.Collator("en", { numeric: true, sensitivity: "base" });

function content(cell) {
  const data = cell.querySelector("data");
  return data ? data.value : cell.textContent.trim();
}

function compare(a, b) {
  const blank = (text) => text === "" || text === "-";
  if (blank(a) || blank(b)) return blank(a) - blank(b);
  const difference = Number(a) - Number(b);
  return Number.isNaN(difference) ? collator.compare(a, b) : difference;
}

function sort(table, head, index) {
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => [content(row.cells[index]), row]);
  const blank = (text) => text === "" || text === "-";
  // What was not measured stays at the end, whichever way the rest is turned.
  rows.sort(([a], [b]) => (down && !blank(a) && !blank(b) ? compare(b, a) : compare(a, b)));
  body.append(...rows.map(([, row]) => row));
}

for (const table of document.querySelectorAll("table")) {
  [...table.tHead.rows[0].cells].forEach((head, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(table, head, index));
    head.append(button);
  });
}

for (const form of document.querySelectorAll("form.filter")) {
  const rows = [...document.querySelectorAll(`#${form.dataset.of} tbody tr`)];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const status = form.querySelector("output");
  const apply = () => {
    const words = form.elements.words.value.trim().toLowerCase();
    const chosen = [...form.querySelectorAll("select")].filter((select) => select.value);
    let shown = 0;
    rows.forEach((row, index) => {
      const fits = chosen.every((s) => row.cells[Number(s.dataset.column)].textContent === s.value);
      row.hidden = !(fits && texts[index].includes(words));
      shown += row.hidden ? 0 : 1;
    });
    status.textContent = `${shown} of ${rows.length} shown`;
  };
  form.hidden = false;
  form.addEventListener("input", apply);
  form.addEventListener("reset", () => setTimeout(apply));
  form.addEventListener("submit", (event) => event.preventDefault());
  apply();
}

// A picture that is wider than the screen is scrolled, and so must be reached with the keyboard.
function reach() {
  for (const figure of document.querySelectorAll("figure")) {
    if (figure.scrollWidth > figure.clientWidth) figure.tabIndex = 0;
    else figure.removeAttribute("tabindex");
  }
}
addEventListener("resize", reach);
reach();

// What is folded away on the screen belongs on paper.
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  for (const details of opened) details.open = true;
});
addEventListener("afterprint", () => {
  for (const details of opened) details.open = false;
});
