// The history that a slow step looked at: its tokens, and which of them were selected.
const LEVELS = 6;
const CHUNK_TOKENS = 48;
const CHUNK_TOKENS_HARD = 400;
const LATER = 8, SINK = 16, RECENT = 32, MADE = 64;

function refreshRuns(refresh, layer) {
  const packed = layer === "all" ? refresh.union : refresh.layers[layer];
  return packed === undefined ? [] : unpackRuns(packed);
}

function refreshMost(trace, refresh, layer) {
  return layer === "all" ? refresh.heads_total : trace.kv_heads;
}

function historyCounts(trace, refresh, layer) {
  const counts = new Uint16Array(trace.history_tokens);
  for (const [start, length, times] of refreshRuns(refresh, layer)) counts.fill(times, start, start + length);
  return counts;
}

// ---------------------------------------------------------------- text
class HistoryText {
  constructor(trace) {
    this.trace = trace;
    this.spans = new Array(trace.history_tokens);
    this.codes = new Uint8Array(trace.history_tokens);
    this.places = new WeakMap();
    this.chunks = [];
    this.spot = -1;
    this.counts = new Uint16Array(trace.history_tokens);
    this.node = make("div", { class: "tokens box", id: "history-text", tabindex: 0, role: "region", "aria-label": "History with selected tokens marked" });
    this.addTexts(trace.texts);
    this.node.addEventListener("mousemove", (event) => this.hover(event));
    this.node.addEventListener("mouseleave", tip.hide);
  }

  // Chunks end at line breaks where possible: the browser lays out only those in sight.
  addTexts(stretches) {
    let chunk = null;
    let long = 0;
    let end = 0;
    for (const [start, texts] of stretches) {
      texts.forEach((text, index) => {
        const position = start + index;
        if (!chunk) {
          chunk = { start: position, end: position, node: make("div", { class: "chunk" }) };
          this.chunks.push(chunk);
          this.node.append(chunk.node);
          long = 0;
        }
        if (position > end) chunk.node.append(make("span", { class: "left-out" }, `\u22ef${count(position - end)} not shown\u22ef`));
        const span = make("span", { class: "t" }, tokenNodes(text, true));
        this.spans[position] = span;
        this.places.set(span, position);
        chunk.node.append(span);
        end = position + 1;
        chunk.end = end;
        long += 1;
        if ((text.includes("\n") && long >= CHUNK_TOKENS) || long >= CHUNK_TOKENS_HARD) chunk = null;
      });
    }
  }

  paint(refresh, layer) {
    const { trace } = this;
    this.counts = refresh ? historyCounts(trace, refresh, layer) : new Uint16Array(trace.history_tokens);
    this.most = refresh ? refreshMost(trace, refresh, layer) : 1;
    const seen = refresh ? refresh.history_tokens : trace.history_tokens;
    const recent = known(trace.recent_tokens) && refresh ? seen - trace.recent_tokens : seen;
    for (let position = 0; position < trace.history_tokens; position += 1) {
      const span = this.spans[position];
      if (!span) continue;
      let code = Math.min(LEVELS, Math.ceil((LEVELS * this.counts[position]) / this.most));
      if (position >= seen) code |= LATER;
      else if (refresh && known(trace.sink_tokens) && position < trace.sink_tokens) code |= SINK;
      else if (position >= recent) code |= RECENT;
      if (position >= trace.prompt_tokens) code |= MADE;
      if (code === this.codes[position] && position !== this.spot) continue;
      this.codes[position] = code;
      span.className = this.classes(code);
    }
    this.refresh = refresh;
    this.spot = -1;
  }

  classes(code) {
    const names = ["t"];
    if (code & 7) names.push(`s${code & 7}`);
    if (code & LATER) names.push("later");
    if (code & SINK) names.push("sink");
    if (code & RECENT) names.push("recent");
    if (code & MADE) names.push("made");
    return names.join(" ");
  }

