// Elements, numbers and the tooltip. Text enters the page as text nodes only, never as markup.
const SVG_SPACE = "http://www.w3.org/2000/svg";
const MISSING = "\u2013";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") {
      for (const [event, action] of Object.entries(value)) node.addEventListener(event, action);
    } else if (name === "style") {
      for (const [key, text] of Object.entries(value)) node.style.setProperty(key, text);
    } else {
      node.setAttribute(name, value === true ? "" : String(value));
    }
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

function make(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function draw(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG_SPACE, tag), attributes, children);
}

function byId(id) {
  return document.getElementById(id);
}

function known(value) {
  return value !== null && value !== undefined && Number.isFinite(value);
}

function count(value) {
  return known(value) ? Math.round(value).toLocaleString("en-US") : MISSING;
}

function fixed(value, digits) {
  return known(value) ? value.toFixed(digits) : MISSING;
}

function share(value) {
  return fixed(value, 3);
}

// Bounds of a share at 95 % (Wilson, 1927); null where nothing was counted.
function wilson(right, total) {
  if (!known(right) || !known(total) || total < 1) return null;
  const z = 1.959963984540054;
  const mean = right / total;
  const scale = 1 + (z * z) / total;
  const center = (mean + (z * z) / (2 * total)) / scale;
  const half = (z / scale) * Math.sqrt((mean * (1 - mean)) / total + (z * z) / (4 * total * total));
  return { mean, low: right === 0 ? 0 : center - half, high: right === total ? 1 : center + half };
}

function clip(text, length) {
  return text.length > length ? `${text.slice(0, length - 1)}\u2026` : text;
}

// Names of policies often differ at their end alone, so both ends stay.
function clipName(text, length) {
  if (text.length <= length) return text;
  const tail = Math.floor((length - 1) * 0.45);
  return `${text.slice(0, length - 1 - tail)}\u2026${text.slice(text.length - tail)}`;
}

// Width of a text in a chart, in pixels; `size` in pixels.
const ruler = document.createElement("canvas").getContext("2d");

function textWidth(text, size) {
  ruler.font = `${size}px ${getComputedStyle(document.body).fontFamily}`;
  return ruler.measureText(text).width;
}

// The longest form of a name that fits.
function fitName(text, width, size) {
  let length = text.length;
  while (length > 4 && textWidth(clipName(text, length), size) > width) length -= 1;
  return clipName(text, length);
}

function plural(number, one, many) {
  return `${count(number)} ${number === 1 ? one : many}`;
}

// ---- characters that would not be seen, or would turn the text around them
const HIDDEN_CHARACTERS = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/gu;

const CONTROLS = "NUL SOH STX ETX EOT ENQ ACK BEL BS HT LF VT FF CR SO SI DLE DC1 DC2 DC3 DC4 NAK SYN ETB CAN EM SUB ESC FS GS RS US".split(" ");

function codeName(character) {
  const code = character.codePointAt(0);
  if (code < 32) return `\u2039${CONTROLS[code]}\u203a`;
  return `\u2039U+${code.toString(16).toUpperCase().padStart(4, "0")}\u203a`;
}

function spoken(text) {
  if (text === "") return "(empty)";
  const shown = text.replace(/\n/g, "\u23ce").replace(/\t/g, "\u21e5").replace(HIDDEN_CHARACTERS, codeName);
  return shown.trim() === "" ? shown.replace(/ /g, "\u2423") : shown;
}

// A token's text as child nodes; line breaks show a mark and break when asked to.
function tokenNodes(text, breaks) {
  if (/^[\x20-\x7e]+$/.test(text)) return [text];
  if (text === "") return [make("span", { class: "odd" }, "\u2205")];
  const nodes = [];
  for (const part of text.split(/(\n|\t)/)) {
    if (part === "\n") nodes.push(make("span", { class: "odd" }, "\u23ce"), breaks ? "\n" : "");
    else if (part === "\t") nodes.push(make("span", { class: "odd" }, "\u21e5"), "\t");
    else if (part) nodes.push(part.replace(HIDDEN_CHARACTERS, codeName));
  }
  return nodes;
}

// ---- tooltip: a title and pairs of name and value
const tip = {
  show(event, title, pairs) {
    const box = byId("tip");
    box.replaceChildren(
      make("b", {}, title),
      make("dl", {}, pairs.map(([name, value]) => [make("dt", {}, name), make("dd", {}, value)])),
    );
    box.hidden = false;
    const around = event.target.getBoundingClientRect();
    const pointed = event.type.startsWith("mouse") || event.type.startsWith("pointer");
    const x = pointed ? event.clientX : around.right;
    const y = pointed ? event.clientY : around.bottom;
    const room = 12;
    const left = Math.min(x + room, window.innerWidth - box.offsetWidth - room);
    const below = y + room + box.offsetHeight < window.innerHeight;
    box.style.left = `${Math.max(room, left)}px`;
    box.style.top = `${Math.max(room, below ? y + room : y - room - box.offsetHeight)}px`;
  },
  hide() {
    byId("tip").hidden = true;
  },
};

function onHover(title, pairs) {
  const show = (event) => tip.show(event, typeof title === "function" ? title() : title, pairs());
  return { mouseenter: show, mousemove: show, mouseleave: tip.hide, focus: show, blur: tip.hide };
}

// Calls `paint(width)` now and whenever the width of a box changes.
function onWidth(box, paint) {
  let last = 0;
  const look = () => {
    const width = Math.floor(box.clientWidth);
    if (width > 0 && width !== last) {
      last = width;
      paint(width);
    }
  };
  new ResizeObserver(look).observe(box);
  look();
}
