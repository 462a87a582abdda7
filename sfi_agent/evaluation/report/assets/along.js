// Along long answers: the share right and the length against dense, by stretch of the right answer.
const ALONG_HEIGHT = 300;
const NAMED_LINES = 5;
const STRETCH = DATA.stretch_tokens;

// Answers longer than one stretch: only there is anything to see.
function alongPlaces() {
  const long = ROWS.filter((row) => row.stretches && row.stretches.length > 1);
  return [...new Map(long.map((row) => [row.key, row])).values()];
}

function placeName(row) {
  const varied = ROW_TRAITS.slice(2).filter(([, , read]) => new Set(ROWS.map(read)).size > 1);
  return [row.task, `${count(row.context_tokens)} tokens`, ...varied.map(([, , read]) => read(row))].join(", ");
}

function alongEntries(key) {
  const entries = perPolicy(shownRows().filter((row) => row.key === key));
  return entries.filter((entry) => entry.rows[0].stretches).map((entry) => ({ ...entry, stretches: entry.rows[0].stretches.map(measuredStretch) }));
}

function measuredStretch(stretch) {
  const length = known(stretch.dense_output_tokens) && stretch.dense_output_tokens > 0 ? stretch.output_tokens / stretch.dense_output_tokens : null;
  return { ...stretch, bounds: wilson(stretch.right, stretch.parts), length };
}

function stretchName(first) {
  return `${count(first)} to ${count(first + STRETCH)} tokens`;
}

function stretchPairs(stretch, dense) {
  const beside = dense?.stretches.find((other) => other.first_token === stretch.first_token);
  const { mean, low, high } = stretch.bounds;
  return [
    ["right answer", stretchName(stretch.first_token)],
    ["accuracy", `${share(mean)} (${share(low)} to ${share(high)})`],
    ["right", `${count(stretch.right)} of ${count(stretch.parts)} parts`],
    ["dense", beside ? `${count(beside.right)} of ${count(beside.parts)} parts` : MISSING],
    ["length", known(stretch.length) ? `${fixed(stretch.length, 2)} of dense (${count(stretch.output_tokens)} tokens)` : MISSING],
  ];
}

// Policies stand side by side within a stretch, so that equal ones are all seen.
function alongAxis(width, entries) {
  const last = Math.max(...entries.flatMap((entry) => entry.stretches.map((stretch) => stretch.first_token)));
  const ticks = [...Array(last / STRETCH + 2).keys()].map((index) => index * STRETCH);
  const at = scale(0, last + STRETCH, MARGIN.left, width - MARGIN.right);
  const lines = entries.filter((entry) => !entry.policy.dense).length;
  const spread = Math.min(9, ((at(STRETCH) - at(0)) * 0.6) / Math.max(1, lines));
  const middle = (stretch, index) => at(stretch.first_token + STRETCH / 2) + (index - (lines - 1) / 2) * spread;
  return { ticks, at, middle, name: (tick) => String(tick / 1000) };
}

function alongPoints(entries, dense, x, y, bounds) {
  return entries.map((entry, index) => entry.stretches.filter((stretch) => bounds(stretch)).map((stretch) => {
    const { mean, low, high } = bounds(stretch);
    return {
      policy: entry.policy, whole: entry.whole, label: entry.policy.name, x: x.middle(stretch, index), y: y.at(mean), low: y.at(low), high: y.at(high),
      pairs: () => stretchPairs(stretch, dense), title: () => entry.policy.name,
    };
  }));
}

function throughPoints(points) {
  return points.map((point) => `${point.x},${point.y}`).join("L");
}

function alongLine(points, chosen) {
  const policy = points[0].policy;
  return draw("path", { class: policy === chosen ? "series chosen" : "series", d: `M${throughPoints(points)}`, style: { stroke: colourOf(policy) } });
}

