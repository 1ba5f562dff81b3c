// Shows the rows, in all tables, that hold every word that is looked for: a run's name, a question, a verdict.
const find = document.getElementById("find"), count = document.getElementById("count");
const rows = [...document.querySelectorAll("section tbody tr")];
const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
const narrow = () => {
  const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const row of rows) row.hidden = !words.every((word) => texts.get(row).includes(word));
  for (const section of document.querySelectorAll("section.table")) {
    section.hidden = words.length > 0 && ![...section.querySelectorAll("tbody tr")].some((row) => !row.hidden);
  }
  count.textContent = words.length ? `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows` : "";
};
find.addEventListener("input", narrow);
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.altKey || event.metaKey || /INPUT|SELECT|TEXTAREA/.test(event.target.tagName)) return;
  event.preventDefault();
  find.focus();
});
