// One token's write, term by term, on the numbers of the model: an explanation to step through.

import { byId, context, h, number, palette } from "./dom.js";
import { visible } from "./reading.js";
import { api, studio } from "./studio.js";

const STRIP = 44; // height of a vector
const SAMPLE = "# a note «baku: 4821» in code\n";

// Each step: title, the terms of the equation that it is about, what it says, what it shows.
const STEPS = [
  {
    title: "Key, value, query",
    on: ["k", "v", "q"],
    text: () =>
      "From the token and its neighbours the layer makes a key to store under, a value to store, and a query to ask with. Keys and queries have length 1.",
    show: (token) => [
      vector("k", "Key", token.key),
      vector("v", "Value", token.value),
      vector("q", "Query", token.query),
    ],
  },
  {
    title: "What it says already",
    on: ["recall"],
    text: (token) =>
      `Given the key, the memory answers before it is told. The answer is off by ${number(norm(token.error))}, while the value has length ${number(norm(token.value))}.`,
    show: (token) => [
      vector("M(k)", "The memory’s answer", token.answer),
      vector("v", "The value", token.value),
      vector("M(k) − v", "The error", token.error),
    ],
  },
  {
    title: "Momentary surprise",
    on: ["gradient"],
    text: (token) =>
      `The gradient of the error with respect to the weights: where each weight would have to go. Its norm, ${number(token.surprise)}, is the surprise that colours the text.`,
    show: (token) => token.matrices.map((m) => matrix("∇ℓ", "Gradient", m.gradient)),
  },
  {
    title: "Past surprise",
    on: ["past"],
    text: (token) =>
      token.matrices[0].past_after
        ? `Earlier surprise fades by η = ${number(token.matrices[0].momentum)}, and this one is added at the learning rate θ = ${number(token.matrices[0].learning_rate)}.`
        : `This model was trained without momentum (η = 0), so S is only this token’s surprise, times the learning rate θ = ${number(token.matrices[0].learning_rate)}. ${gate(token)}`,
    show: (token) =>
      token.matrices.flatMap((m) => [
        ...(m.past_before ? [matrix("Sₜ₋₁", "Past surprise before", m.past_before)] : []),
        matrix("Sₜ", "What will be added", m.step),
      ]),
  },
  {
    title: "Forgetting",
    on: ["forget"],
    text: (token) =>
      `A share α = ${number(token.matrices[0].decay ?? 0)} of what it has learned is let go${token.matrices[0].decay ? "" : ": nothing, this time"}. ${studio.model.decay_target === "initial" ? "Forgetting leads back to M₀, what training left it with." : ""}`,
    show: (token) =>
      token.matrices.flatMap((m) => [matrix("Mₜ₋₁ − M₀", "Learned so far", m.before)]),
  },
  {
    title: "Write",
    on: ["write"],
    text: (token) =>
      `The sum is the new memory. These weights moved by ${number(norm(token.matrices.flatMap((m) => m.change.flat())))}.`,
    show: (token) =>
      token.matrices.flatMap((m) => [
        matrix("Mₜ − M₀", "Learned, with this token", m.after),
        matrix("Mₜ − Mₜ₋₁", "The change", m.change),
      ]),
  },
  {
    title: "Read",
    on: ["read"],
    text: (token) =>
      `The memory is asked with the query. Told the key instead, it would now be off by ${number(token.error_after)}; before the write it was ${number(norm(token.error))}.`,
    show: (token) => [
      vector("y", "What the layer reads", token.read),
      vector("q", "The query", token.query),
    ],
  },
];

export class Explain {
  constructor() {
    this.root = byId("explain");
    this.step = 0;
    addEventListener("themechange", () => this.data && this.draw());
  }

  /** Called when the view is opened: the tokens around the one that was chosen on the page. */
  async open(cursor) {
    const { session } = studio;
    this.model = studio.info && studio.model.name;
    const key = `${this.model}:${session?.id}:${session?.tokens_read}:${cursor}`;
    if (key === this.key) return;
    this.key = key;
    this.cursor = session?.tokens_read ? cursor : null;
    this.memory = this.head = undefined; // the server takes the head that writes most
    await this.load();
  }