// The chosen policy's interval alone; without a choice all of them, paler the more there are.
function alongBands(lines, chosen) {
  const own = lines.filter((points) => points[0].policy === chosen);
  const shown = own.length ? own : lines;
  return shown.map((points) => {
    const edge = [...points.map((point) => `${point.x},${point.high}`), ...[...points].reverse().map((point) => `${point.x},${point.low}`)];
    return draw("path", { class: "band", d: `M${edge.join("L")}Z`, style: { fill: colourOf(points[0].policy), opacity: own.length ? "0.25" : fixed(Math.min(0.12, 0.4 / shown.length), 3) } });
  });
}

// Names of the lines that end farthest from dense first; of many lines, only those that leave it.
function namedEnds(lines, chosen, level) {
  const away = (point) => (known(level) ? Math.abs(point.y - level) : point.y);
  const ends = lines.map((points) => points[points.length - 1]).sort((a, b) => away(b) - away(a));
  const others = ends.filter((point) => point.policy !== chosen);
  return [...ends.filter((point) => point.policy === chosen), ...(ends.length <= NAMED_LINES ? others : others.filter((point) => away(point) > 8).slice(0, NAMED_LINES))];
}

function rightAlong(width, entries) {
  const dense = entries.find((entry) => entry.policy.dense);
  const sparse = entries.filter((entry) => !entry.policy.dense);
  const stretches = entries.flatMap((entry) => entry.stretches);
  const axis = accuracyAxis(stretches, (stretch) => stretch.bounds, state.get("scale") === "stretched");
  const digits = axis.ticks.some((tick) => Math.abs(tick * 100 - Math.round(tick * 100)) > 1e-6) ? 3 : 2;
  const y = { ticks: axis.ticks, at: scale(axis.low, axis.high, ALONG_HEIGHT - MARGIN.bottom, MARGIN.top, axis.bend), name: (tick) => fixed(tick, digits) };
  const x = alongAxis(width, entries);
  const line = dense ? dense.stretches.map((stretch) => ({ label: "dense", x: x.at(stretch.first_token + STRETCH / 2), y: y.at(stretch.bounds.mean) })) : [];
  const lines = alongPoints(sparse, dense, x, y, (stretch) => stretch.bounds);
  const guide = { line: line.length ? draw("path", { class: "guide", d: `M${throughPoints(line)}`, "aria-hidden": "true" }) : null, text: null, areas: [], ends: line.slice(-1) };
  return alongPlot(width, lines, guide, alongBands(lines, chosenPolicy()), { x, y, title: "parts right" });
}

function lengthAlong(width, entries) {
  const dense = entries.find((entry) => entry.policy.dense);
  const sparse = entries.filter((entry) => !entry.policy.dense);
  const lengths = sparse.flatMap((entry) => entry.stretches.map((stretch) => stretch.length)).filter(known);
  const y = lengthAxis(lengths);
  const x = alongAxis(width, entries);
  const exactly = (stretch) => (known(stretch.length) ? { mean: stretch.length, low: stretch.length, high: stretch.length } : null);
  const lines = alongPoints(sparse, dense, x, y, exactly).filter((points) => points.length);
  const guide = { ...denseGuide(width, y, true, 1, "dense", lines.flat()), ends: [{ y: y.at(1) }] };
  return alongPlot(width, lines, guide, [], { x, y, title: "length against dense" });
}

function lengthAxis(lengths) {
  const [least, most] = [Math.min(0.95, ...lengths), Math.max(1.05, ...lengths)];
  const step = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10].find((size) => (most - least) / size <= 6) || 20;
  const [first, last] = [Math.floor(least / step + 1e-9), Math.ceil(most / step - 1e-9)];
  const ticks = [...Array(last - first + 1).keys()].map((index) => (first + index) * step);
  return { ticks, at: scale(first * step, last * step, ALONG_HEIGHT - MARGIN.bottom, MARGIN.top), name: (tick) => fixed(tick, step < 0.1 ? 2 : 1) };
}

