// Runs side by side: filters, columns, the run that differences are taken against, and rows on demand.
// What a file beside the page holds is data, decoded here; texts only ever become text nodes.
const about = JSON.parse(document.getElementById("about").textContent);
const $ = (id) => document.getElementById(id);
const element = (name, text = "", kind = "") => {
  const made = document.createElement(name);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
};

// Files beside the page: each calls thundercat(name, base64 of gzipped JSON).
const KEPT = 8;  // sets of rows that stay in memory: those of a hundred runs would be gigabytes
const arrived = new Map(), asked = new Map();
globalThis.thundercat = (name, packed) => arrived.set(name, packed);
const unpacked = async (packed) => {
  const bytes = Uint8Array.from(atob(packed), (char) => char.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
};
const load = (name) => {
  const known = asked.get(name);
  if (known) {
    asked.delete(name);  // put at the end: what was used last is dropped last
    asked.set(name, known);
  } else {
    asked.set(name, new Promise((resolve, reject) => {
      const script = document.createElement("script"), file = `${about.folder}/${name}.js`;
      const failed = () => { asked.delete(name); reject(new Error(`${file} is not beside this page; copy the folder with it.`)); };
      script.onload = () => { if (arrived.has(name)) unpacked(arrived.get(name)).then(resolve, reject), arrived.delete(name); else failed(); script.remove(); };
      script.onerror = () => { failed(); script.remove(); };
      script.src = file;
      document.head.append(script);
    }));
    const sets = [...asked.keys()].filter((own) => own.startsWith("rows_"));
    if (sets.length > KEPT) asked.delete(sets[0]);
  }
  return asked.get(name);
};
const numbered = (number) => String(number).padStart(3, "0");

// Filters.
const runs = $("runs"), conditions = [];
const rowsOf = (table) => (table ? [...table.tBodies[0].rows] : []);
const sought = new Map(rowsOf(runs).map((row) => [row, row.textContent.toLowerCase()]));
const passes = (row) => {
  const words = $("find").value.toLowerCase().split(/\s+/).filter(Boolean);
  return words.every((word) => sought.get(row).includes(word)) && conditions.every((own) => {
    const value = Number(row.cells[own.column + 1].dataset.order ?? NaN) * about.scales[own.column];
    return own.sign * value >= own.sign * own.bound;
  });
};
const filter = () => {
  const kept = new Set();
  for (const row of rowsOf(runs)) {
    row.hidden = !passes(row);
    if (!row.hidden) kept.add(row.dataset.run);
  }
  for (const row of rowsOf($("pairs"))) row.hidden = !kept.has(row.dataset.run) || row.dataset.run === $("baseline").value;
  $("count").textContent = `${kept.size} of ${rowsOf(runs).length} runs`;
};
const titles = [...runs.tHead.querySelectorAll("th[data-column]")].map((head) => head.querySelector("button").firstChild.textContent.trim());
const sortable = (column) => rowsOf(runs).some((row) => "order" in row.cells[column + 1].dataset);
titles.forEach((title, column) => {
  if (!sortable(column)) return;
  const option = element("option", title + (about.scales[column] === 100 ? ", %" : ""));
  option.value = column;
  $("by").append(option);
});
const add = () => {
  if ($("by").value === "" || $("bound").value === "") return;
  const own = { column: Number($("by").value), sign: Number($("direction").value), bound: Number($("bound").value) };
  const chip = element("button", `${titles[own.column]} ${own.sign > 0 ? "≥" : "≤"} ${own.bound} ✕`);
  chip.type = "button";
  chip.title = "remove this condition";
  chip.addEventListener("click", () => { conditions.splice(conditions.indexOf(own), 1); chip.remove(); filter(); $("find").focus(); });
  conditions.push(own);
  $("conditions").append(chip);
  $("bound").value = "";
  filter();
};
$("find").addEventListener("input", filter);
$("add").addEventListener("click", add);
$("filters").addEventListener("submit", (event) => { event.preventDefault(); add(); });
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || /INPUT|SELECT|TEXTAREA/.test(event.target.tagName)) return;
  event.preventDefault();
  $("find").focus();
});

