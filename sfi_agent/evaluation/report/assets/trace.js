// One answer token by token: text, timeline of the memory, reasons and slow steps.
const KINDS = ["fast", "slow", "retry"];

function stepsOf(trace) {
  if (!trace.read) {
    trace.read = trace.steps.map(([position, kind, reason, memory, segment, seconds, drafted, accepted], index) => ({
      index, position, kind: KINDS[kind], reason: trace.reasons[reason], memory, segment, seconds, drafted, accepted,
      look: KINDS[kind] !== "fast" && drafted > accepted ? "rejecting" : KINDS[kind],
    }));
  }
  return trace.read;
}

function tokenText(trace, position) {
  for (const [start, texts] of trace.texts) {
    if (position >= start && position < start + texts.length) return texts[position - start];
  }
  return null;
}

function kindName(step) {
  if (step.look === "rejecting") return "verified, rejected";
  return step.kind;
}

function stepPairs(step) {
  return [
    ["token", `${count(step.index + 1)}, position ${count(step.position)}`],
    ["kind", kindName(step)],
    ...(step.reason ? [["reason", step.reason]] : []),
    ["memory", `${count(step.memory)} tokens`],
    ["segment", plural(step.segment, "token", "tokens")],
    ...(step.drafted ? [["drafts kept", `${count(step.accepted)} of ${count(step.drafted)}`]] : []),
    ["time", `${(step.seconds * 1000).toFixed(1)} ms`],
  ];
}

// Generated tokens. Fast ones are plain text; the others can be clicked and reached by arrow keys.
function answerText(trace) {
  const node = make("div", { class: "tokens box", id: "answer", role: "group", "aria-label": "Generated tokens; arrow keys move between slow steps" });
  const steps = stepsOf(trace);
  const spans = steps.map((step) => {
    const text = tokenText(trace, step.position);
    const content = text === null ? ["\u2026"] : tokenNodes(text, true);
    const slow = step.kind !== "fast";
    return make("span", { class: `t ${step.look}`, role: slow ? "button" : null, tabindex: slow ? -1 : null, "aria-label": slow ? `${kindName(step)} step ${step.index + 1}, token ${spoken(text ?? "")}, ${step.reason}` : null, "data-step": step.index }, content);
  });
  node.append(...spans);
  const first = spans.find((span) => span.hasAttribute("tabindex"));
  if (first) first.setAttribute("tabindex", "0");
  const stepOf = (event) => {
    const span = event.target.closest("[data-step]");
    return span ? steps[Number(span.dataset.step)] : null;
  };
  node.addEventListener("mousemove", (event) => {
    const step = stepOf(event);
    if (step) tip.show(event, spoken(tokenText(trace, step.position) ?? "(not kept)"), stepPairs(step));
    else tip.hide();
  });
  node.addEventListener("mouseleave", tip.hide);
  node.addEventListener("click", (event) => {
    const step = stepOf(event);
    if (step && step.kind !== "fast") state.set({ step: step.index });
  });
  node.addEventListener("keydown", (event) => answerKeys(event, steps, spans));
  return { node, spans };
}

function answerKeys(event, steps, spans) {
  const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const here = Number(event.target.dataset?.step);
  if (Number.isNaN(here)) return;
  if (event.key === "Enter" || event.key === " ") state.set({ step: here });
  else if (by) {
    let next = here + by;
    while (next >= 0 && next < steps.length && steps[next].kind === "fast") next += by;
    if (next < 0 || next >= steps.length) return;
    spans[here].setAttribute("tabindex", "-1");
    spans[next].setAttribute("tabindex", "0");
    spans[next].focus();
  } else return;
  event.preventDefault();
}

// A history many times as long as the memory would press it flat: it is named instead of drawn.
function showsHistory(steps) {
  return steps[steps.length - 1].position <= 4 * Math.max(...steps.map((step) => step.memory));
}

