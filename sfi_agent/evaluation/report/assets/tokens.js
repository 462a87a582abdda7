// The token view: which run, its answer, and the history as any of its slow steps selected it.
function currentTrace() {
  const policy = chosenPolicy();
  const own = DATA.traces.map((trace, number) => ({ ...trace, number })).filter((trace) => (policy ? trace.policy === policy.index : !POLICIES[trace.policy].dense));
  const found = own.find((trace) => trace.id === state.get("run")) || own[0] || (policy ? null : DATA.traces.length ? { number: 0 } : null);
  return found ? traceNumbered(found.number) : null;
}

function traceName(trace) {
  return `${POLICIES[trace.policy].name} \u00b7 ${word(trace.task)} \u00b7 ${count(trace.context_tokens)} \u00b7 ${word(trace.protocol)} \u00b7 seed ${trace.seed}, case ${trace.case}`;
}

function tokensSection() {
  const body = make("div", {});
  const runs = make("select", { id: "run", on: { change: () => pickRun(runs.value) } }, make("option", { value: "" }, "choose a run"), DATA.traces.map((trace) => make("option", { value: trace.id }, traceName(trace))));
  byId("tokens").append(
    make("h2", { id: "tokens-title" }, "One run, token by token"),
    make("p", { class: "lede" }, "Plain tokens came from fast steps, which read the memory alone. Marked tokens came from slow steps; click one to see what was selected at that moment."),
  );
  if (!DATA.traces.length) {
    byId("tokens").append(make("p", { class: "empty" }, "No run was traced in this folder: traces/ is missing or empty."));
    return;
  }
  byId("tokens").append(make("div", { class: "controls no-print" }, make("label", { class: "field" }, "Run", runs)), body);
  const paint = () => {
    const trace = currentTrace();
    runs.value = trace ? trace.id : "";
    body.replaceChildren(...(trace ? traceCards(trace) : [make("p", { class: "empty" }, `No run of ${chosenPolicy().name} was traced. Choose another run above.`)]));
  };
  state.watch(["policy", "run"], paint);
  paint();
}

function pickRun(id) {
  const trace = DATA.traces.find((candidate) => candidate.id === id);
  if (trace) state.set({ policy: POLICIES[trace.policy].name, run: id, step: null, reason: null, layer: null });
}

function currentStep(trace) {
  const steps = stepsOf(trace);
  const index = Number(state.get("step", "NaN"));
  if (Number.isInteger(index) && steps[index] && steps[index].kind !== "fast") return steps[index];
  const first = trace.refreshes.find((refresh) => refresh.step !== null);
  return first ? steps[first.step] : null;
}

function traceCards(trace) {
  const answer = answerText(trace);
  const asked = make("div", { class: "card" }, runFacts(trace), make("h3", { class: "gap" }, "Answer"), kindLegend(trace), answer.node);
  const drawing = make("div", { class: "plot", id: "timeline" });
  const reasons = make("div", {});
  const list = make("div", {});
  const everywhere = groupedReasons(summed(ROWS.filter((row) => row.policy === trace.policy)).reasons);
  const follow = () => {
    const step = currentStep(trace);
    const wanted = state.get("reason");
    answer.node.classList.toggle("muted", wanted !== "");
    stepsOf(trace).forEach((one, index) => {
      answer.spans[index].classList.toggle("here", Boolean(step) && step.index === index);
      answer.spans[index].classList.toggle("kept", one.kind !== "fast" && reasonGroup(one.reason) === wanted);
    });
    const focused = document.activeElement?.dataset?.listed;
    const top = list.querySelector(".steps")?.scrollTop || 0;
    reasons.replaceChildren(reasonList(trace, everywhere));
    list.replaceChildren(stepList(trace, step ? step.index : null));
    list.querySelector(".steps").scrollTop = top;
    if (focused !== undefined) list.querySelector(`[data-listed="${focused}"]`)?.focus();
    paintTimeline();
  };
  const paintTimeline = () => {
    const width = Math.floor(drawing.clientWidth);
    const step = currentStep(trace);
    if (width && trace.steps.length) drawing.replaceChildren(timeline(width, trace, step ? step.index : null));
  };
  follow();
  onWidth(drawing, paintTimeline);
  state.watchWhile(answer.node, ["step", "reason"], follow);
  const side = make("div", { class: "grid" },
    make("div", { class: "card" }, make("h3", {}, "Tokens that fast steps can attend to"), drawing, make("p", { class: "small" }, memoryNote(trace))),
    make("div", { class: "card" }, make("h3", {}, "Reasons for slow steps"), reasons, list));
  return [asked, side, historyCard(trace)];
}