// Columns.
const show = (column, shown) => {
  for (const table of [runs, $("pairs")]) {
    const head = table?.querySelector(`thead th[data-column="${column}"]`);
    if (!head) continue;
    for (const row of table.rows) row.cells[head.cellIndex].hidden = !shown;
  }
};
for (const fieldset of document.querySelectorAll(".chooser fieldset")) {
  const all = fieldset.querySelector(".group"), each = [...fieldset.querySelectorAll("input[value]:not(.group)")];
  const told = () => { all.checked = each.every((box) => box.checked); all.indeterminate = !all.checked && each.some((box) => box.checked); };
  const set = (box, shown) => { box.checked = shown; show(box.value, shown); };
  all.addEventListener("change", () => { for (const box of each) set(box, all.checked); told(); });
  for (const box of each) box.addEventListener("change", () => { show(box.value, box.checked); told(); });
  told();
}

// Differences against another run.
$("baseline")?.addEventListener("change", async () => {
  const first = $("baseline").value;
  $("pairs-said").textContent = "";
  try {
    const cells = await load(`pairs_${numbered(first)}`);
    if ($("baseline").value !== first) return;
    for (const row of rowsOf($("pairs"))) cells[row.dataset.run].forEach(([text, order, kind], number) => {
      const cell = row.cells[number + 1];
      cell.textContent = text;
      cell.dataset.order = order ?? "NaN";
      cell.className = kind;
    });
    for (const head of $("pairs").tHead.rows[0].cells) head.removeAttribute("aria-sort");
    filter();
  } catch (error) {
    $("pairs-said").textContent = error.message;
  }
});

