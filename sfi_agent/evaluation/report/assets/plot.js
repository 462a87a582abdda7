// Axes, points and labels shared by the charts.
const MARGIN = { top: 38, right: 18, bottom: 42, left: 48 };

// A scale maps values to pixels: `bend` is a growing function that stretches part of the range.
function scale(low, high, from, to, bend = (value) => value) {
  const start = bend(low);
  const span = bend(high) - start || 1;
  return (value) => from + ((bend(value) - start) / span) * (to - from);
}

const NEAR_ONE = (value) => -Math.log(1.012 - value);
const ROOT = (value) => Math.sqrt(Math.max(0, value));

// Costs start at 0. Where they differ by an order of magnitude, roots keep the cheap ones apart.
function costAxis(values, from, to) {
  const highest = Math.max(0.01, ...values);
  const lowest = Math.min(...values.filter((value) => value > 0), highest);
  const wide = highest / lowest > 8;
  const step = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2].find((size) => highest / size <= 7) || 0.25;
  const even = [...Array(Math.floor(highest / step + 1.001)).keys()].map((index) => Number((index * step).toFixed(4)));
  const bent = [0, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1].filter((tick) => tick <= highest);
  return { wide, ticks: wide ? bent : even, at: scale(0, highest * 1.04, from, to, wide ? ROOT : undefined), name: String };
}

// The level of dense decoding, as a line across: it has no budget, and its slow share would push
// all others into a corner.
function denseGuide(width, y, dense, value, text, points) {
  if (!dense) return { line: null, text: null, areas: [] };
  const at = y.at(value);
  const long = textWidth(text, 11.5) + 8;
  const crossed = (left) => points.some((point) => overlap(box(left, at - 16, long, 14), box(point.x - 6, point.y - 6, 12, 12)));
  let left = MARGIN.left + 4;
  while (crossed(left) && left + long < width - MARGIN.right) left += 12;
  if (left + long > width - MARGIN.right) left = MARGIN.left + 4;
  const line = draw("line", { class: "guide", x1: MARGIN.left, x2: width - MARGIN.right, y1: at, y2: at });
  const name = draw("text", { class: "label dense", x: left + 2, y: at - 5 }, text);
  return { line, text: name, areas: [box(left, at - 16, long, 15)] };
}

function accuracyAxis(entries, read, stretched) {
  const lows = entries.map((entry) => read(entry)?.low).filter(known);
  const lowest = Math.min(1, ...lows);
  if (stretched) {
    const ticks = [0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 1];
    const low = [...ticks].reverse().find((tick) => tick <= lowest - 0.001) ?? 0;
    return { low, high: 1, ticks: ticks.filter((tick) => tick >= low), bend: NEAR_ONE };
  }
  const step = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2].find((size) => (1 - lowest) / size <= 6) || 0.2;
  const low = Math.max(0, Math.floor(lowest / step + 1e-9) * step);
  const ticks = [];
  for (let tick = 1; tick >= low - 1e-9; tick -= step) ticks.unshift(tick);
  return { low, high: 1, ticks };
}

function axes(width, height, x, y, titles) {
  const parts = [];
  for (const tick of y.ticks) {
    const at = y.at(tick);
    parts.push(draw("line", { class: "tick", x1: MARGIN.left, x2: width - MARGIN.right, y1: at, y2: at }));
    parts.push(draw("text", { x: MARGIN.left - 8, y: at + 4, "text-anchor": "end" }, y.name(tick)));
  }
  let lastEnd = -Infinity;
  for (const tick of x.ticks) {
    const at = x.at(tick);
    const text = x.name(tick);
    parts.push(draw("line", { class: "tick", x1: at, x2: at, y1: MARGIN.top, y2: height - MARGIN.bottom }));
    const half = textWidth(text, 12) / 2;
    if (at - half < lastEnd + 4) continue;
    lastEnd = at + half;
    parts.push(draw("text", { x: at, y: height - MARGIN.bottom + 17, "text-anchor": "middle" }, text));
  }
  const bottom = height - MARGIN.bottom;
  parts.push(draw("line", { class: "axis", x1: MARGIN.left, x2: width - MARGIN.right, y1: bottom, y2: bottom }));
  parts.push(draw("text", { class: "axis-title", x: (MARGIN.left + width - MARGIN.right) / 2, y: height - 5, "text-anchor": "middle" }, titles[0]));
  parts.push(draw("text", { class: "axis-title", x: 0, y: 12, "text-anchor": "start" }, titles[1]));
  return draw("g", { "aria-hidden": "true" }, parts);
}