  hover(event) {
    const span = event.target.closest(".t");
    const position = span ? this.places.get(span) : undefined;
    if (position === undefined) {
      tip.hide();
      return;
    }
    const code = this.codes[position];
    const role = code & LATER ? "not there yet" : code & SINK ? "sink" : code & RECENT ? "recent" : this.counts[position] ? "selected" : "out of sight";
    tip.show(event, spoken(span.textContent), [
      ["position", count(position)],
      ["state", role],
      ...(this.refresh ? [["selected by", `${this.counts[position]} of ${this.most}`]] : []),
    ]);
  }

  scrollTo(position) {
    let at = position;
    while (at > 0 && !this.spans[at]) at -= 1;
    const span = this.spans[at];
    if (!span) return;
    this.spans[this.spot]?.classList.remove("spot");
    span.classList.add("spot");
    this.spot = at;
    const box = this.node.getBoundingClientRect();
    const top = span.getBoundingClientRect().top - box.top;
    this.node.scrollTop += top - this.node.clientHeight / 3;
  }

  // First and last position in sight, by whole chunks.
  inSight() {
    const box = this.node.getBoundingClientRect();
    const visible = this.chunks.filter((chunk) => {
      const own = chunk.node.getBoundingClientRect();
      return own.bottom > box.top && own.top < box.bottom;
    });
    return visible.length ? [visible[0].start, visible[visible.length - 1].end] : [0, 0];
  }
}

// ---------------------------------------------------------------- maps
// Rows of counts over positions: one line per row, one column per pixel, the strongest token of a
// column shows. `rows`: [{runs, most, end, chosen}]; positions from `end` on did not exist yet.
function paintMap(canvas, trace, rows, rowHeight) {
  const ratio = Math.min(2, window.devicePixelRatio || 1);
  const width = Math.max(1, Math.floor(canvas.clientWidth * ratio));
  const tall = Math.round(rowHeight * ratio);
  canvas.width = width;
  canvas.height = tall * rows.length;
  canvas.style.height = `${rowHeight * rows.length}px`;
  const context = canvas.getContext("2d");
  const styles = getComputedStyle(document.documentElement);
  const [red, green, blue] = styles.getPropertyValue("--select").split(",").map(Number);
  const per = trace.history_tokens / width;
  rows.forEach((row, line) => {
    const columns = new Float32Array(width);
    for (const [start, length, times] of row.runs) {
      const last = Math.min(width - 1, Math.floor((start + length - 1) / per));
      for (let column = Math.floor(start / per); column <= last; column += 1) columns[column] = Math.max(columns[column], times / row.most);
    }
    const top = line * tall;
    const gap = tall > 6 * ratio ? Math.ceil(ratio) : 0;
    if (row.end < trace.history_tokens) {
      context.fillStyle = styles.getPropertyValue("--card");
      context.fillRect(Math.ceil(row.end / per), top, width, tall);
    }
    columns.forEach((value, column) => {
      if (!value) return;
      context.fillStyle = `rgba(${red},${green},${blue},${0.3 + 0.7 * value})`;
      context.fillRect(column, top, 1, tall - gap);
    });
    if (row.chosen) {
      context.strokeStyle = styles.getPropertyValue("--ink");
      context.lineWidth = ratio;
      context.strokeRect(ratio / 2, top + ratio / 2, width - ratio, tall - ratio);
    }
  });
  context.fillStyle = styles.getPropertyValue("--accent");
  context.fillRect(Math.round(trace.prompt_tokens / per), 0, ratio, canvas.height);
}

function mapPlace(event, canvas, trace, rows) {
  const box = canvas.getBoundingClientRect();
  const position = Math.floor(((event.clientX - box.left) / box.width) * trace.history_tokens);
  const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
  return { position: Math.max(0, Math.min(trace.history_tokens - 1, position)), row: Math.max(0, Math.min(rows - 1, row)) };
}

// Stretches of tokens that at least `least` selected, with gaps of up to two tokens.
function passages(counts, seen, least) {
  const found = [];
  let open = null;
  let last = -3;
  for (let position = 0; position < seen; position += 1) {
    if (counts[position] < least) continue;
    if (!open || position - last > 2) {
      open = { start: position, end: position + 1, weight: 0 };
      found.push(open);
    }
    open.end = position + 1;
    open.weight += counts[position];
    last = position;
  }
  return found.sort((a, b) => b.weight - a.weight || a.start - b.start);
}
