// Curves of what the memory did: one row per quantity, one line per memory and head.

import { byId, context, count, h, number, palette } from "./dom.js";
import { QUANTITIES } from "./log.js";

const HEIGHT = 84;
const GUTTER = 52; // room for the numbers of the axis
const AROUND = 200; // tokens each side of the chosen one when zoomed in

/** In plain words, with the paper's symbol. */
const ABOUT = {
  surprise: ["Momentary surprise", "|∇ℓ|", "How far the memory's own guess was from what came."],
  past_surprise: [
    "Past surprise",
    "|S|",
    "What is left of earlier surprises and still being written.",
  ],
  learning_rate: [
    "Learning rate",
    "θ",
    "How much of this surprise is written. 0: the gate is shut.",
  ],
  momentum: ["Momentum", "η", "How much past surprise is carried on to the next token."],
  decay: ["Forgetting", "α", "The share of the memory let go before the write."],
  moved: [
    "Distance moved",
    "|M − M₀|",
    "How far the weights have moved from where training left them.",
  ],
};

const NONE = {
  past_surprise: "none: this model was trained without momentum, so a surprise is written at once.",
  momentum: null,
  decay: "none: this model never forgets on purpose.",
};

export class Charts extends EventTarget {
  /** Event "pick" with the position that was clicked. */
  constructor(log) {
    super();
    this.log = log;
    this.root = byId("charts");
    this.legend = byId("chart-legend");
    this.note = byId("chart-note");
    this.hidden = new Set();
    this.cursor = null;
    this.zoom = "all";
    this.layer = null;
    this.rows = [];
    new ResizeObserver(() => this.draw()).observe(this.root);
    for (const button of byId("chart-zoom").querySelectorAll("input")) {
      button.addEventListener("change", () => {
        this.zoom = button.value;
        this.draw();
      });
    }
  }

  /** Rows for the quantities that this model has. */
  build() {
    const lines = this.log.lines;
    this.root.replaceChildren();
    this.rows = [];
    this.legend.replaceChildren();
    this.note.textContent = "";
    if (!lines) return;
    const missing = [];
    for (const name of QUANTITIES) {
      const [title, symbol, text] = ABOUT[name];
      if (!lines[name]) {
        if (NONE[name]) missing.push(`${title} (${symbol}): ${NONE[name]}`);
        continue;
      }
      const canvas = h("canvas", { role: "img", dataset: { quantity: name } });
      const value = h("output", { class: "chart-value" });
      const label = h(
        "div",
        { class: "chart-label" },
        h("h3", {}, title, " ", h("var", {}, symbol)),
        h("p", {}, text),
      );
      this.root.append(
        h("div", { class: "chart" }, label, h("div", { class: "chart-plot" }, canvas, value)),
      );
      canvas.addEventListener("pointermove", (event) => this.hover(event, canvas));
      canvas.addEventListener("pointerleave", () => this.hover(null));
      canvas.addEventListener("click", (event) => this.pick(event, canvas));
      this.rows.push({ name, title, canvas, value, lines: lines[name] });
    }
    this.note.textContent = missing.join(" ");
    this.buildLegend(lines.surprise);
  }

  /** One button per line; of deep models one memory at a time. */
  buildLegend(memories) {
    const heads = memories.reduce((sum, memory) => sum + memory.length, 0);
    this.layer = heads > 8 ? 0 : null;
    if (this.layer !== null) {
      const choose = h("select", { "aria-label": "Memory whose heads are drawn" });
      memories.forEach((_, m) => choose.append(h("option", { value: m }, `Layer ${m + 1}`)));
      choose.addEventListener("change", () => {
        this.layer = Number(choose.value);
        this.buildButtons(memories);
        this.draw();
      });
      this.legend.append(choose);
    }
    this.buttons = h("div", { class: "legend-buttons" });
    this.legend.append(this.buttons);
    this.buildButtons(memories);
  }

  buildButtons(memories) {
    this.keys = [];
    this.hidden.clear();
    memories.forEach((memory, m) => {
      if (this.layer !== null && m !== this.layer) return;
      memory.forEach((_, head) =>
        this.keys.push({ m, head, name: `layer ${m + 1}, head ${head + 1}` }),
      );
    });
    this.buttons.replaceChildren(
      ...this.keys.map((key, index) => {
        const button = h(
          "button",
          { class: "legend-key", type: "button", "aria-pressed": "true" },
          h("i", { class: `swatch series-${(index % 8) + 1}`, "aria-hidden": "true" }),
          key.name,
        );
        button.addEventListener("click", () => {
          const shown = this.hidden.delete(index) || !this.hidden.add(index);
          button.setAttribute("aria-pressed", String(shown));
          this.draw();
        });
        return button;
      }),
    );
  }

  /** The positions in view, [from, to). */
  window() {
    const end = Math.max(this.log.length, 1);
    if (this.zoom === "all" || end <= 2 * AROUND) return [0, Math.max(end, 64)];
    const from = Math.max(0, Math.min((this.cursor ?? end) - AROUND, end - 2 * AROUND));
    return [from, from + 2 * AROUND];
  }

  draw() {
    if (this.log.lines && !this.rows.length) this.build();
    const colours = palette();
    this.rows.forEach((row, index) => this.drawRow(row, colours, index === this.rows.length - 1));
  }

