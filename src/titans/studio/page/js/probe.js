// One token: what the memory was told for it, and what it returns for its key as it reads on.

import { byId, context, count, h, number, palette } from "./dom.js";
import { spoken } from "./reading.js";
import { api, studio } from "./studio.js";

export class ProbePanel {
  constructor(pane) {
    this.pane = pane;
    this.body = byId("token-body");
    pane.addEventListener("probe", () => this.probe());
    addEventListener("themechange", () => this.draw());
    studio.addEventListener("session-changed", () => this.offer());
    studio.addEventListener("busy", () => {
      if (this.result && !studio.busy)
        this.probe(); // more was read since
      else this.offer();
    });
    new ResizeObserver(() => this.draw()).observe(this.body);
    this.clear();
  }

  clear() {
    this.current?.abort();
    this.current = null;
    this.result = null;
    this.offer();
  }

  cancel() {
    this.clear();
    this.pane.scroller.focus({ preventScroll: true });
  }

  /** Before a token is chosen: what this is for, and tokens that were written. */
  offer() {
    if (this.current) return;
    const facts = studio.busy ? [] : studio.log.facts();
    this.body.replaceChildren(
      h(
        "p",
        { class: "help" },
        "Click a token in the text: what does the memory return for its key now, and how did that fade as more was read?",
      ),
      h(
        "div",
        { class: "suggestions", role: "group", "aria-label": "Tokens to probe" },
        facts.map((fact) =>
          h(
            "button",
            { class: "suggestion", type: "button", onclick: () => this.pick(fact) },
            `«${fact.name}: `,
            h("b", {}, fact.value[0]),
          ),
        ),
      ),
    );
  }

  /** The first character of a fact's code. */
  pick(fact) {
    this.pane.choose(studio.log.tokenAt(fact.offset + fact.size - 1 - fact.value.length));
    this.probe();
  }

  async probe() {
    const index = this.pane.cursor;
    if (index === null || studio.busy) return;
    this.current?.abort();
    const current = (this.current = new AbortController());
    this.result = null;
    this.body.replaceChildren(
      this.head(index),
      h(
        "div",
        { class: "row" },
        h("p", { class: "busy" }, "Reading the text again …"),
        h("button", { class: "small", type: "button", onclick: () => this.cancel() }, "Cancel"),
      ),
    );
    try {
      const result = await api.probe(
        studio.session.id,
        { index: index + studio.log.skipped },
        current.signal,
      );
      this.show(index, result);
    } catch (error) {
      if (error.name === "AbortError" || studio.closed(error)) return;
      this.body.replaceChildren(
        this.head(index),
        h("p", { class: "notice bad", role: "alert" }, error.message),
      );
    }
  }

  head(index) {
    const { log } = studio;
    const rate = log.written.values[index];
    const nats = log.nats.values[index];
    return h(
      "dl",
      { class: "facts" },
      h("dt", {}, "Token"),
      h(
        "dd",
        {},
        h("span", { class: "glyph" }, spoken(log.text[index])),
        ` at ${count(index + log.first)}`,
      ),
      h("dt", {}, "Surprise of the model"),
      h("dd", {}, Number.isNaN(nats) ? "–" : `${number(nats / Math.LN2)} bits`),
      h("dt", {}, "Surprise of the memory, mean"),
      h("dd", {}, number(log.surprise.values[index])),
      h("dt", {}, "Written"),
      h(
        "dd",
        { class: rate > 0 ? "kept" : "" },
        rate > 0 ? `yes, θ up to ${number(rate)}` : "no, the gates were shut",
      ),
    );
  }