  async load(token) {
    this.current?.abort();
    const current = (this.current = new AbortController());
    if (!this.data)
      this.root.replaceChildren(this.title(), h("p", { class: "busy" }, "Working it out …"));
    const where =
      this.cursor === null || this.cursor === undefined
        ? { text: SAMPLE, model: this.model }
        : { session: studio.session.id, index: this.cursor + studio.log.skipped };
    try {
      this.data = await api.explain(
        { ...where, memory: this.memory, head: this.head, token },
        current.signal,
      );
      ({ memory: this.memory, head: this.head } = this.data);
      this.build();
    } catch (error) {
      if (error.name === "AbortError") return;
      this.data = this.key = null;
      if (studio.closed(error)) {
        await this.open(null); // the sample
        return;
      }
      this.root.replaceChildren(
        this.title(),
        h("p", { class: "notice bad", role: "alert" }, error.message),
      );
    }
  }

  title() {
    return h("h2", { id: "explain-title" }, "One write, step by step");
  }

  build() {
    const { data } = this;
    const focused = this.root.contains(document.activeElement)
      ? document.activeElement.dataset.key
      : null;
    const picker = (label, count, value, set) => {
      const select = h("select", { dataset: { key: label } });
      for (let i = 0; i < count; i++)
        select.append(h("option", { value: i, selected: i === value }, String(i + 1)));
      select.addEventListener("change", () => {
        set(Number(select.value));
        this.load(data.token);
      });
      return h("label", { class: "field" }, h("span", {}, label), select);
    };
    const strip = h("div", {
      class: "strip",
      role: "group",
      "aria-label": "Token whose write is shown",
    });
    data.tokens.forEach((text, t) => {
      const written = data.learning_rate[t] > 0;
      strip.append(
        h(
          "button",
          {
            type: "button",
            class: written ? "written" : "",
            "aria-pressed": String(t === data.token),
            "aria-label": `${text === " " ? "space" : text === "\n" ? "line end" : text}${written ? ", written" : ""}`,
            dataset: { key: `token-${t}` },
            onclick: () => this.load(t),
          },
          text === "\n" ? "↵" : text === "" || text === "\ufffd" ? "·" : visible(text),
        ),
      );
    });
    const source =
      this.cursor === null || this.cursor === undefined
        ? "A sample, read by a fresh memory; choose a token in a text to see its own."
        : "From the text that was read, up to the token that you chose.";
    this.steps = h("ol", { class: "steps", "aria-label": "Steps" });
    STEPS.forEach((step, i) => {
      this.steps.append(
        h(
          "li",
          {},
          h(
            "button",
            {
              type: "button",
              dataset: { key: `step-${i}` },
              "aria-current": i === this.step ? "step" : null,
              onclick: () => this.go(i),
            },
            h("i", {}, String(i + 1)),
            h("span", {}, step.title),
          ),
        ),
      );
    });
    this.steps.addEventListener("keydown", (event) => {
      const move = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
      if (!move) return;
      event.preventDefault();
      this.go(Math.max(0, Math.min(STEPS.length - 1, this.step + move)), true);
    });
    this.back = h(
      "button",
      {
        class: "small",
        type: "button",
        dataset: { key: "back" },
        onclick: () => this.go(this.step - 1),
      },
      "Back",
    );
    this.next = h(
      "button",
      {
        class: "small",
        type: "button",
        dataset: { key: "next" },
        onclick: () => this.go(this.step + 1),
      },
      "Next step",
    );
    this.stage = h("div", { class: "stage", "aria-live": "polite" });
    this.root.replaceChildren(
      this.title(),
      h("p", { class: "help" }, `${source} Green tokens are written by this head.`),
      h(
        "div",
        { class: "explain-controls" },
        picker("Layer", studio.model.memories, this.memory, (n) => (this.memory = n)),
        picker("Head", studio.model.heads, this.head, (n) => (this.head = n)),
      ),
      strip,
      h(
        "div",
        { class: "walk" },
        h(
          "div",
          { class: "walk-steps" },
          this.steps,
          h("div", { class: "actions" }, this.back, this.next),
        ),
        h("div", { class: "column" }, equation(STEPS[this.step].on), this.stage),
      ),
      this.chunkNote(),
    );
    this.draw();
    if (focused) this.root.querySelector(`[data-key="${focused}"]`)?.focus();
  }

  chunkNote() {
    const { chunk } = this.data;
    const text =
      chunk === 1
        ? "This model takes the gradient anew at every token (chunks of 1): the exact online rule."
        : `This model takes the gradients of ${chunk} tokens at the weights where their chunk began (eq. 16).`;
    return h("p", { class: "help" }, text);
  }

  go(step, focus = false) {
    this.step = step;
    this.steps.querySelectorAll("button").forEach((button, i) => {
      if (i === step) button.setAttribute("aria-current", "step");
      else button.removeAttribute("aria-current");
      if (i === step && focus) button.focus();
    });
    this.root.querySelector(".equation").replaceWith(equation(STEPS[step].on));
    this.draw();
  }