  drawRow(row, colours, last) {
    const width = row.canvas.clientWidth;
    if (!width) return;
    const height = HEIGHT + (last ? 18 : 0);
    row.canvas.style.height = `${height}px`;
    const drawing = context(row.canvas, width, height);
    const [from, to] = this.window();
    const x = (position) => GUTTER + ((position - from) / (to - from)) * (width - GUTTER - 1);
    const shown = this.keys.map((key, i) => ({ ...key, i })).filter(({ i }) => !this.hidden.has(i));
    const top = Math.max(1e-9, ...shown.map(({ m, head }) => row.lines[m][head].largest));
    const y = (value) => HEIGHT - 4 - (value / top) * (HEIGHT - 18);
    this.axis(drawing, colours, width, top, y);
    for (const { m, head, i } of shown) {
      drawing.strokeStyle = drawing.fillStyle = colours.series[i % 8];
      drawing.lineWidth = 1.4;
      const line = row.lines[m][head];
      if (line.at instanceof Array) steps(drawing, line, x, y, from, to, this.log.first);
      else curve(drawing, line, x, y, from, to, width - GUTTER, row.name === "surprise");
    }
    const at = this.hovered ?? this.cursor;
    if (at !== null && at !== undefined && at >= from && at < to) {
      drawing.strokeStyle = colours.muted;
      drawing.lineWidth = 1;
      drawing.beginPath();
      drawing.moveTo(x(at + 0.5), 0);
      drawing.lineTo(x(at + 0.5), HEIGHT - 4);
      drawing.stroke();
    }
    if (last) this.positions(drawing, colours, width, from, to);
    const values = shown.map(({ m, head }) => valueAt(row.lines[m][head], at));
    row.value.replaceChildren(
      ...(at === null || at === undefined ? [] : values).map((value, k) =>
        h("span", { class: `series-${(shown[k].i % 8) + 1}` }, number(value)),
      ),
    );
    row.canvas.setAttribute("aria-label", this.describe(row, shown));
  }

  axis(drawing, colours, width, top, y) {
    drawing.font = "11px system-ui, sans-serif";
    drawing.fillStyle = colours.muted;
    drawing.textAlign = "right";
    drawing.textBaseline = "middle";
    for (const value of [0, top]) {
      const at = Math.round(y(value)) + 0.5;
      drawing.fillText(number(value), GUTTER - 8, Math.max(7, at));
      drawing.strokeStyle = colours.line;
      drawing.lineWidth = 1;
      drawing.beginPath();
      drawing.moveTo(GUTTER, at);
      drawing.lineTo(width, at);
      drawing.stroke();
    }
  }

  positions(drawing, colours, width, from, to) {
    drawing.fillStyle = colours.muted;
    drawing.textBaseline = "top";
    const labels = [
      [from, "left"],
      [(from + to) / 2, "center"],
      [to, "right"],
    ];
    for (const [position, align] of labels) {
      drawing.textAlign = align;
      const at = GUTTER + ((position - from) / (to - from)) * (width - GUTTER - 1);
      const shown = count(this.log.first + position);
      drawing.fillText(align === "right" ? `${shown} tokens` : shown, at, HEIGHT + 2);
    }
  }

  describe(row, shown) {
    const parts = shown.map(
      ({ m, head, name }) => `${name} up to ${number(row.lines[m][head].largest)}`,
    );
    return `${row.title} over ${count(this.log.length)} tokens: ${parts.join("; ")}`;
  }

  position(event, canvas) {
    const box = canvas.getBoundingClientRect();
    const [from, to] = this.window();
    const share = (event.clientX - box.left - GUTTER) / (box.width - GUTTER - 1);
    const position = Math.floor(from + share * (to - from));
    return position >= 0 && position < this.log.length ? position : null;
  }

  hover(event, canvas) {
    this.hovered = event ? this.position(event, canvas) : null;
    this.draw();
  }

  pick(event, canvas) {
    const position = this.position(event, canvas);
    if (position !== null) this.dispatchEvent(Object.assign(new Event("pick"), { position }));
  }

  point(cursor) {
    this.cursor = cursor;
    this.draw();
  }
}

/** A line. Where tokens are denser than pixels: their largest, or, for what is never still, their
 * mean in a band from least to most. */
function curve(drawing, line, x, y, from, to, pixels, band) {
  const end = Math.min(to, line.length);
  const step = Math.max(1, (2 * (to - from)) / pixels);
  const [middle, low, high] = [[], [], []];
  for (let position = from; position < end; position += step) {
    const [least, most, mean] = line.range(position, Math.min(position + step, end));
    const at = x(position + step / 2);
    middle.push([at, y(band ? mean : most)]);
    low.push([at, y(least)]);
    high.push([at, y(most)]);
  }
  if (step > 1 && band) {
    drawing.globalAlpha = 0.22;
    trace(drawing, [...high, ...low.reverse()]);
    drawing.fill();
    drawing.globalAlpha = 1;
  }
  trace(drawing, middle);
  drawing.stroke();
}

/** Values at piece ends, from 0 before the first token; where that had position `first`, and so
 * more was read before it, from the first that is known. */
function steps(drawing, points, x, y, from, to, first) {
  const before = from || !first ? valueAt(points, from - 1) : points.values[0];
  const path = before === undefined ? [] : [[x(from), y(before)]];
  for (let i = 0; i < points.at.length; i++) {
    if (points.at[i] >= from) path.push([x(points.at[i]), y(points.values[i])]);
    if (points.at[i] > to) break;
  }
  trace(drawing, path);
  drawing.stroke();
}

function trace(drawing, path) {
  drawing.beginPath();
  path.forEach(([x, y], i) => drawing[i ? "lineTo" : "moveTo"](x, y));
}

/** At a token: of values per piece, the one at the end of its piece; before all tokens 0. */
function valueAt(line, position) {
  if (position === null || position === undefined) return NaN;
  if (!(line.at instanceof Array)) return line.at(position);
  if (position < 0) return 0;
  const index = line.at.findIndex((end) => end > position);
  return index < 0 ? line.last : line.values[index];
}
