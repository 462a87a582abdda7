// What is chosen on the page, kept in the address behind "#" so that every view can be linked.
const state = {
  values: {},
  watchers: [],

  read() {
    const text = location.hash.replace(/^#/, "");
    this.values = Object.fromEntries(new URLSearchParams(text.includes("=") ? text : ""));
  },
  get(key, otherwise = "") {
    return this.values[key] ?? otherwise;
  },
  // Values of null or "" leave the address.
  set(changes) {
    const before = { ...this.values };
    for (const [key, value] of Object.entries(changes)) {
      if (value === null || value === undefined || value === "") delete this.values[key];
      else this.values[key] = String(value);
    }
    const keys = Object.keys({ ...before, ...this.values }).filter((key) => before[key] !== this.values[key]);
    if (!keys.length) return;
    history.replaceState(null, "", `#${new URLSearchParams(this.values)}`);
    this.tell(keys);
  },
  watch(keys, action) {
    this.watchers.push([new Set(keys), action]);
  },
  // For views that are replaced: the watch ends when the node has left the page.
  watchWhile(node, keys, action) {
    const entry = [new Set(keys), () => {
      if (node.isConnected) action();
      else this.watchers = this.watchers.filter((other) => other !== entry);
    }];
    this.watchers.push(entry);
  },
  tell(keys) {
    for (const [wanted, action] of [...this.watchers]) {
      if (keys.some((key) => wanted.has(key) || wanted.has(`${key.split(":")[0]}:`))) action();
    }
  },
};
state.read();

window.addEventListener("hashchange", () => {
  const before = state.values;
  state.read();
  const keys = Object.keys({ ...before, ...state.values }).filter((key) => before[key] !== state.values[key]);
  state.tell(keys);
});

function chosenPolicy() {
  const name = state.get("policy");
  return POLICIES.find((policy) => policy.name === name) || null;
}

function choosePolicy(policy) {
  state.set({ policy: policy.name, run: null, step: null, reason: null, layer: null });
}

function choice(label, key, options, standard) {
  const list = make(
    "select",
    { on: { change: () => state.set({ [key]: list.value === standard ? null : list.value }) } },
    options.map(([value, text]) => make("option", { value }, text)),
  );
  const follow = () => {
    list.value = state.get(key, standard);
    if (list.selectedIndex < 0) list.value = standard;
  };
  state.watch([key], follow);
  follow();
  return make("label", { class: "field" }, label, list);
}