  draw() {
    const step = STEPS[this.step];
    const token = this.data.detail;
    const tiles = step.show(token);
    const largest = largestOf(tiles.flatMap((tile) => tile.values));
    this.stage.replaceChildren(
      h("p", {}, step.text(token)),
      h(
        "div",
        { class: "tiles" },
        tiles.map((tile) => picture(tile, largest, tiles.length > 2 ? 216 : 320)),
      ),
      h(
        "p",
        { class: "scale" },
        `−${number(largest)}`,
        h("i", { "aria-hidden": "true" }),
        number(largest),
      ),
    );
    this.back.disabled = this.step === 0;
    this.next.disabled = this.step === STEPS.length - 1;
  }
}

// Of values that may be too many to be arguments of a function.
const norm = (values) => Math.sqrt(values.reduce((sum, value) => sum + value * value, 0));
const largestOf = (rows) =>
  rows.flat().reduce((most, value) => Math.max(most, Math.abs(value)), 1e-12);
const vector = (symbol, name, values) => ({ symbol, name, values: [values] });
const matrix = (symbol, name, values) => ({ symbol, name, values });

function gate(token) {
  return token.matrices[0].learning_rate > 0
    ? ""
    : "The gate is shut: nothing of this token is written.";
}

/** S_t = ..., M_t = ..., y_t = ...; the terms of the step are lit. */
function equation(on) {
  const sub = (text) => h("sub", {}, text);
  const term = (name, ...parts) =>
    h("span", { class: `term ${on.includes(name) ? "on" : ""}` }, parts);
  return h(
    "div",
    {
      class: "equation",
      role: "img",
      "aria-label":
        "S t = eta t S t minus 1, minus theta t gradient of the loss of M t minus 1 at k t, v t. M t = 1 minus alpha t times M t minus 1, plus S t. y t = M t of q t.",
    },
    h(
      "div",
      {},
      term("past", "S", sub("t")),
      " = ",
      term("past", "η", sub("t"), " S", sub("t−1")),
      " − ",
      term("past", "θ", sub("t")),
      " ",
      term("gradient", "∇ℓ"),
      " ( ",
      term("recall", "M", sub("t−1")),
      " ; ",
      term("k", "k", sub("t")),
      " , ",
      term("v", "v", sub("t")),
      " )",
    ),
    h(
      "div",
      {},
      term("write", "M", sub("t")),
      " = ",
      term("forget", "( 1 − α", sub("t"), " ) M", sub("t−1")),
      " + ",
      term("write", "S", sub("t")),
    ),
    h(
      "div",
      {},
      term("read", "y", sub("t")),
      " = ",
      term("read", "M", sub("t")),
      " ( ",
      term("q", "q", sub("t")),
      " )",
    ),
  );
}

/** A heat map: blue below zero, orange above; a vector is one row. */
function picture(tile, largest, room) {
  const [rows, columns] = [tile.values.length, tile.values[0].length];
  const one = rows === 1;
  const cell = one
    ? Math.max(3, Math.floor(576 / columns))
    : Math.max(2, Math.floor(room / Math.max(rows, columns)));
  const [width, height] = [columns * cell, one ? STRIP : rows * cell];
  const size = norm(tile.values.flat());
  const canvas = h("canvas", {
    role: "img",
    "aria-label": `${tile.name}: ${rows} by ${columns} numbers, norm ${number(size)}, the largest ${number(largestOf(tile.values))}`,
  });
  canvas.style.width = `${width}px`;
  if (one) canvas.style.height = `${STRIP}px`;
  else canvas.style.aspectRatio = `${columns} / ${rows}`;
  const drawing = context(canvas, width, height);
  const colours = palette();
  tile.values.forEach((row, i) =>
    row.forEach((value, j) => {
      const strength = Math.min(1, Math.sqrt(Math.abs(value) / largest));
      if (strength < 0.02) return;
      drawing.globalAlpha = strength;
      drawing.fillStyle = value < 0 ? colours.negative : colours.positive;
      drawing.fillRect(j * cell, i * cell, cell, one ? STRIP : cell);
    }),
  );
  return h(
    "figure",
    { class: "tile" },
    canvas,
    h(
      "figcaption",
      {},
      h("var", {}, tile.symbol),
      ` ${tile.name} `,
      h("span", {}, `norm ${number(size)}`),
    ),
  );
}
