// Accuracy against slow share and against budget.
const PLOT_HEIGHT = 400;
const METRICS = [["parts", "parts of answers right"], ["answers", "whole answers right"]];

function metric() {
  return state.get("metric", "parts") === "answers" ? (entry) => entry.answers_share : (entry) => entry.parts_share;
}

function entryPairs(entry) {
  const bounds = metric()(entry);
  const answers = state.get("metric", "parts") === "answers";
  return [
    ["accuracy", bounds ? `${share(bounds.mean)} (${share(bounds.low)} to ${share(bounds.high)})` : MISSING],
    ["right", answers ? `${count(entry.exact)} of ${count(entry.answers_given)} answers` : `${count(entry.right)} of ${count(entry.parts)} parts`],
    ["slow share", share(entry.slow_share)],
    ["budget", entry.policy.dense ? "everything" : count(entry.policy.selected_tokens)],
    ["memory", known(entry.memory_tokens_mean) ? `${count(entry.memory_tokens_mean)} tokens` : MISSING],
    ["same ids as dense", share(entry.agreed_share)],
    ...(entry.whole ? [] : [["note", "ran fewer cases than others"]]),
  ];
}

function pointOf(entry, x, y) {
  const bounds = metric()(entry);
  const point = {
    policy: entry.policy, entry, whole: entry.whole, label: entry.policy.name, x, y: y.at(bounds.mean),
    low: y.at(bounds.low), high: y.at(bounds.high), pairs: () => entryPairs(entry),
  };
  point.title = (points) => {
    const near = points.filter((other) => other !== point && Math.hypot(other.x - point.x, other.y - point.y) < 5).length;
    return near ? `${entry.policy.name} (and ${plural(near, "other", "others")} here)` : entry.policy.name;
  };
  return point;
}

function verticalAxis(entries) {
  const axis = accuracyAxis(entries, metric(), state.get("scale") === "stretched");
  const digits = axis.ticks.some((tick) => Math.abs(tick * 100 - Math.round(tick * 100)) > 1e-6) ? 3 : 2;
  return { ticks: axis.ticks, at: scale(axis.low, axis.high, PLOT_HEIGHT - MARGIN.bottom, MARGIN.top, axis.bend), name: (tick) => fixed(tick, digits) };
}

function frontLine(front, position) {
  const steps = front.map((entry, index) => {
    const [x, y] = position(entry);
    return index ? `H${x}V${y}` : `M${x},${y}`;
  });
  return draw("path", { class: "front", d: steps.join(""), "aria-hidden": "true" });
}

function measured(rows) {
  return perPolicy(rows).filter((entry) => metric()(entry));
}

function slowSharePlot(width, entries) {
  const dense = entries.find((entry) => entry.policy.dense);
  const shown = entries.filter((entry) => !entry.policy.dense && known(entry.slow_share));
  const y = verticalAxis(dense ? [...shown, dense] : shown);
  const x = costAxis(shown.map((entry) => entry.slow_share), MARGIN.left + 10, width - MARGIN.right - 12);
  const gain = (entry) => metric()(entry).mean;
  const front = paretoFront(shown.filter((entry) => entry.whole), (entry) => entry.slow_share, gain);
  const points = shown.map((entry) => pointOf(entry, x.at(entry.slow_share), y));
  const guide = denseGuide(width, y, dense, dense && gain(dense), dense ? `dense ${share(gain(dense))}${width > 430 ? ` at a slow share of ${fixed(dense.slow_share, 2)}` : ""}` : "", points);
  const full = width > 430 ? "slow share: dense passes per generated token" : "slow share";
  const title = `${full}${x.wide ? ", root scale" : ""} (left is cheaper)`;
  return plotOf(width, points, front, { x, y, titles: [title, metricTitle()], guide }, (entry) => [x.at(entry.slow_share), y.at(gain(entry))]);
}

function budgetPlot(width, entries) {
  const dense = entries.find((entry) => entry.policy.dense);
  const sparse = entries.filter((entry) => known(entry.policy.selected_tokens));
  const y = verticalAxis(dense ? [...sparse, dense] : sparse);
  const budgets = inOrder(sparse.map((entry) => entry.policy.selected_tokens));
  const slot = (width - MARGIN.left - MARGIN.right) / Math.max(1, budgets.length);
  const middle = (budget) => MARGIN.left + slot * (budgets.indexOf(budget) + 0.5);
  const series = seriesOf(sparse);
  const spread = Math.min(9, (slot * 0.6) / Math.max(1, series.length));
  const points = [];
  const lines = series.map((members, index) => {
    const offset = (index - (series.length - 1) / 2) * spread;
    const own = members.map((entry) => pointOf(entry, middle(entry.policy.selected_tokens) + offset, y));
    points.push(...own);
    return draw("path", { class: "series", d: `M${own.map((point) => `${point.x},${point.y}`).join("L")}`, style: { stroke: colourOf(own[0].policy) } });
  });
  const gain = (entry) => metric()(entry).mean;
  const front = paretoFront(sparse.filter((entry) => entry.whole), (entry) => entry.policy.selected_tokens, gain);
  const position = (entry) => {
    const point = points.find((other) => other.entry === entry);
    return [point.x, point.y];
  };
  const guide = denseGuide(width, y, dense, dense && gain(dense), dense ? `dense ${share(gain(dense))}` : "", points);
  const x = { ticks: budgets, at: middle, name: count };
  return plotOf(width, points, front, { x, y, titles: [width > 430 ? "budget: selected tokens per KV head (left is cheaper)" : "budget in tokens (left is cheaper)", metricTitle()], guide, lines }, position);
}

