// Heat maps of numbers between 0 and 1, in colours that stay apart for colour-blind readers and
// in grey (stops of the cividis map, Nunez et al. 2018).
const CIVIDIS = [[0, 34, 78], [18, 53, 112], [59, 73, 108], [87, 93, 109], [112, 113, 115], [138, 134, 120], [165, 156, 116], [195, 179, 105], [225, 204, 85], [254, 232, 56]];

function heatColour(value, low) {
  const at = Math.max(0, Math.min(1, (value - low) / (1 - low || 1))) * (CIVIDIS.length - 1);
  const index = Math.min(CIVIDIS.length - 2, Math.floor(at));
  const mixed = CIVIDIS[index].map((part, channel) => Math.round(part + (CIVIDIS[index + 1][channel] - part) * (at - index)));
  return `rgb(${mixed.join(",")})`;
}

// Where the colours of a map begin: a round number at or below everything in it.
function heatFloor(values) {
  const lowest = Math.min(1, ...values);
  return Math.max(0, Math.min(0.9, Math.floor(lowest * 10 + 1e-9) / 10));
}

function heatScale(low, extra) {
  const steps = 24;
  const bar = draw("svg", { width: 150, height: 12, "aria-hidden": "true" }, [...Array(steps).keys()].map((index) =>
    draw("rect", { x: (150 / steps) * index, width: 150 / steps + 0.5, height: 12, fill: heatColour(low + ((1 - low) * (index + 0.5)) / steps, low) })));
  return make("div", { class: "scale" }, fixed(low, 1), bar, "1.0 (everything recalled)", extra);
}

// rows: [{name, values: [number | null], missing, chosen, pick}], columns: names. A null is drawn as
// hatched and explained by `missing`.
function heatMap(width, rows, columns, { low, cellName, columnTitle, label }) {
  const nameWidth = Math.min(Math.max(90, width * 0.45), 16 + Math.max(...[columnTitle, ...rows.map((row) => row.name)].map((name) => textWidth(name, 12))));
  const cell = Math.max(9, Math.min(64, (width - nameWidth - 4) / columns.length));
  const tall = rows.length > 40 ? 15 : 21;
  const top = 30;
  const parts = [draw("defs", {}, draw("pattern", { id: "hatch", width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
    draw("rect", { width: 6, height: 6, fill: "var(--heat-none)" }), draw("rect", { width: 2, height: 6, fill: "var(--line)" })))];
  const every = Math.max(1, Math.ceil(26 / cell));
  columns.forEach((name, index) => {
    if (index % every === 0) parts.push(draw("text", { x: nameWidth + cell * (index + 0.5), y: top - 6, "text-anchor": "middle" }, name));
  });
  parts.push(draw("text", { x: nameWidth - 8, y: top - 6, "text-anchor": "end" }, columnTitle));
  rows.forEach((row, line) => {
    const y = top + line * tall;
    const cells = columns.map((name, index) => {
      const value = row.values[index];
      const text = known(value) ? value.toFixed(4) : row.missing;
      return draw("rect", { class: "cell", x: nameWidth + cell * index, y, width: cell, height: tall, fill: known(value) ? heatColour(value, low) : "url(#hatch)", on: onHover(row.title || row.name, () => [[cellName(name), text]]) });
    });
    const click = row.pick ? { click: row.pick, keydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); row.pick(); } } } : {};
    parts.push(draw("g", { class: `row${row.chosen ? " chosen" : ""}`, tabindex: row.pick ? 0 : null, role: row.pick ? "button" : null, "aria-label": `${row.name}: ${row.values.map((value) => (known(value) ? value.toFixed(2) : row.missing)).join(", ")}`, style: row.pick ? { cursor: "pointer" } : {}, on: click },
      draw("text", { x: nameWidth - 8, y: y + tall * 0.7, "text-anchor": "end" }, fitName(row.name, nameWidth - 12, 11.5)), cells));
  });
  const wide = nameWidth + cell * columns.length + 4;
  const high = top + rows.length * tall + 4;
  return draw("svg", { width: wide, height: high, viewBox: `0 0 ${wide} ${high}`, role: "group", "aria-label": label }, parts);
}