function alongPlot(width, lines, guide, bands, { x, y, title }) {
  const chosen = chosenPolicy();
  const points = lines.flat();
  const named = [...guide.ends.filter((end) => end.label), ...namedEnds(lines, chosen, guide.ends[0]?.y)];
  const across = width > 430 ? "thousand tokens of the right answer" : "thousand tokens";
  return draw(
    "svg",
    { viewBox: `0 0 ${width} ${ALONG_HEIGHT}`, height: ALONG_HEIGHT, role: "group", "aria-label": `${title} along the right answer: ${plural(lines.length, "policy", "policies")}` },
    axes(width, ALONG_HEIGHT, x, y, [across, title]),
    guide.line,
    draw("g", { "aria-hidden": "true" }, bands, lines.map((own) => alongLine(own, chosen))),
    pointMarks(points, chosen),
    labels(width, ALONG_HEIGHT, points, named, guide.areas),
    guide.text,
  );
}

// ---- the section
function alongTable(key) {
  const body = make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Stretches as numbers" });
  const paint = () => {
    const entries = alongEntries(key);
    const firsts = inOrder(entries.flatMap((entry) => entry.stretches.map((stretch) => stretch.first_token)));
    const head = make("tr", {}, make("th", { scope: "col" }, "Policy"), firsts.map((first) => make("th", { scope: "col", class: "number" }, `from ${count(first)}`)));
    const cell = (stretch) => (stretch ? `${count(stretch.right)} of ${count(stretch.parts)}${known(stretch.length) ? `, ${fixed(stretch.length, 2)}` : ""}` : MISSING);
    const lines = entries.map((entry) => make("tr", { on: { click: () => choosePolicy(entry.policy) } }, make("th", { scope: "row" }, entry.policy.name),
      firsts.map((first) => make("td", { class: "number" }, cell(entry.stretches.find((stretch) => stretch.first_token === first))))));
    body.replaceChildren(make("table", {}, make("thead", {}, head), make("tbody", {}, lines)));
  };
  state.watch(["hide:"], paint);
  paint();
  return make("details", {}, make("summary", {}, "The same as numbers: parts right, and length against dense"), body);
}

function alongBlock(row, number) {
  const block = make("div", { class: "along" });
  const show = () => {
    block.hidden = !shownRows().some((other) => other.key === row.key);
  };
  // Before the charts, which are as wide as the block that is shown.
  state.watch(["hide:"], show);
  show();
  const chart = (name, usable, plot, none) => plotHolder(`along-${name}-${number}`, (width) => {
    const entries = alongEntries(row.key);
    return usable(entries.filter((entry) => !entry.policy.dense)) ? plot(width, entries) : make("p", { class: "empty" }, none);
  });
  const measuredLength = (entries) => entries.some((entry) => entry.stretches.some((stretch) => known(stretch.length)));
  block.append(make("h3", { class: "gap" }, placeName(row)), make("div", { class: "grid" },
    make("div", { class: "card" }, chart("right", (entries) => entries.length, rightAlong, "No slow-fast run with stretches is left."),
      make("p", { class: "small" }, "A line that falls is drift. Bands are 95 % Wilson intervals, which take parts as independent; that of the chosen policy stands alone.")),
    make("div", { class: "card" }, chart("length", measuredLength, lengthAlong, "The length of dense answers to the same cases is not known."),
      make("p", { class: "small" }, "Tokens written for the answers that begin in a stretch, over those of dense; an answer over several stretches counts in its first."))),
    alongTable(row.key));
  return block;
}

function alongSection() {
  const places = alongPlaces();
  if (!places.length) {
    byId("along").remove();
    document.querySelector(".bar a[href='#view=along']").remove();
    return;
  }
  byId("along").append(
    make("h2", { id: "along-title" }, "Along the answer"),
    make("p", { class: "lede" }, "Long answers by the place in the right answer where a part belongs, whatever the policy wrote before. Over what the chips above leave in; the dashed line is dense decoding on the same cases."),
    ...places.map(alongBlock),
  );
}
