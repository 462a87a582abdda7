// Chips that take values of a trait out of charts and table. The address keeps what is taken out.
const FILTERS = [
  ...ROW_TRAITS.map(([name, title, read]) => ({ name, title, read: (row) => read(row) ?? null, values: inOrder(ROWS.map((row) => read(row) ?? null)) })),
  ...POLICY_TRAITS.filter(([name]) => name !== "preset").map(([name, title, read]) => ({
    name,
    title,
    ofPolicy: true,
    read: (row) => read(POLICIES[row.policy]) ?? null,
    values: traitValues(read),
  })),
].filter((filter) => filter.values.length > 1);

// Only values that exist count, so that an address made for other results hides nothing.
function hidden(filter) {
  const named = new Set(state.get(`hide:${filter.name}`).split("|"));
  return new Set(filter.values.map(String).filter((value) => named.has(encodeURIComponent(value))));
}

// Dense is no value of a policy's trait: it stays as the line to compare with.
function shownRows() {
  const off = FILTERS.map((filter) => [filter, hidden(filter)]).filter(([, values]) => values.size);
  return ROWS.filter((row) =>
    off.every(([filter, values]) => (filter.ofPolicy && POLICIES[row.policy].dense) || !values.has(String(filter.read(row)))),
  );
}

function filterChips() {
  const bar = make("div", { class: "controls" });
  const paint = () => {
    bar.replaceChildren(...FILTERS.map(chipGroup));
  };
  state.watch(["hide:", "colour", "shape"], paint);
  paint();
  return bar;
}

function chipGroup(filter) {
  const off = hidden(filter);
  const colours = filter.ofPolicy && state.get("colour", "selector") === filter.name;
  const shapes = filter.ofPolicy && state.get("shape", "slow_step") === filter.name;
  const chips = filter.values.map((value, index) => {
    const key = String(value);
    const toggle = () => {
      const next = hidden(filter);
      if (!next.delete(key)) next.add(key);
      state.set({ [`hide:${filter.name}`]: next.size === filter.values.length ? "" : [...next].map(encodeURIComponent).join("|") });
      byId("content").querySelector(`[data-chip="${CSS.escape(`${filter.name}=${key}`)}"]`)?.focus();
    };
    const mark = colours || shapes ? sample((shapes ? SHAPES[index % SHAPES.length] : SHAPES[0])(5), colours ? colourAt(index) : "var(--ink-soft)") : null;
    return make("button", { type: "button", class: "chip", "aria-pressed": String(!off.has(key)), "data-chip": `${filter.name}=${key}`, title: word(value).length > 46 ? word(value) : null, on: { click: toggle } }, mark, clipName(word(value), 46));
  });
  return make("fieldset", { class: "chips" }, make("legend", {}, filter.title), make("div", {}, chips));
}