  show(index, result) {
    this.result = result;
    const rows = result.memories.flatMap((memory, m) =>
      memory.map((head, i) =>
        h(
          "tr",
          { dataset: { memory: m, head: i } },
          h(
            "th",
            { scope: "row" },
            h("i", {
              class: `swatch series-${(rank(result, m, i) % 8) + 1}`,
              "aria-hidden": "true",
            }),
            ` layer ${m + 1}, head ${i + 1}`,
          ),
          h("td", { class: "n" }, number(head.learning_rate)),
          h("td", { class: "n" }, number(head.then)),
          h("td", { class: "n" }, number(head.now)),
        ),
      ),
    );
    const table = h(
      "table",
      {},
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          h("th", { scope: "col" }, "Memory"),
          h("th", { scope: "col", class: "n" }, "θ"),
          h("th", { scope: "col", class: "n" }, "then"),
          h("th", { scope: "col", class: "n" }, "now"),
        ),
      ),
      h("tbody", {}, rows),
    );
    this.canvas = h("canvas", { class: "plot", role: "img", "aria-label": this.describe(result) });
    this.body.replaceChildren(
      this.head(index),
      h(
        "p",
        { class: "help" },
        "Recall: the cosine between what the memory returns for this token’s key, ",
        h("span", { class: "math" }, "M(k)"),
        ", and the value it was told, ",
        h("span", { class: "math" }, "v"),
        ". 1 is perfect.",
      ),
      table,
      h(
        "figure",
        {},
        this.canvas,
        h("figcaption", { class: "help" }, "Recall from just after the token to now"),
      ),
    );
    this.draw();
  }

  describe(result) {
    const parts = result.memories.flatMap((memory, m) =>
      memory.map(
        (head, i) =>
          `layer ${m + 1}, head ${i + 1}: ${number(head.then)} then, ${number(head.now)} now`,
      ),
    );
    return `Recall as more is read. ${parts.join("; ")}`;
  }

  draw() {
    if (!this.result || !this.canvas?.clientWidth) return;
    const { positions, memories } = this.result;
    const [width, height] = [this.canvas.clientWidth, this.canvas.clientHeight];
    const drawing = context(this.canvas, width, height);
    const colours = palette();
    const [left, right, top, bottom] = [34, 6, 8, 20];
    const first = positions[0];
    const span = Math.max(1, positions[positions.length - 1] - first);
    const low = Math.min(0, ...memories.flat().flatMap((head) => head.curve)) < -0.1 ? -1 : 0;
    const x = (position) => left + ((position - first) / span) * (width - left - right);
    const y = (value) => top + ((1 - value) / (1 - low)) * (height - top - bottom);
    drawing.font = "11px system-ui, sans-serif";
    drawing.fillStyle = colours.muted;
    drawing.textBaseline = "middle";
    drawing.textAlign = "right";
    for (const value of low ? [-1, 0, 1] : [0, 1]) {
      drawing.fillText(String(value), left - 8, y(value));
      drawing.strokeStyle = colours.line;
      drawing.beginPath();
      drawing.moveTo(left, Math.round(y(value)) + 0.5);
      drawing.lineTo(width, Math.round(y(value)) + 0.5);
      drawing.stroke();
    }
    drawing.textBaseline = "alphabetic";
    drawing.textAlign = "left";
    drawing.fillText(count(first), left, height - 4);
    drawing.textAlign = "right";
    drawing.fillText(`${count(positions[positions.length - 1])} tokens`, width - right, height - 4);
    memories.forEach((memory, m) =>
      memory.forEach((head, i) => {
        drawing.strokeStyle = colours.series[rank(this.result, m, i) % 8];
        drawing.lineWidth = head.learning_rate > 0 ? 2 : 1;
        drawing.beginPath();
        head.curve.forEach((value, k) =>
          drawing[k ? "lineTo" : "moveTo"](x(positions[k]), y(value)),
        );
        if (positions.length === 1) drawing.lineTo(width - right, y(head.curve[0]));
        drawing.stroke();
      }),
    );
  }
}

/** Place of a head among all heads: its colour, as in the curves. */
function rank(result, memory, head) {
  return result.memories.slice(0, memory).reduce((sum, heads) => sum + heads.length, 0) + head;
}