// Puts a label near each point where it covers neither points nor other labels. A line leads to
// labels that do not touch their point.
function labels(width, height, points, wanted, guides) {
  const taken = [...guides, ...points.map((point) => box(point.x - 6, point.y - 6, 12, 12))];
  const placed = [];
  for (const point of wanted) {
    const text = clipName(point.label, 44);
    const long = textWidth(text, 11.5);
    const spot = labelSpots(point, long).find(({ x, y }) => {
      const area = box(x, y - 10, long, 13);
      return x > MARGIN.left - 4 && x + long < width && y < height - MARGIN.bottom && y > MARGIN.top - 4 && !taken.some((other) => overlap(area, other));
    });
    if (!spot) continue;
    taken.push(box(spot.x - 2, spot.y - 11, long + 4, 15));
    if (spot.far) placed.push(draw("path", { class: "leader", d: `M${point.x},${point.y}L${spot.x > point.x ? spot.x - 2 : spot.x + long + 2},${spot.y - 4}` }));
    placed.push(draw("text", { class: "label", x: spot.x, y: spot.y }, text));
  }
  return draw("g", { "aria-hidden": "true" }, placed);
}

function labelSpots(point, long) {
  const near = [
    { x: point.x + 10, y: point.y + 4 },
    { x: point.x - 10 - long, y: point.y + 4 },
    { x: point.x - long / 2, y: point.y + 20 },
    { x: point.x - long / 2, y: point.y - 11 },
  ];
  const far = [];
  for (const right of [24, 60, 110]) {
    for (const down of [18, -18, 34, -34, 52, 74, 100, 130]) far.push({ x: point.x + right, y: point.y + 4 + down, far: true }, { x: point.x - right - long, y: point.y + 4 + down, far: true });
  }
  return [...near, ...far];
}

function box(left, top, width, height) {
  return { left, top, right: left + width, bottom: top + height };
}

function overlap(a, b) {
  return a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
}

// Points of a chart: one stop for the tab key, arrows move between them, Enter chooses.
function pointMarks(points, chosen) {
  const ordered = [...points].sort((a, b) => a.x - b.x || a.y - b.y);
  const nodes = new Map();
  const step = (index, by) => {
    const next = nodes.get(ordered[(index + by + ordered.length) % ordered.length]);
    for (const node of nodes.values()) node.setAttribute("tabindex", "-1");
    next.setAttribute("tabindex", "0");
    next.focus();
  };
  for (const [index, point] of ordered.entries()) {
    const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    const keys = (event) => {
      if (event.key in move) step(index, move[event.key]);
      else if (event.key === "Enter" || event.key === " ") choosePolicy(point.policy);
      else return;
      event.preventDefault();
    };
    const classes = ["point", point.whole ? "" : "part", chosen === point.policy ? "chosen" : ""].join(" ");
    nodes.set(
      point,
      draw(
        "g",
        {
          class: classes, tabindex: index === 0 ? 0 : -1, role: "button", transform: `translate(${point.x},${point.y})`,
          "aria-label": `${point.policy.name}: ${point.pairs().map((pair) => pair.join(" ")).join(", ")}`,
          on: { ...onHover(() => point.title(points), point.pairs), keydown: keys, click: () => choosePolicy(point.policy) },
        },
        draw("circle", { class: "target", r: 12 }),
        draw("path", { class: "body", d: shapeOf(point.policy)(5.4), "fill-rule": "evenodd", style: { [point.whole ? "fill" : "stroke"]: colourOf(point.policy) } }),
      ),
    );
  }
  return draw("g", {}, points.map((point) => nodes.get(point)));
}

function whiskers(points) {
  return draw("g", { "aria-hidden": "true" }, points.map((point) => draw("line", { class: "whisker", x1: point.x, x2: point.x, y1: point.low, y2: point.high, stroke: colourOf(point.policy) })));
}
