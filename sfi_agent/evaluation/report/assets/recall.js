// Attention mass recalled: policies by layers, and layers by heads of the chosen policy.
function layerMean(heads) {
  return heads && heads.length ? heads.reduce((sum, value) => sum + value, 0) / heads.length : null;
}

function recallSection() {
  const section = byId("recall");
  section.append(make("h2", { id: "recall-title" }, "Attention mass recalled"));
  const found = DATA.recall;
  if (!found || !found.policies.length) {
    section.append(make("p", { class: "empty" }, "Recall was not measured in this folder: there is no recall.json, or it is empty."));
    return;
  }
  const from = [word(found.task), `${count(found.context_tokens)} tokens`, known(found.case) ? `case ${found.case}` : null, known(found.seed) ? `seed ${found.seed}` : null].filter(Boolean).join(", ");
  section.append(make("p", { class: "lede" }, `How much of the attention that a dense step would pay falls on what the memory holds, averaged over fast steps. 1 is everything; higher is better. Measured on ${from}. Hatched layers are dense, or were not measured.`));
  const measuredOnes = found.policies.filter((entry) => entry.layers);
  const unmeasured = found.policies.filter((entry) => !entry.layers);
  if (unmeasured.length) section.append(make("p", { class: "small" }, `Not measured: ${unmeasured.map((entry) => `${POLICIES[entry.policy].name} (${entry.reason || "no reason recorded"})`).join("; ")}.`));
  const silent = POLICIES.filter((policy) => !policy.dense && !found.policies.some((entry) => entry.policy === policy.index)).length;
  if (silent) section.append(make("p", { class: "small" }, `${plural(silent, "more policy has", "more policies have")} no entry in recall.json.`));
  if (!measuredOnes.length) return;
  section.append(make("div", { class: "grid gap" }, overviewCard(measuredOnes), headsCard(measuredOnes)), recallTable(measuredOnes));
}

function overviewCard(entries) {
  const layers = Math.max(...entries.map((entry) => entry.layers.length));
  const columns = [...Array(layers).keys()].map(String);
  const low = heatFloor(entries.flatMap((entry) => entry.layers.map(layerMean)).filter(known));
  const holder = make("div", { class: "heat tall" });
  const paint = () => {
    const chosen = chosenPolicy();
    const rows = entries.map((entry) => {
      const policy = POLICIES[entry.policy];
      return { name: policy.name, title: `${policy.name}, mean ${share(entry.mean)}`, values: entry.layers.map(layerMean), missing: "dense layer", chosen: policy === chosen, pick: () => choosePolicy(policy) };
    });
    holder.replaceChildren(heatMap(Math.floor(holder.clientWidth), rows, columns, { low, columnTitle: "layer", cellName: (name) => `layer ${name}`, label: "Recall per policy and layer, mean over heads" }));
  };
  state.watch(["policy"], paint);
  const card = make("div", { class: "card" }, make("h3", {}, "Policies by layer, mean over heads"), holder, heatScale(low, ""));
  onWidth(holder, paint);
  return card;
}

function headsCard(entries) {
  const title = make("h3", {});
  const holder = make("div", { class: "heat" });
  const legend = make("div", {});
  const paint = () => {
    const chosen = chosenPolicy();
    const entry = entries.find((candidate) => POLICIES[candidate.policy] === chosen);
    const shown = entry || (chosen && !chosen.dense ? null : entries[0]);
    if (!shown) {
      title.textContent = `Heads of ${chosen.name}`;
      holder.replaceChildren(make("p", { class: "empty" }, "Recall was not measured for this policy."));
      legend.replaceChildren();
      return;
    }
    title.textContent = `Heads of ${POLICIES[shown.policy].name}: mean ${share(shown.mean)} over ${plural(shown.fast_steps, "fast step", "fast steps")}`;
    const heads = Math.max(...shown.layers.map((layer) => (layer ? layer.length : 0)), 1);
    const low = heatFloor(shown.layers.flat().filter(known));
    const rows = shown.layers.map((layer, index) => ({ name: `layer ${index}`, values: layer || Array(heads).fill(null), missing: "dense layer" }));
    holder.replaceChildren(heatMap(Math.floor(holder.clientWidth), rows, [...Array(heads).keys()].map(String), { low, columnTitle: "query head", cellName: (name) => `head ${name}`, label: "Recall per layer and query head" }));
    legend.replaceChildren(heatScale(low, ""));
  };
  state.watch(["policy"], paint);
  const card = make("div", { class: "card follow" }, title, holder, legend);
  onWidth(holder, paint);
  return card;
}

function recallTable(entries) {
  const layers = Math.max(...entries.map((entry) => entry.layers.length));
  const numbers = [...Array(layers).keys()];
  const head = make("tr", {}, make("th", { scope: "col" }, "Policy"), make("th", { scope: "col", class: "number" }, "mean"), numbers.map((layer) => make("th", { scope: "col", class: "number" }, `layer ${layer}`)));
  const lines = entries.map((entry) => make("tr", {}, make("th", { scope: "row" }, POLICIES[entry.policy].name), make("td", { class: "number" }, share(entry.mean)),
    numbers.map((layer) => make("td", { class: "number" }, entry.layers[layer] ? share(layerMean(entry.layers[layer])) : "dense"))));
  return make("details", {}, make("summary", {}, "The same as numbers"), make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Recall as numbers" }, make("table", {}, make("thead", {}, head), make("tbody", {}, lines))));
}