function runFacts(trace) {
  const steps = stepsOf(trace);
  const slow = steps.filter((step) => step.kind !== "fast");
  const drafted = steps.reduce((sum, step) => sum + step.drafted, 0);
  const accepted = steps.reduce((sum, step) => sum + step.accepted, 0);
  const facts = [
    ["Score", `${trace.right} of ${trace.parts} parts right${trace.exact ? ", the whole answer" : ""}`],
    ["Tokens", `${count(trace.prompt_tokens)} in the prompt, ${count(steps.length)} generated, ${count(slow.length)} of them by slow steps`],
    ...(drafted ? [["Drafts kept", `${count(accepted)} of ${count(drafted)}`]] : []),
    ["Question", tokenNodes(clip(trace.question, 1500), true)],
    ["Expected", trace.references.length ? trace.references.map((text) => make("div", {}, tokenNodes(clip(text, 600), true))) : MISSING],
  ];
  return make("dl", { class: "facts" }, facts.map(([name, text]) => [make("dt", {}, name), make("dd", {}, text)]));
}

function memoryNote(trace) {
  const steps = stepsOf(trace);
  if (!steps.length) return "No token was generated.";
  const most = Math.max(...steps.map((step) => step.memory));
  const history = steps[steps.length - 1].position;
  const line = showsHistory(steps) ? "Dotted: length of the history." : `The history has up to ${count(history)} tokens, ${(history / most).toFixed(0)} times as many.`;
  return `Filled: memory. ${line} Bars below: slow steps, retries, rejecting verifications.`;
}

function kindLegend(trace) {
  const looks = new Set(stepsOf(trace).map((step) => step.look));
  const entries = [["fast", "fast step"], ["slow", "slow step"], ["retry", "retry: a fast step run again densely"], ["rejecting", "slow step that rejected drafts"]].filter(([look]) => looks.has(look));
  return make("ul", { class: "legend tight" }, entries.map(([look, text]) => make("li", {}, make("span", { class: "tokens" }, make("span", { class: `t ${look}` }, "token")), text)));
}

// ---------------------------------------------------------------- the history at a slow step
function historyCard(trace) {
  const title = make("h3", { "aria-live": "polite" });
  const card = make("div", { class: "card", id: "history" }, title);
  if (!trace.refreshes.length) {
    title.textContent = "Selection on the history";
    card.append(make("p", { class: "empty" }, POLICIES[trace.policy].dense ? "Dense decoding selects nothing: every step reads the whole history." : "No refresh of this run was kept."));
    return card;
  }
  const view = { text: new HistoryText(trace), layers: make("canvas", { class: "map", role: "img" }), all: make("canvas", { class: "map", role: "img" }), summary: make("div", {}), title, sight: make("div", { class: "sight" }) };
  const layer = make("select", { on: { change: () => state.set({ layer: layer.value === "all" ? null : layer.value }) } }, make("option", { value: "all" }, "all layers"), Object.keys(trace.refreshes[0].layers).map((name) => make("option", { value: name }, `layer ${name}`)));
  const move = (by) => state.set({ step: neighbour(trace, by) });
  fill(card, {}, [
    make("div", { class: "controls no-print gap" }, make("label", { class: "field" }, "Layers", layer),
      make("button", { type: "button", class: "button", on: { click: () => move(-1) } }, "\u2190 earlier"), make("button", { type: "button", class: "button", on: { click: () => move(1) } }, "later \u2192")),
    view.summary,
    mapBlock("Every kept refresh, first at the top", view.all, trace), mapBlock("This refresh: all layers together, then layer by layer", view.layers, trace, view.sight),
    levelLegend(trace), view.text.node, sampledNote(trace)]);
  const follow = () => {
    layer.value = state.get("layer", "all");
    if (layer.selectedIndex < 0) layer.value = "all";
    paintHistory(trace, view, layer.value);
  };
  wireMaps(trace, view);
  state.watchWhile(card, ["step", "layer", "theme"], follow);
  onWidth(view.all, follow);
  return card;
}