// Tokens that fast steps can attend to, over the answer, below the length of the history.
function timeline(width, trace, chosen) {
  const steps = stepsOf(trace);
  const height = 190;
  const room = { left: 52, right: 10, top: 14, bottom: 54 };
  const withHistory = showsHistory(steps);
  const most = Math.max(...steps.map((step) => (withHistory ? Math.max(step.position, step.memory) : step.memory * 1.1)), 1);
  const x = (index) => room.left + ((index + 0.5) / steps.length) * (width - room.left - room.right);
  const y = scale(0, most, height - room.bottom, room.top);
  const half = (width - room.left - room.right) / steps.length / 2;
  const line = steps.map((step) => `${x(step.index) - half},${y(step.memory)}L${x(step.index) + half},${y(step.memory)}`).join("L");
  const base = height - room.bottom;
  const parts = [0, 0.5, 1].map((part) => {
    const value = most * part;
    return [draw("line", { class: "tick", x1: room.left, x2: width - room.right, y1: y(value), y2: y(value) }), draw("text", { x: room.left - 8, y: y(value) + 4, "text-anchor": "end" }, count(value))];
  });
  parts.push(draw("path", { d: `M${room.left},${base}L${line}L${width - room.right},${base}Z`, fill: "var(--accent-soft)" }));
  parts.push(draw("path", { d: `M${line}`, fill: "none", stroke: "var(--accent)", "stroke-width": 1.6 }));
  if (withHistory) parts.push(draw("path", { class: "guide", fill: "none", d: `M${steps.map((step) => `${x(step.index)},${y(step.position)}`).join("L")}` }));
  for (const step of steps.filter((one) => one.kind !== "fast")) {
    const lane = { slow: 0, retry: 1, rejecting: 2 }[step.look];
    const colour = { slow: "var(--slow)", retry: "var(--retry)", rejecting: "var(--reject)" }[step.look];
    parts.push(draw("rect", { x: x(step.index) - Math.max(1, Math.min(3, half)), y: base + 4 + lane * 8, width: Math.max(2, Math.min(6, 2 * half)), height: 7, fill: colour }));
  }
  if (chosen !== null) parts.push(draw("line", { x1: x(chosen), x2: x(chosen), y1: room.top, y2: base + 28, stroke: "var(--ink)", "stroke-width": 1.4 }));
  parts.push(draw("text", { class: "axis-title", x: room.left, y: height - 6 }, "generated token 1"), draw("text", { class: "axis-title", x: width - room.right, y: height - 6, "text-anchor": "end" }, count(steps.length)));
  const at = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    const index = Math.floor(((event.clientX - box.left) / box.width) * steps.length);
    return steps[Math.max(0, Math.min(steps.length - 1, index))];
  };
  parts.push(draw("rect", { x: room.left, y: 0, width: width - room.left - room.right, height: base + 30, fill: "transparent", style: { cursor: "pointer" }, on: {
    mousemove: (event) => { const step = at(event); tip.show(event, spoken(tokenText(trace, step.position) ?? "(not kept)"), stepPairs(step)); },
    mouseleave: tip.hide,
    click: (event) => { const step = nearestSlow(steps, at(event).index); if (step) state.set({ step: step.index }); },
  } }));
  const slow = steps.filter((step) => step.kind !== "fast").length;
  return draw("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `Memory over ${plural(steps.length, "generated token", "generated tokens")}: at most ${count(Math.max(...steps.map((step) => step.memory)))} tokens, history up to ${count(steps[steps.length - 1].position)}; ${plural(slow, "slow step", "slow steps")}` }, parts);
}

function nearestSlow(steps, index) {
  const slow = steps.filter((step) => step.kind !== "fast");
  return slow.sort((a, b) => Math.abs(a.index - index) - Math.abs(b.index - index))[0] || null;
}

// Reasons of this run as bars, with the counts over all runs of the policy beside them.
function reasonList(trace, everywhere) {
  const here = new Map();
  for (const step of stepsOf(trace)) {
    if (step.kind === "fast") continue;
    const group = reasonGroup(step.reason);
    const entry = here.get(group) || { slow: 0, retry: 0, rejecting: 0 };
    entry[step.look] += 1;
    here.set(group, entry);
  }
  if (!here.size) return make("p", { class: "empty" }, "No slow step in this run.");
  const sum = (entry) => entry.slow + entry.retry + entry.rejecting;
  const most = Math.max(...[...here.values()].map(sum));
  const chosen = state.get("reason");
  const items = [...here.entries()].sort((a, b) => sum(b[1]) - sum(a[1])).map(([group, entry]) => {
    const part = (kind, colour) => make("i", { style: { width: `${(100 * entry[kind]) / most}%`, background: colour } });
    const text = everywhere.has(group) ? `${sum(entry)} here, ${count(everywhere.get(group))} in all runs` : `${sum(entry)} here`;
    return make("li", {}, make("button", { type: "button", "aria-pressed": String(chosen === group), on: { click: () => state.set({ reason: chosen === group ? null : group }) } },
      make("span", {}, spoken(group)), make("span", {}, text),
      make("span", { class: "track", "aria-hidden": "true" }, part("slow", "var(--slow)"), part("retry", "var(--retry)"), part("rejecting", "var(--reject)"))));
  });
  return make("ul", { class: "reasons" }, items);
}

function stepList(trace, chosen) {
  const wanted = state.get("reason");
  const steps = stepsOf(trace).filter((step) => step.kind !== "fast" && (!wanted || reasonGroup(step.reason) === wanted));
  return make("ol", { class: "steps", "aria-label": "Slow steps" }, steps.map((step) => make("li", {}, make("button", { type: "button", "data-listed": step.index, "aria-pressed": String(step.index === chosen), on: { click: () => state.set({ step: step.index }) } },
    make("span", {}, `token ${count(step.index + 1)}`), make("span", { class: `kind-${step.look}` }, step.look === "rejecting" ? "rejected" : step.kind),
    make("span", {}, `${clip(spoken(tokenText(trace, step.position) ?? "\u2026"), 18)}  ${spoken(step.reason)}`)))));
}
