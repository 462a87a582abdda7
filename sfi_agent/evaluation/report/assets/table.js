// The same numbers as a table: one row per policy, or per policy, task and context length.
function traitCell(name) {
  const read = policyTrait(name)[2];
  return {
    trait: true, value: (entry) => read(entry.policy) ?? null, cell: (entry) => (entry.policy.dense ? [MISSING] : [make("span", { title: word(read(entry.policy)) }, clipName(word(read(entry.policy)), 40))]) };
}

function boundsCell(read, few, many) {
  return {
    number: true,
    value: (entry) => read(entry)?.mean ?? null,
    cell: (entry) => {
      const bounds = read(entry);
      if (!bounds) return [MISSING];
      return [make("span", { title: `${count(entry[few])} of ${count(entry[many])}; 95 % interval ${share(bounds.low)} to ${share(bounds.high)}` }, share(bounds.mean)), cellBar(bounds.mean, bounds)];
    },
  };
}

function numberCell(read, text) {
  return { number: true, value: (entry) => (known(read(entry)) ? read(entry) : null), cell: (entry) => [text(read(entry))] };
}

function cellBar(value, bounds) {
  const width = 64;
  const parts = [draw("rect", { width, height: 8, y: 2, rx: 2, fill: "var(--line-soft)" }), draw("rect", { width: value * width, height: 8, y: 2, rx: 2, fill: bounds ? "var(--mark-2)" : "var(--slow)" })];
  if (bounds) parts.push(draw("line", { x1: bounds.low * width, x2: bounds.high * width, y1: 6, y2: 6, stroke: "var(--ink)", "stroke-width": 1.5 }));
  return draw("svg", { class: "cellbar", width, height: 12, "aria-hidden": "true" }, parts);
}

const COLUMNS = [
  { key: "policy", title: "Policy", head: true, value: (entry) => entry.policy.name },
  ...ROW_TRAITS.map(([name, title, read]) => ({ key: name, title, single: true, number: name === "context_tokens", value: (entry) => read(entry.rows[0]), cell: (entry) => [word(read(entry.rows[0]))] })),
  { key: "parts", title: "Parts right", ...boundsCell((entry) => entry.parts_share, "right", "parts") },
  { key: "answers", title: "Whole answers", ...boundsCell((entry) => entry.answers_share, "exact", "answers_given") },
  { key: "slow_share", title: "Slow share", number: true, value: (entry) => entry.slow_share, cell: (entry) => (known(entry.slow_share) ? [share(entry.slow_share), cellBar(Math.min(1, entry.slow_share))] : [MISSING]) },
  { key: "agreed_share", title: "Same as dense", ...numberCell((entry) => entry.agreed_share, share) },
  { key: "acceptance", title: "Acceptance", ...numberCell((entry) => entry.acceptance, share) },
  { key: "retries", title: "Retries", ...numberCell((entry) => entry.retries, count) },
  { key: "memory", title: "Memory tokens", ...numberCell((entry) => entry.memory_tokens_mean, count) },
  { key: "tokens", title: "Tokens", ...numberCell((entry) => entry.generated_tokens, count) },
  { key: "speed", title: "ms per token", ...numberCell((entry) => entry.seconds_per_token, (value) => (known(value) ? (value * 1000).toFixed(1) : MISSING)) },
  { key: "selector", title: "Selector", ...traitCell("selector") },
  { key: "boundaries", title: "Boundaries", ...traitCell("boundaries") },
  { key: "slow_step", title: "Slow step", ...traitCell("slow_step") },
  { key: "selected_tokens", title: "Budget", number: true, ...traitCell("selected_tokens") },
  { key: "cases", title: "Cases", ...numberCell((entry) => entry.cases, count) },
  { key: "failed", title: "Failed", ...numberCell((entry) => entry.failed, count) },
];

function tableEntries() {
  const rows = shownRows();
  if (state.get("rows", "policy") === "policy") return perPolicy(rows);
  const columns = new Map();
  for (const row of rows) columns.set(row.key, [...(columns.get(row.key) || []), row]);
  return [...columns.values()].flatMap((same) => perPolicy(same));
}

function sortedEntries(entries, columns) {
  const [key, direction] = state.get("sort", "").split(".");
  const column = columns.find((candidate) => candidate.key === key);
  if (!column) return entries;
  const sign = direction === "down" ? -1 : 1;
  return [...entries].sort((a, b) => {
    const [x, y] = [column.value(a), column.value(b)];
    if (x === null || y === null) return (x === null) - (y === null);
    return sign * (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y)));
  });
}

