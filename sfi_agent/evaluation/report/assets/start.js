// Builds the sections, then follows the address.
const THEMES = ["auto", "light", "dark"];
const wishesStill = matchMedia("(prefers-reduced-motion: reduce)");
const wishesDark = matchMedia("(prefers-color-scheme: dark)");

function applyTheme() {
  const wanted = state.get("theme", "auto");
  document.documentElement.dataset.theme = wanted === "dark" || (wanted === "auto" && wishesDark.matches) ? "dark" : "light";
  byId("theme").textContent = `Theme: ${THEMES.includes(wanted) ? wanted : "auto"}`;
}

function showView(calm) {
  const view = state.get("view");
  const section = /^[a-z]+$/.test(view) ? byId(view) : null;
  if (section && section.tagName === "SECTION") section.scrollIntoView({ behavior: calm || wishesStill.matches ? "instant" : "smooth" });
}

applyTheme();
wishesDark.addEventListener("change", () => {
  applyTheme();
  state.tell(["theme"]);
});
state.watchers.unshift([new Set(["theme"]), applyTheme]);
byId("theme").addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(state.get("theme", "auto")) + 1) % THEMES.length];
  state.set({ theme: next === "auto" ? null : next });
});
for (const link of document.querySelectorAll(".bar a")) {
  link.addEventListener("click", (event) => {
    event.preventDefault();
    const view = link.getAttribute("href").split("=")[1];
    if (state.get("view") === view) showView(false);
    else state.set({ view });
  });
}
const picker = byId("policy");
picker.append(make("option", { value: "" }, "no policy chosen"), ...POLICIES.map((policy) => make("option", { value: policy.name }, policy.name)));
const followPicker = () => {
  picker.value = chosenPolicy()?.name ?? "";
};
picker.addEventListener("change", () => state.set({ policy: picker.value, run: null, step: null, reason: null, layer: null }));
state.watch(["policy"], followPicker);
followPicker();
for (const build of [summaryTiles, accuracySection, alongSection, tableSection, reasonsSection, recallSection, tokensSection]) build();
state.watch(["view"], () => showView(false));
window.addEventListener("scroll", tip.hide, { passive: true });
// Charts take their height when their box is measured, after this script.
requestAnimationFrame(() => requestAnimationFrame(() => {
  showView(true);
  document.documentElement.dataset.ready = "yes";
}));
