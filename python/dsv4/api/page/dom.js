// Elements without HTML: what is written into them is text, whatever it looks like.

function make(element, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (typeof value === "function") element.addEventListener(name, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** An element: `h("p", {class: "note", click: f}, "text", child)`. */
export const h = (tag, props = {}, ...children) => make(document.createElement(tag), props, children);

/** The same in SVG. */
export const svg = (tag, props = {}, ...children) =>
  make(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);

export const $ = (id) => document.getElementById(id);

const number = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const digits = [0, 1, 2].map((n) => new Intl.NumberFormat("en", { minimumFractionDigits: n, maximumFractionDigits: n }));

/** 1,234 */
export const count = (n) => number.format(n);

/** Three digits that count: 0.12, 3.4, 128 */
export const figure = (n) => digits[n >= 100 || n === 0 ? 0 : n >= 10 ? 1 : 2].format(n);

/** 1.2 GiB */
export function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; n >= 1024 && unit < units.length - 1; unit++) n /= 1024;
  return `${unit ? figure(n) : count(n)} ${units[unit]}`;
}

/** 12.0 ms, 3.40 s */
export const brief = (seconds) => (seconds < 1 ? `${figure(1000 * seconds)} ms` : `${figure(seconds)} s`);

/** 2 h 5 min */
export function span(seconds) {
  const s = Math.round(seconds);
  if (s < 90) return `${s} s`;
  if (s < 5400) return `${Math.round(s / 60)} min`;
  return s < 172800 ? `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min` : `${Math.floor(s / 86400)} days`;
}

/** A button that puts `text()` on the clipboard. */
export function copyButton(text, label = "Copy") {
  const button = h("button", { type: "button", class: "quiet", click: copy }, label);
  async function copy() {
    let said = "Copied";
    try {
      await navigator.clipboard.writeText(text());
    } catch {
      said = copyBySelection(text()) ? "Copied" : "Not allowed";
    }
    button.textContent = said;
    setTimeout(() => (button.textContent = label), 1500);
  }
  return button;
}

// Browsers have no clipboard on plain http beyond this machine.
function copyBySelection(text) {
  const field = h("textarea", { class: "unseen" });
  field.value = text;
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  return done;
}
