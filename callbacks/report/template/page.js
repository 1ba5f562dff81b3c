// Sorts a table by the column whose head was pressed: by number where cells have one (NaN last), else by text.
// What was measured in different ways (data-way) is never ranked together.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, body = head.closest("table").tBodies[0];
    const rising = head.getAttribute("aria-sort") !== "ascending", sign = rising ? 1 : -1;
    const value = (row) => {
      const cell = row.cells[head.cellIndex];
      return "order" in cell.dataset ? Number(cell.dataset.order) : cell.textContent;
    };
    const way = (row) => row.cells[head.cellIndex].dataset.way ?? "";
    const compare = (a, b) => {
      if (way(a) !== way(b)) return way(a).localeCompare(way(b), "en", { numeric: true });
      const [x, y] = [value(a), value(b)];
      if (typeof x !== "number" || typeof y !== "number") return sign * String(x).localeCompare(String(y), "en", { numeric: true });
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return sign * (x - y);
    };
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    body.append(...[...body.rows].sort(compare));
  });
}