// A column that says nothing (all missing, or one value of a trait) is left out.
function usefulColumns(entries) {
  const byRow = state.get("rows", "policy") !== "policy";
  return COLUMNS.filter((column) => {
    if (column.head) return true;
    if (column.single && !byRow) return false;
    const values = new Set(entries.map(column.value));
    if (column.trait && entries.length > 2) return traitValues(policyTrait(column.key)[2]).length > 1;
    if (column.key === "failed") return [...values].some((value) => value > 0);
    if (column.single) return values.size > 1;
    return [...values].some((value) => value !== null);
  });
}

function headCell(column) {
  const [key, direction] = state.get("sort", "").split(".");
  const active = key === column.key;
  const next = !active ? (column.number ? "down" : "up") : direction === "down" ? "up" : "down";
  return make("th", { scope: "col", class: column.number ? "number" : null, "aria-sort": active ? (direction === "down" ? "descending" : "ascending") : null, "data-column": column.key },
    make("button", { type: "button", on: { click: () => { state.set({ sort: `${column.key}.${next}` }); byId("table").querySelector(`[data-column="${column.key}"] button`).focus(); } } }, column.title));
}

function bodyRow(entry, columns, chosen) {
  const cells = columns.slice(1).map((column) => {
    const content = column.cell(entry);
    return make("td", { class: [column.number ? "number" : "", content[0] === MISSING ? "missing" : ""].join(" ").trim() || null }, content);
  });
  const head = make("th", { scope: "row" }, make("button", { type: "button", class: "plain", "data-row": [entry.policy.name, entry.rows.length === 1 ? entry.rows[0].key : ""].join("\u0001") }, policySample(entry.policy), "\u00a0", clipName(entry.policy.name, 60)));
  return make("tr", { "aria-selected": entry.policy === chosen ? "true" : null, title: entry.whole ? null : "Ran fewer cases than others", on: { click: () => choosePolicy(entry.policy) } }, head, cells);
}

function tableSection() {
  const holder = make("div", { class: "scroll", tabindex: 0, role: "region", "aria-labelledby": "table-title" });
  const note = make("p", { class: "small", role: "status" });
  const search = make("input", { type: "search", placeholder: "per_head 512 \u2026", on: { input: () => state.set({ q: search.value }) } });
  const paint = () => {
    if (search.value !== state.get("q")) search.value = state.get("q");
    const words = state.get("q").toLowerCase().split(/\s+/).filter(Boolean);
    const all = tableEntries();
    const columns = usefulColumns(all);
    const text = (entry) => columns.map((column) => column.value(entry)).filter((value) => typeof value === "string" || isCount(value)).join(" ").toLowerCase();
    const kept = sortedEntries(all.filter((entry) => words.every((part) => text(entry).includes(part))), columns);
    const chosen = chosenPolicy();
    const focused = holder.contains(document.activeElement) ? document.activeElement.dataset.row : undefined;
    holder.replaceChildren(make("table", {}, make("thead", {}, make("tr", {}, columns.map(headCell))), make("tbody", {}, kept.map((entry) => bodyRow(entry, columns, chosen)))));
    if (focused !== undefined) [...holder.querySelectorAll("[data-row]")].find((node) => node.dataset.row === focused)?.focus();
    const same = COLUMNS.filter((column) => column.trait && all.length && !columns.includes(column)).map((column) => [column.title.toLowerCase(), traitValues(policyTrait(column.key)[2])[0]]).filter(([, value]) => value !== null && value !== undefined);
    note.textContent = `${same.length ? `The same in all policies: ${same.map(([title, value]) => `${title} ${word(value)}`).join(", ")}. ` : ""}${plural(kept.length, "row", "rows")} of ${count(all.length)}. A click chooses the policy for the views below. Numbers without data are shown as ${MISSING}.`;
  };
  state.watch(["hide:", "rows", "sort", "q", "policy", "colour", "shape"], paint);
  byId("table").append(
    make("h2", { id: "table-title" }, "All numbers"),
    make("p", { class: "lede" }, "Slow share and memory: lower is cheaper. Parts right, whole answers and same as dense (answers whose tokens equal dense\u2019s from first to last): higher is better."),
    make("div", { class: "controls no-print gap" }, make("label", { class: "field" }, "Search", search),
      choice("Rows", "rows", [["policy", "one per policy"], ["task", "one per policy, task and length"]], "policy")),
    holder, note, settingsOf(),
  );
  paint();
}

// The chosen policy's resolved configuration, for copying into a file.
function settingsOf() {
  const name = make("summary", {});
  const text = make("pre", { class: "command" });
  const block = make("details", {}, name, text);
  const paint = () => {
    const policy = chosenPolicy();
    const settings = policy && Object.keys(policy.config).length ? policy.config : null;
    block.hidden = !settings;
    name.textContent = settings ? `Settings of ${policy.name}` : "";
    text.textContent = settings ? JSON.stringify(settings, null, 2) : "";
  };
  state.watch(["policy"], paint);
  paint();
  return block;
}

function isCount(value) {
  return Number.isInteger(value) && value > 1;
}