// Rows.
const EACH = 25;
let all = [], shown = [], beside = null, start = 0, current = null;
const say = (text) => { $("rows-said").textContent = text; };
const fill = (select, options, wanted) => {
  select.replaceChildren(...options.map(([value, text]) => { const made = element("option", text); made.value = value; return made; }));
  if (options.some(([value]) => value === wanted)) select.value = wanted;
};
const setOf = async (run) => (await load(`run_${numbered(run)}`)).sets.find((own) => own.title === $("set").value);
const identity = (row) => JSON.stringify([row.key, row.again ?? 0]);
// What a row is found by, put together once: a key pressed searches ten thousand of them.
const searched = new WeakMap();
const textOf = (row) => {
  if (!searched.has(row)) {
    const { key, category, prompt, attacked, prefill, expected, reply, base, before, history = [] } = row;
    const own = [key, category, prompt, attacked, prefill, expected, reply, base, before?.attacked, before?.reply, ...history.flat()];
    searched.set(row, own.filter(Boolean).join("\n").toLowerCase());
  }
  return searched.get(row);
};
const verdictOf = (row, judge) => row?.verdicts?.[judge];
const badges = (verdicts, place) => {
  for (const [judge, verdict] of Object.entries(verdicts ?? {})) {
    const grade = typeof verdict === "number";
    place.append(element("span", `${judge}: ${grade ? verdict : verdict ? "yes" : "no"}`, `verdict ${verdict === true ? "yes" : "no"}`), " ");
  }
};
const texts = (row, list) => {
  const pair = (title, text) => { if (text) list.append(element("dt", title), element("dd", text, "text")); };
  for (const [user, assistant] of row.history ?? []) { pair("earlier request", user); pair("earlier reply", assistant); }
  pair("example", row.key);
  pair("request", row.prompt);
  pair("sent instead", row.attacked);
  pair("reply forced to begin with", row.prefill);
  pair("expected", row.expected);
  pair("reply", row.reply);
  pair("the base model's reply", row.base);
  if (row.before) {
    pair("sent before training", row.before.attacked);
    pair("reply before training", row.before.reply);
    list.append(element("dt", "verdicts before training"));
    badges(row.before.verdicts, list.appendChild(element("dd")));
  }
  return list;
};
const article = (row, place) => {
  // The key of a harmful request may hold the request.
  const made = element("article"), head = made.appendChild(element("h4", current.harmful ? `Row ${start + place + 1}` : row.key));
  if (row.category) head.append(element("small", row.category));
  if (row.again) head.append(element("small", `reply ${row.again}`));
  badges(row.verdicts, head);
  const body = element("div", "", "columns"), own = body.appendChild(element("div"));
  if (beside) own.append(element("h5", $("of").selectedOptions[0].textContent));
  own.append(texts(row, element("dl")));
  if (beside) {
    const other = beside.rows.get(identity(row)), place = body.appendChild(element("div"));
    place.append(element("h5", $("beside").selectedOptions[0].textContent));
    if (other) { badges(other.verdicts, place); place.append(texts(other, element("dl"))); } else place.append(element("p", "has no such row", "note"));
  }
  if (!current.harmful) { made.append(body); return made; }
  const folded = made.appendChild(element("details"));
  folded.append(element("summary", "Show the request and the reply (harmful)"), body);
  return made;
};
const page = () => {
  $("list").replaceChildren(...shown.slice(start, start + EACH).map(article));
  $("pager").hidden = !shown.length;
  $("earlier").disabled = start === 0;
  $("later").disabled = start + EACH >= shown.length;
  $("unfold").hidden = !current?.harmful;
  $("page").textContent = shown.length ? `${start + 1} to ${Math.min(start + EACH, shown.length)} of ${shown.length}` : "";
};
const pick = () => {
  const [kind, judge] = JSON.parse($("verdict").value || '["all"]'), words = $("words").value.toLowerCase();
  const kinds = {
    all: () => true,
    yes: (row) => verdictOf(row, judge) === true,
    no: (row) => verdictOf(row, judge) === false,
    changed: (row) => row.before && verdictOf(row, judge) !== verdictOf(row.before, judge),
    differs: (row) => { const other = beside?.rows.get(identity(row)); return other && verdictOf(row, judge) !== verdictOf(other, judge); },
  };
  shown = all.filter((row) => kinds[kind](row) && (!words || textOf(row).includes(words)));
  start = 0;
  page();
};
const verdicts = () => {
  const judges = [...new Set(all.slice(0, 50).flatMap((row) => Object.keys(row.verdicts ?? {})))], options = [['["all"]', "every row"]];
  const option = (kind, judge, text) => options.push([JSON.stringify([kind, judge]), text]);
  for (const judge of judges) { option("yes", judge, `${judge}: yes`); option("no", judge, `${judge}: no`); }
  if (all.some((row) => row.before)) option("changed", current.judge, "verdict changed in training");
  if (beside?.alike) option("differs", current.judge, "verdict differs from the run beside");
  fill($("verdict"), options, $("verdict").value);
};
let turn = 0;
const open = async (explained = false) => {
  const mine = ++turn, run = $("of").value, other = $("beside").value;
  if (run === "") return;
  say("Loading …");
  try {
    const index = await load(`run_${numbered(run)}`);
    if (mine !== turn) return;
    fill($("set"), index.sets.map((own) => [own.title, `${own.title} (${own.n})`]), $("set").value);
    const list = element("dl", "", "facts");
    for (const text of index.warnings) list.append(element("dt", "warning sign"), element("dd", text, "text"));
    for (const [name, text] of Object.entries(index.facts)) list.append(element("dt", name), element("dd", text, "text"));
    const facts = element("details"), signs = index.warnings.length;
    facts.open = explained;
    facts.append(element("summary", `About this run${signs ? `, ${signs} warning sign${signs > 1 ? "s" : ""}` : ""}`), list);
    for (const label of $("rows-controls").querySelectorAll("label")) label.hidden = false;
    $("facts").replaceChildren(facts);
    current = index.sets.find((own) => own.title === $("set").value);
    all = current ? await load(current.file) : [];
    let said = current ? `Decided by ${current.judge}.` : "This run has no rows.";
    beside = null;
    if (current && other !== "" && other !== run) {
      const theirs = await setOf(other);
      if (!theirs) said += ` ${$("beside").selectedOptions[0].textContent} has no such set.`;
      else {
        const alike = theirs.way === current.way;
        beside = { alike, rows: new Map((await load(theirs.file)).map((row) => [identity(row), row])) };
        if (!alike) said += " ⚠ The two runs were measured in different ways (judge, attack, budget, length or rows): their verdicts cannot be compared.";
      }
    }
    if (mine !== turn) return;
    say(said);
    verdicts();
    pick();
  } catch (error) {
    all = shown = [];
    page();
    say(error.message);
  }
};
for (const id of ["of", "set", "beside"]) $(id).addEventListener("change", () => open());
$("verdict").addEventListener("change", pick);
$("words").addEventListener("input", pick);
$("rows-controls").addEventListener("submit", (event) => event.preventDefault());
for (const [id, step] of [["earlier", -EACH], ["later", EACH]]) $(id).addEventListener("click", () => { start += step; page(); $("drill").scrollIntoView(); });
$("unfold").addEventListener("click", () => { for (const folded of $("list").querySelectorAll("details")) folded.open = true; });
runs.addEventListener("click", (event) => {
  const button = event.target.closest("button.open");
  if (!button) return;
  $("of").value = button.closest("tr").dataset.run;
  $("drill").scrollIntoView();
  $("of").focus({ preventScroll: true });
  open(button.classList.contains("sign"));
});
