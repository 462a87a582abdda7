// The data of the page, and sums over it. Nothing is filled in: what is missing stays null.
const DATA = JSON.parse(byId("data").textContent);
const POLICIES = DATA.policies.map((policy, index) => ({ ...policy, index, dense: policy.mode === "dense" }));
const ROWS = DATA.rows.map((row) => ({ ...row, key: [row.task, row.context_tokens, row.protocol, row.answers].join("\u0001") }));

// ---- what policies and rows can be told apart by
const POLICY_TRAITS = [
  ["selector", "Selector", (policy) => policy.selector],
  ["boundaries", "Boundaries", (policy) => policy.boundaries],
  ["slow_step", "Slow step", (policy) => policy.slow_step],
  ["selected_tokens", "Budget", (policy) => policy.selected_tokens],
  ["preset", "Preset", (policy) => policy.preset],
];
for (const name of new Set(POLICIES.flatMap((policy) => Object.keys(policy.settings)))) {
  POLICY_TRAITS.push([`set.${name}`, name, (policy) => (name in policy.settings ? JSON.stringify(policy.settings[name]) : null)]);
}
const ROW_TRAITS = [
  ["task", "Task", (row) => row.task],
  ["context_tokens", "Context tokens", (row) => row.context_tokens],
  ["protocol", "Question", (row) => row.protocol],
  ["answers", "Earlier answers", (row) => row.answers],
];

function word(value) {
  if (value === null || value === undefined) return "none";
  return typeof value === "number" ? count(value) : String(value);
}

function inOrder(values) {
  return [...new Set(values)].sort((a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b : a === null ? 1 : b === null ? -1 : String(a) < String(b) ? -1 : 1,
  );
}

// Values of a trait over slow-fast policies: dense has none of them.
function traitValues(read) {
  return inOrder(POLICIES.filter((policy) => !policy.dense).map((policy) => read(policy) ?? null));
}

function policyTrait(name) {
  return POLICY_TRAITS.find((trait) => trait[0] === name) || POLICY_TRAITS[0];
}

// ---- sums over rows
const SUMMED = ["cases", "failed", "right", "parts", "exact", "answers_given", "retries", "generated_tokens", "dense_passes", "drafted_tokens", "accepted_tokens"];

function total(rows, field) {
  const values = rows.map((row) => row[field]).filter(known);
  return values.length ? values.reduce((sum, value) => sum + value, 0) : null;
}

function weighted(rows, field, weight) {
  const usable = rows.filter((row) => known(row[field]) && known(row[weight]));
  const weights = total(usable, weight);
  if (!weights) return null;
  return usable.reduce((sum, row) => sum + row[field] * row[weight], 0) / weights;
}

function summed(rows) {
  const sum = Object.fromEntries(SUMMED.map((field) => [field, total(rows, field)]));
  sum.slow_share = weighted(rows, "slow_share", "generated_tokens");
  sum.memory_tokens_mean = weighted(rows, "memory_tokens_mean", "generated_tokens");
  sum.seconds_per_token = weighted(rows, "seconds_per_token", "generated_tokens");
  sum.agreed_share = weighted(rows, "agreed_share", "answers_given");
  sum.agreed_tokens_median = rows.length === 1 ? rows[0].agreed_tokens_median : null;
  sum.acceptance = sum.drafted_tokens ? sum.accepted_tokens / sum.drafted_tokens : null;
  sum.parts_share = wilson(sum.right, sum.parts);
  sum.answers_share = wilson(sum.exact, sum.answers_given);
  sum.reasons = {};
  for (const row of rows) {
    for (const [reason, times] of Object.entries(row.reasons || {})) sum.reasons[reason] = (sum.reasons[reason] || 0) + times;
  }
  return sum;
}

// One entry per policy over the given rows. `whole` says whether it ran everything that any
// policy ran there: shares of different cases are not comparable.
function perPolicy(rows) {
  const ran = rows.filter((row) => row.cases > 0);
  const everything = new Map();
  for (const row of ran) everything.set(row.key, Math.max(row.cases, everything.get(row.key) || 0));
  return POLICIES.map((policy) => {
    const own = ran.filter((row) => row.policy === policy.index);
    const cases = new Map(own.map((row) => [row.key, row.cases]));
    const whole = [...everything].every(([key, number]) => cases.get(key) === number);
    return { policy, rows: own, whole, ...summed(own) };
  }).filter((entry) => entry.rows.length);
}

// Entries that no other beats in both: lower is better for `cost`, higher for `gain`.
function paretoFront(entries, cost, gain) {
  const sorted = entries
    .filter((entry) => known(cost(entry)) && known(gain(entry)))
    .sort((a, b) => cost(a) - cost(b) || gain(b) - gain(a));
  const front = [];
  for (const entry of sorted) {
    if (!front.length || gain(entry) > gain(front[front.length - 1])) front.push(entry);
  }
  return front;
}

// ---- token views, read when first shown
const loaded = new Map();

function traceNumbered(number) {
  if (!loaded.has(number)) {
    loaded.set(number, { ...JSON.parse(byId(`trace-${number}`).textContent), ...DATA.traces[number], number });
  }
  return loaded.get(number);
}

// The inverse of the packing described beside the writer: gap, length and count as base-128 digits.
function unpackRuns(text) {
  const bytes = atob(text);
  const runs = [];
  const triple = [];
  let value = 0;
  let scale = 1;
  let end = 0;
  for (let index = 0; index < bytes.length; index += 1) {
    const byte = bytes.charCodeAt(index);
    value += (byte & 127) * scale;
    scale *= 128;
    if (byte > 127) continue;
    triple.push(value);
    value = 0;
    scale = 1;
    if (triple.length === 3) {
      const start = end + triple[0];
      runs.push([start, triple[1], triple[2]]);
      end = start + triple[1];
      triple.length = 0;
    }
  }
  return runs;
}