function shownRefresh(trace) {
  const step = currentStep(trace);
  return { step, index: step ? trace.refreshes.findIndex((refresh) => refresh.step === step.index) : -1 };
}

function neighbour(trace, by) {
  const { step } = shownRefresh(trace);
  const kept = trace.refreshes.map((refresh) => refresh.step).filter((index) => index !== null);
  const here = step ? step.index : -1;
  const next = by > 0 ? kept.find((index) => index > here) : [...kept].reverse().find((index) => index < here);
  return next ?? here;
}

function paintHistory(trace, view, layer) {
  const { step, index } = shownRefresh(trace);
  const refresh = index < 0 ? null : trace.refreshes[index];
  const word = step ? `token ${count(step.index + 1)} \u201c${spoken(tokenText(trace, step.position) ?? "\u2026").trim()}\u201d` : "";
  view.title.textContent = refresh ? `Selected at ${word}${step.reason ? `: ${spoken(step.reason)}` : ""}` : step ? `No selection was kept for ${word}` : "Selection on the history";
  view.text.paint(refresh, layer);
  view.rows = trace.refreshes.map((one, number) => ({ runs: refreshRuns(one, layer), most: refreshMost(trace, one, layer), end: one.history_tokens, chosen: number === index }));
  paintMap(view.all, trace, view.rows, Math.max(5, Math.min(14, 220 / view.rows.length)));
  const names = refresh ? ["all", ...Object.keys(refresh.layers)] : [];
  view.layers.parentNode.hidden = !refresh;
  if (refresh) paintMap(view.layers, trace, names.map((name) => ({ runs: refreshRuns(refresh, name), most: refreshMost(trace, refresh, name), end: refresh.history_tokens, chosen: name === layer && names.length > 2 })), 14);
  view.layerNames = names;
  const found = refresh ? mostSelected(view.text.counts, refresh.history_tokens) : null;
  view.summary.replaceChildren(refresh ? selectionSummary(trace, view, refresh, layer, found) : make("p", { class: "empty" }, step ? "This refresh is not among those kept in the file; choose an earlier or later one." : "Choose a slow step above."));
  if (found && found.top.length) view.text.scrollTo(found.top[0].start);
  view.sightPaint();
}

// Where nearly everything is selected by somebody, the passages that most agree on tell more.
function mostSelected(counts, seen) {
  const peak = counts.reduce((most, times) => Math.max(most, times), 0);
  return { total: passages(counts, seen, 1).length, top: peak ? passages(counts, seen, Math.ceil(peak * 0.6)).slice(0, 8) : [] };
}

function selectionSummary(trace, view, refresh, layer, found) {
  let tokens = 0;
  for (const times of view.text.counts) tokens += times > 0;
  const where = layer === "all" ? `${count(refresh.heads_total)} pairs of layer and KV head` : `${count(trace.kv_heads)} KV heads of layer ${layer}`;
  const text = `${count(tokens)} of ${count(refresh.history_tokens)} tokens were selected by at least one of ${where}, in ${plural(found.total, "passage", "passages")}. Always in memory besides: ${known(trace.sink_tokens) ? count(trace.sink_tokens) : MISSING} sink and ${known(trace.recent_tokens) ? count(trace.recent_tokens) : MISSING} recent tokens (underlined).`;
  const links = found.top.map((passage) => {
    const pieces = [];
    for (let position = passage.start; position < Math.min(passage.end, passage.start + 12); position += 1) pieces.push(tokenText(trace, position) ?? "\u2026");
    return make("button", { type: "button", class: "chip", title: `positions ${passage.start} to ${passage.end - 1}`, on: { click: () => view.text.scrollTo(passage.start) } }, clip(spoken(pieces.join("").trim()), 34));
  });
  return make("div", {}, make("p", { class: "small" }, text), links.length ? make("div", { class: "chips no-print" }, make("div", {}, make("span", { class: "small" }, "Selected most:"), links)) : null);
}

