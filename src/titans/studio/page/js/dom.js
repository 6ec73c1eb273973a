// Building elements, and writing numbers the same way everywhere.

/** h("button", {class: "quiet", onclick: f}, "Read"): an element with attributes and children. */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "dataset") Object.assign(element.dataset, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** 12,345 */
export const count = (n) => Math.round(n).toLocaleString("en-US");

/** "1 token", "12 tokens" */
export const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;

/** 127 KB; what would round to 1000 of a unit is 1.00 of the next. */
export function bytes(n) {
  if (n < 1000) return `${n} B`;
  if (n < 999.5e3) return `${(n / 1e3).toPrecision(3)} KB`;
  return n < 999.5e6 ? `${(n / 1e6).toPrecision(3)} MB` : `${(n / 1e9).toPrecision(3)} GB`;
}

const LONGEST_NAME = 200; // characters that the server takes

/** A name with something behind it, cut in front of that where it would be too long. */
export function named(name, behind) {
  return [...name].slice(0, LONGEST_NAME - behind.length).join("") + behind;
}

/** Three significant digits, in words where there is no number. */
export function number(x) {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 999.5 && size < 1e6) return count(x);
  if (size >= 0.001 && size < 999.5) return x.toPrecision(3);
  const [digits, power] = x.toExponential(1).split("e");
  return `${digits}·10${[...String(Number(power))].map((c) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[c] ?? "⁻").join("")}`;
}

/** One line that a screen reader speaks. */
export function announce(message) {
  byId("announcer").textContent = message;
}

/** Is motion welcome? */
export const motion = () => !matchMedia("(prefers-reduced-motion: reduce)").matches;

/** Colours of the style sheet, for canvases. */
export function palette() {
  const style = getComputedStyle(document.documentElement);
  const read = (name) => style.getPropertyValue(name).trim();
  return {
    ink: read("--ink"),
    muted: read("--muted"),
    line: read("--line"),
    card: read("--card"),
    accent: read("--accent"),
    negative: read("--negative"),
    positive: read("--positive"),
    series: [1, 2, 3, 4, 5, 6, 7, 8].map((i) => read(`--series-${i}`)),
  };
}

/** A canvas as sharp as the screen: its 2-D context in CSS pixels, cleared. */
export function context(canvas, width, height) {
  const ratio = devicePixelRatio || 1;
  const [w, t] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== w || canvas.height !== t) Object.assign(canvas, { width: w, height: t });
  const drawing = canvas.getContext("2d");
  drawing.setTransform(ratio, 0, 0, ratio, 0, 0);
  drawing.clearRect(0, 0, width, height);
  return drawing;
}
