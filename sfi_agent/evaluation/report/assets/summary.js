// Tiles on top: the run in four numbers, over all tasks and lengths.
function summaryTiles() {
  const entries = perPolicy(ROWS).filter((entry) => entry.parts_share);
  const dense = entries.find((entry) => entry.policy.dense);
  const sparse = entries.filter((entry) => !entry.policy.dense && entry.whole && known(entry.slow_share));
  const tile = (value, text, wide) => make("div", { class: wide ? "tile wide" : "tile" }, make("b", {}, value), make("span", {}, text));
  const tiles = [tile(count(POLICIES.filter((policy) => !policy.dense).length), `slow-fast policies, ${plural(total(ROWS, "cases") || 0, "case", "cases")} played`)];
  if (dense) {
    const bounds = dense.parts_share;
    tiles.push(tile(share(bounds.mean), `parts right by dense decoding (${count(dense.right)} of ${count(dense.parts)}; ${share(bounds.low)} to ${share(bounds.high)})`));
    const equal = sparse.filter((entry) => entry.parts_share.high >= bounds.mean && entry.parts_share.low <= bounds.mean).sort((a, b) => a.slow_share - b.slow_share)[0];
    tiles.push(equal
      ? tile(clipName(equal.policy.name, 60), `cheapest whose 95 % interval holds dense\u2019s share: ${share(equal.parts_share.mean)} right at a slow share of ${share(equal.slow_share)}`, true)
      : tile("none", "of the policies has a 95 % interval that holds dense\u2019s share", true));
  } else {
    tiles.push(tile(MISSING, "dense decoding was not measured"));
  }
  const best = [...sparse].sort((a, b) => b.parts_share.mean - a.parts_share.mean || a.slow_share - b.slow_share)[0];
  if (best) tiles.push(tile(clipName(best.policy.name, 60), `most parts right: ${share(best.parts_share.mean)} at a slow share of ${share(best.slow_share)}`, true));
  byId("tiles").append(...tiles);
}