function mapBlock(title, canvas, trace, extra) {
  return make("div", { class: "mapblock" }, make("div", { class: "small" }, title), canvas, extra || null,
    make("div", { class: "map-labels", "aria-hidden": "true" }, make("span", {}, "position 0"), make("span", {}, `answer begins at ${count(trace.prompt_tokens)} (vertical line)`), make("span", {}, count(trace.history_tokens - 1))));
}

function wireMaps(trace, view) {
  view.all.setAttribute("aria-label", `Selected positions over ${plural(trace.refreshes.length, "refresh", "refreshes")}`);
  view.layers.setAttribute("aria-label", "Selected positions by layer");
  view.all.addEventListener("click", (event) => {
    const { position, row } = mapPlace(event, view.all, trace, trace.refreshes.length);
    const step = trace.refreshes[row].step;
    if (step !== null) state.set({ step });
    view.text.scrollTo(position);
  });
  view.layers.addEventListener("click", (event) => {
    const { position, row } = mapPlace(event, view.layers, trace, view.layerNames.length);
    state.set({ layer: view.layerNames[row] === "all" ? null : view.layerNames[row] });
    view.text.scrollTo(position);
  });
  for (const [canvas, rows, name] of [[view.all, () => trace.refreshes.length, (row) => `refresh at token ${count((trace.refreshes[row].step ?? -1) + 1)}`], [view.layers, () => view.layerNames.length, (row) => (view.layerNames[row] === "all" ? "all layers" : `layer ${view.layerNames[row]}`)]]) {
    canvas.addEventListener("mousemove", (event) => {
      const { position, row } = mapPlace(event, canvas, trace, rows());
      const around = [-2, -1, 0, 1, 2].map((by) => tokenText(trace, position + by) ?? "").join("");
      tip.show(event, name(row), [["position", count(position)], ["text", spoken(around)]]);
    });
    canvas.addEventListener("mouseleave", tip.hide);
  }
  view.sightPaint = () => {
    const [first, last] = view.text.inSight();
    view.sight.style.marginLeft = `${(100 * first) / trace.history_tokens}%`;
    view.sight.style.width = `${Math.max(0.4, (100 * (last - first)) / trace.history_tokens)}%`;
  };
  view.text.node.addEventListener("scroll", () => requestAnimationFrame(view.sightPaint), { passive: true });
}

function levelLegend(trace) {
  const levels = [...Array(LEVELS).keys()].map((index) => make("span", { class: `swatch level s${index + 1}` }));
  return make("ul", { class: "legend tight" }, make("li", {}, "selected by few", levels, "by all"), make("li", {}, make("span", { class: "swatch under" }), "sink or recent"), make("li", {}, make("i", {}, "italic"), "generated"),
    trace.history_tokens > trace.prompt_tokens ? make("li", {}, make("span", { class: "later" }, "pale"), "not there yet") : null);
}

function sampledNote(trace) {
  const notes = [];
  if (trace.refreshes.length < trace.refreshes_total) notes.push(`${count(trace.refreshes.length)} of ${count(trace.refreshes_total)} refreshes are kept, evenly spread.`);
  const first = trace.refreshes[0];
  if (Object.keys(first.layers).length < first.layers_total) notes.push(`${Object.keys(first.layers).length} of ${first.layers_total} layers are kept one by one; "all layers" counts every one.`);
  const kept = trace.texts.reduce((sum, [, texts]) => sum + texts.length, 0);
  if (kept < trace.history_tokens) notes.push(`${count(kept)} of ${count(trace.history_tokens)} token texts are kept: the beginning, the end and what was selected.`);
  return notes.length ? make("p", { class: "small" }, `Sampled: ${notes.join(" ")}`) : null;
}
