// Why steps were slow: counts of reasons, grouped by what they say before their first number.
function reasonGroup(reason) {
  const text = reason.replace(/[\s(:=<>]*[-+]?\d[^]*$/u, "").trim();
  return text || reason.trim() || "no reason recorded";
}

function groupedReasons(counts) {
  const groups = new Map();
  for (const [reason, times] of Object.entries(counts)) {
    const group = reasonGroup(reason);
    groups.set(group, (groups.get(group) || 0) + times);
  }
  return groups;
}

const REASON_COLOURS = 7;

function reasonsSection() {
  const holder = make("div", { class: "plot tall", tabindex: 0, role: "region", "aria-labelledby": "reasons-title" });
  const legend = make("div", {});
  const paint = () => {
    const entries = perPolicy(shownRows()).filter((entry) => !entry.policy.dense && Object.keys(entry.reasons).length && entry.generated_tokens);
    if (!entries.length) {
      holder.replaceChildren(make("p", { class: "empty" }, "No reasons were recorded for the runs that are left."));
      legend.replaceChildren();
      return;
    }
    const groups = entries.map((entry) => groupedReasons(entry.reasons));
    const order = reasonOrder(groups);
    holder.replaceChildren(reasonBars(Math.floor(holder.clientWidth), entries, groups, order));
    legend.replaceChildren(reasonLegend(order));
  };
  state.watch(["hide:", "policy", "colour", "shape"], paint);
  byId("reasons").append(
    make("h2", { id: "reasons-title" }, "Why steps were slow"),
    make("p", { class: "lede" }, "Slow steps by reason, per 100 generated tokens; numbers within reasons are left out. Prefill is the first token of each answer. Shorter is cheaper."),
    make("div", { class: "card" }, holder, legend),
  );
  onWidth(holder, paint);
}

function reasonOrder(groups) {
  const sums = new Map();
  for (const group of groups) for (const [reason, times] of group) sums.set(reason, (sums.get(reason) || 0) + times);
  const sorted = [...sums.entries()].sort((a, b) => b[1] - a[1]).map(([reason]) => reason);
  return { named: sorted.slice(0, REASON_COLOURS), others: sorted.slice(REASON_COLOURS) };
}

function reasonColour(index) {
  return index < REASON_COLOURS ? colourAt(index) : "var(--ink-faint)";
}

function reasonLegend(order) {
  const items = order.named.map((reason, index) => [reason, reasonColour(index)]);
  if (order.others.length) items.push([`${order.others.length} rarer reasons`, reasonColour(REASON_COLOURS)]);
  return make("ul", { class: "legend" }, items.map(([name, colour]) => make("li", {}, make("span", { class: "swatch", style: { background: colour } }), clip(name, 60))));
}

function reasonBars(width, entries, groups, order) {
  const names = Math.min(280, width * 0.38, 14 + Math.max(...entries.map((entry) => textWidth(entry.policy.name, 12))));
  const tall = 20;
  const per = entries.map((entry, index) => [...groups[index].values()].reduce((sum, times) => sum + times, 0) / entry.generated_tokens);
  const at = scale(0, Math.max(...per), 0, width - names - 60);
  const chosen = chosenPolicy();
  const lines = entries.map((entry, line) => {
    const y = line * tall;
    let x = names;
    const counts = [...order.named.map((reason) => [reason, groups[line].get(reason) || 0]), ["rarer reasons", order.others.reduce((sum, reason) => sum + (groups[line].get(reason) || 0), 0)]];
    const bars = counts.filter(([, times]) => times).map(([reason, times]) => {
      const wide = at(times / entry.generated_tokens);
      const index = order.named.indexOf(reason);
      const bar = draw("rect", { x, y: y + 3, width: Math.max(0.5, wide - 1), height: tall - 7, fill: reasonColour(index < 0 ? REASON_COLOURS : index), on: onHover(entry.policy.name, () => [[reason, count(times)], ["per 100 tokens", fixed((100 * times) / entry.generated_tokens, 2)]]) });
      x += wide;
      return bar;
    });
    const spokenCounts = counts.filter(([, times]) => times).map(([reason, times]) => `${reason} ${times}`).join(", ");
    return draw("g", { role: "img", "aria-label": `${entry.policy.name}: ${spokenCounts}` },
      draw("text", { x: names - 8, y: y + 14, "text-anchor": "end", class: entry.policy === chosen ? "label" : null }, fitName(entry.policy.name, names - 12, 12)),
      bars, draw("text", { x: x + 6, y: y + 14 }, fixed(per[line] * 100, 1)));
  });
  const high = entries.length * tall + 6;
  return draw("svg", { viewBox: `0 0 ${width} ${high}`, height: high, role: "group", "aria-label": "Slow steps per 100 generated tokens, by policy and reason" }, lines);
}
