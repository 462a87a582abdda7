// Colours and shapes of policies: assigned by the order of values, the same everywhere on the page.
const COLOURS = 8;
const SHAPES = [
  (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0Z`,
  (r) => `M${-r * 0.88},${-r * 0.88}h${r * 1.76}v${r * 1.76}h${-r * 1.76}Z`,
  (r) => `M0,${-r * 1.28}L${r * 1.28},0L0,${r * 1.28}L${-r * 1.28},0Z`,
  (r) => `M0,${-r * 1.2}L${r * 1.15},${r * 0.85}H${-r * 1.15}Z`,
  (r) => `M0,${r * 1.2}L${r * 1.15},${-r * 0.85}H${-r * 1.15}Z`,
  (r) => {
    const a = r * 0.42, b = r * 1.2;
    return `M${-a},${-b}H${a}V${-a}H${b}V${a}H${a}V${b}H${-a}V${a}H${-b}V${-a}H${-a}Z`;
  },
  (r) => polygon(6, r * 1.12),
  (r) => star(r * 1.35),
];

function polygon(corners, r) {
  return `M${[...Array(corners).keys()].map((i) => `${r * Math.cos((2 * Math.PI * i) / corners)},${r * Math.sin((2 * Math.PI * i) / corners)}`).join("L")}Z`;
}

function star(r) {
  const points = [...Array(10).keys()].map((i) => {
    const reach = i % 2 ? r * 0.48 : r;
    return `${reach * Math.sin((Math.PI * i) / 5)},${-reach * Math.cos((Math.PI * i) / 5)}`;
  });
  return `M${points.join("L")}Z`;
}

const DENSE_SHAPE = (r) => `${SHAPES[0](r)}M${-r * 0.45},0a${r * 0.45},${r * 0.45} 0 1,1 ${r * 0.9},0a${r * 0.45},${r * 0.45} 0 1,1 ${-r * 0.9},0Z`;

function place(trait, policy) {
  const read = policyTrait(trait)[2];
  return traitValues(read).indexOf(read(policy) ?? null);
}

function colourAt(index) {
  return `var(--mark-${index % COLOURS})`;
}

function colourOf(policy, trait = state.get("colour", "selector")) {
  return policy.dense ? "var(--mark-none)" : colourAt(place(trait, policy));
}

function shapeOf(policy, trait = state.get("shape", "slow_step")) {
  return policy.dense ? DENSE_SHAPE : SHAPES[place(trait, policy) % SHAPES.length];
}

function sample(path, colour, size = 14) {
  return draw("svg", { width: size, height: size, viewBox: "-8 -8 16 16", "aria-hidden": "true" }, draw("path", { d: path, fill: colour, "fill-rule": "evenodd" }));
}

function policySample(policy) {
  return sample(shapeOf(policy)(5), colourOf(policy));
}

function markLegend() {
  const items = [];
  const colour = policyTrait(state.get("colour", "selector"));
  const shape = policyTrait(state.get("shape", "slow_step"));
  for (const [index, value] of traitValues(colour[2]).entries()) {
    items.push(make("li", {}, make("span", { class: "swatch", style: { background: colourAt(index) } }), word(value)));
  }
  for (const [index, value] of traitValues(shape[2]).entries()) {
    items.push(make("li", {}, sample(SHAPES[index % SHAPES.length](5), "var(--ink-soft)"), word(value)));
  }
  return make("ul", { class: "legend", "aria-label": `Colour: ${colour[1]}; shape: ${shape[1]}` }, items);
}