// Policies that differ in nothing but the budget, in the order of their budgets.
function seriesOf(entries) {
  const groups = new Map();
  for (const entry of entries) {
    const key = JSON.stringify(POLICY_TRAITS.filter(([name]) => name !== "selected_tokens").map(([, , read]) => read(entry.policy) ?? null));
    groups.set(key, [...(groups.get(key) || []), entry]);
  }
  return [...groups.values()].map((group) => group.sort((a, b) => a.policy.selected_tokens - b.policy.selected_tokens));
}

function metricTitle() {
  return (METRICS.find(([name]) => name === state.get("metric")) || METRICS[0])[1];
}

function plotOf(width, points, front, { x, y, titles, guide, lines }, position) {
  const chosen = chosenPolicy();
  const first = points.filter((point) => point.policy === chosen);
  const leading = front.map((entry) => points.find((point) => point.entry === entry)).reverse();
  const wanted = [...new Set([...first, ...leading])];
  return draw(
    "svg",
    { viewBox: `0 0 ${width} ${PLOT_HEIGHT}`, height: PLOT_HEIGHT, role: "group", "aria-label": `${titles[1]} against ${titles[0]}: ${plural(points.length, "policy", "policies")}` },
    axes(width, PLOT_HEIGHT, x, y, titles),
    guide.line,
    lines || null,
    front.length > 1 ? frontLine(front, position) : null,
    whiskers(points),
    pointMarks(points, chosen),
    labels(width, PLOT_HEIGHT, points, wanted, guide.areas),
    guide.text,
  );
}

// A box that is drawn anew when its width or something chosen on the page changes.
function plotHolder(name, content) {
  const holder = make("div", { class: "plot", id: name });
  const paint = () => {
    const width = Math.floor(holder.clientWidth);
    if (!width) return;
    tip.hide();
    const focused = holder.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
    holder.replaceChildren(content(width));
    if (focused) [...holder.querySelectorAll(".point")].find((node) => node.getAttribute("aria-label") === focused)?.focus();
  };
  state.watch(["hide:", "colour", "shape", "metric", "scale", "policy"], paint);
  onWidth(holder, paint);
  return holder;
}

function chartCard(title, note, name, plot) {
  const holder = plotHolder(name, (width) => {
    const entries = measured(shownRows());
    const usable = entries.length && plot.usable(entries);
    return usable ? plot.make(width, entries) : make("p", { class: "empty" }, plot.none);
  });
  return make("div", { class: "card" }, make("h3", {}, title), holder, make("p", { class: "small" }, note));
}

function accuracySection() {
  const legend = make("div", {});
  const paint = () => legend.replaceChildren(markLegend());
  state.watch(["colour", "shape"], paint);
  paint();
  const traits = POLICY_TRAITS.filter(([, , read]) => traitValues(read).length > 1 || read === POLICY_TRAITS[0][2] || read === POLICY_TRAITS[2][2]).map(([name, title]) => [name, title.toLowerCase()]);
  byId("accuracy").append(
    make("h2", { id: "accuracy-title" }, "Accuracy against cost"),
    make("p", { class: "lede" }, "One mark per policy, summed over what the chips leave in. Whiskers are 95 % Wilson intervals, which take parts as independent; the dashed line is the Pareto front: nothing measured is both cheaper and more accurate. Hollow marks ran fewer cases than others."),
    make("div", { class: "card no-print" }, filterChips(), make("div", { class: "controls gap" },
      choice("Accuracy", "metric", METRICS, "parts"), choice("Scale", "scale", [["even", "even"], ["stretched", "stretched near 1"]], "even"),
      choice("Colour", "colour", traits, "selector"), choice("Shape", "shape", traits, "slow_step"))),
    legend,
    make("div", { class: "grid gap" },
      chartCard("Accuracy and slow share", "A slow share of 0.04 means: the whole history is read once in 25 tokens.", "plot-slow", { make: slowSharePlot, usable: (entries) => entries.some((entry) => !entry.policy.dense && known(entry.slow_share)), none: "No slow-fast run is left, or none has a slow share." }),
      chartCard("Accuracy and budget", "Lines join policies that differ in nothing but the budget; marks at one budget stand side by side.", "plot-budget", { make: budgetPlot, usable: (entries) => entries.some((entry) => known(entry.policy.selected_tokens)), none: "No policy with a budget is left." })),
  );
}
