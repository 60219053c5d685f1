
"use strict";

function order(kind, direction) {
  const sign = direction === "ascending" ? 1 : -1;
  return (a, b) => {
    if (a.value === "" || b.value === "") return (a.value === "") - (b.value === ""); // empty cells come last
    return sign * (kind === "number" ? a.value - b.value : a.value.localeCompare(b.value, undefined, { numeric: true }));
  };
}

function sortBy(header) {
  const headers = [...header.parentElement.children];
  const body = header.closest("table").tBodies[0];
  const direction = header.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
  headers.forEach((other) => other.setAttribute("aria-sort", other === header ? direction : "none"));
  const rows = [...body.rows].map((row) => ({ row, value: row.cells[headers.indexOf(header)].dataset.value }));
  body.append(...rows.sort(order(header.dataset.kind, direction)).map(({ row }) => row));
}

for (const header of document.querySelectorAll(".sortable thead th")) {
  header.querySelector("button").addEventListener("click", () => sortBy(header));
}

for (const choice of document.querySelectorAll(".choice")) {
  choice.hidden = false;
  const select = choice.querySelector("select");
  const rows = choice.closest("section").querySelectorAll("tbody tr");
  select.addEventListener("change", () => {
    for (const row of rows) row.hidden = select.value !== "" && row.dataset.metric !== select.value;
  });
}

const dialog = document.querySelector("dialog");
for (const button of document.querySelectorAll(".enlarge")) {
  button.addEventListener("click", () => {
    dialog.querySelector(".enlarged").replaceChildren(button.querySelector("img").cloneNode());
    dialog.showModal();
  });
}
dialog?.addEventListener("click", (event) => {
  if (!event.target.closest("button")) dialog.close();
});
