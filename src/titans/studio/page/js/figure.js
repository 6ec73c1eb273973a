// Where the memory sits in MAC, MAG and MAL: what flows where, stage by stage, beside the equations.

import { byId, h, motion, svg } from "./dom.js";
import { studio } from "./studio.js";

const PAUSE = 2600; // milliseconds a stage is shown

/** A formula as text with _{...} for what stands below, ^{...} for what stands above. */
function formula(text) {
  const place = { _: "sub", "^": "sup" };
  return text
    .split(/([_^]\{[^}]*\})/)
    .map((part) => (/^[_^]\{/.test(part) ? h(place[part[0]], {}, part.slice(2, -1)) : part));
}

// Boxes: [x, y, width, height, label, second line]. Wires: SVG paths between them.
const FIGURES = {
  MAC: {
    name: "Memory as context",
    about:
      "The memory is asked about a segment first; attention then sees what it recalled beside the segment itself.",
    boxes: {
      p: [40, 40, 120, 46, "persistent", "learned, fixed"],
      h: [180, 40, 120, 46, "h", "what it recalls"],
      s: [320, 40, 160, 46, "segment S⁽ᵗ⁾", "C tokens"],
      memory: [540, 96, 120, 74, "memory M", "weights"],
      attention: [180, 190, 300, 50, "attention", "within the segment"],
      y: [270, 284, 120, 42, "y", ""],
      out: [525, 284, 150, 42, "o = y ⊗ M(y)", ""],
    },
    wires: {
      ask: "M 480 56 H 600 V 96",
      recall: "M 575 96 V 18 H 240 V 40",
      down1: "M 100 86 V 215 H 180",
      down2: "M 240 86 V 190",
      down3: "M 400 86 V 190",
      attend: "M 330 240 V 284",
      write: "M 390 296 H 500 V 150 H 540",
      read: "M 600 170 V 284",
      gate: "M 390 312 H 525",
    },
    stages: [
      [
        "h_{t} = M*_{t−1}(q_{t})",
        "Ask the memory about the segment, without writing (eq. 21).",
        ["s", "memory", "h"],
        ["ask", "recall"],
      ],
      [
        "S̃ = [ persistent || h_{t} || S^{(t)} ]",
        "Put what it recalled in front of the segment (eq. 22).",
        ["p", "h", "s"],
        [],
      ],
      [
        "y_{t} = Attn(S̃_{t})",
        "Attention decides what of the past matters now (eq. 23); here it is added to the segment.",
        ["attention", "y"],
        ["down1", "down2", "down3", "attend"],
      ],
      [
        "M_{t} = M_{t−1}(y_{t})",
        "What attention made of it is what is written (eq. 24).",
        ["y", "memory"],
        ["write"],
      ],
      [
        "o_{t} = y_{t} ⊗ M*_{t}(y_{t})",
        "The new memory is read once more and gates the output (eq. 25).",
        ["memory", "y", "out"],
        ["read", "gate"],
      ],
    ],
  },
  MAG: {
    name: "Memory as gate",
    about:
      "Attention over a sliding window and the memory read the same tokens side by side; one gates the other.",
    boxes: {
      p: [40, 40, 120, 46, "persistent", "learned, fixed"],
      s: [180, 40, 300, 46, "tokens x", ""],
      attention: [90, 150, 230, 50, "sliding attention", "short, precise"],
      memory: [390, 138, 160, 74, "memory M", "long, written as it reads"],
      y: [145, 262, 120, 42, "y", ""],
      out: [395, 262, 150, 42, "o = y ⊗ M(x̃)", ""],
    },
    wires: {
      down1: "M 100 86 V 116 H 160 V 150",
      down2: "M 250 86 V 150",
      down3: "M 440 86 V 138",
      attend: "M 205 200 V 262",
      read: "M 470 212 V 262",
      gate: "M 265 283 H 395",
    },
    stages: [
      [
        "x̃ = [ persistent || x ]",
        "A few learned tokens stand before the text (eq. 26).",
        ["p", "s"],
        [],
      ],
      [
        "y = SW-Attn*(x̃)",
        "Attention sees the window just before a token, and the learned ones (eq. 27).",
        ["attention", "y"],
        ["down1", "down2", "attend"],
      ],
      [
        "M_{t} = M_{t−1}(x̃_{t})",
        "Meanwhile the memory writes what it reads, as far as its gates let it.",
        ["s", "memory"],
        ["down3"],
      ],
      [
        "o = y ⊗ M(x̃)",
        "What it reads gates what attention saw (eq. 28).",
        ["y", "memory", "out"],
        ["read", "gate"],
      ],
    ],
  },
  MAL: {
    name: "Memory as layer",
    about:
      "The memory comes first, and attention reads what it returns.",
    boxes: {
      p: [40, 40, 120, 46, "persistent", "learned, fixed"],
      s: [180, 40, 300, 46, "tokens x", ""],
      memory: [230, 132, 200, 70, "memory M", "written as it reads"],
      y: [270, 238, 120, 40, "y = M(x̃)", ""],
      attention: [215, 312, 230, 50, "sliding attention", "short, precise"],
      out: [510, 316, 120, 42, "o", ""],
    },
    wires: {
      down1: "M 100 86 V 167 H 230",
      down2: "M 330 86 V 132",
      read: "M 330 202 V 238",
      attend: "M 330 278 V 312",
      out: "M 445 337 H 510",
    },
    stages: [
      [
        "x̃ = [ persistent || x ]",
        "A few learned tokens stand before the text (eq. 29).",
        ["p", "s"],
        [],
      ],
      [
        "M_{t} = M_{t−1}(x̃_{t})",
        "The memory writes what it reads, as far as its gates let it.",
        ["s", "memory"],
        ["down1", "down2"],
      ],
      ["y = M(x̃)", "And the memory is read at once (eq. 30).", ["memory", "y"], ["read"]],
      [
        "o = SW-Attn(y)",
        "Attention works on what the memory returned (eq. 31).",
        ["y", "attention", "out"],
        ["attend", "out"],
      ],
    ],
  },
};

export class Figure {
  constructor() {
    this.root = byId("figure");
    this.kind = "MAL";
    this.own = null; // of the model that was on the page when the view was opened last
    this.stage = 0;
    this.playing = motion();
    this.visible = false;
    this.build();
  }

  build() {
    const kinds = h(
      "fieldset",
      { class: "segments" },
      h("legend", { class: "visually-hidden" }, "Model"),
    );
    for (const kind of Object.keys(FIGURES)) {
      const input = h("input", {
        type: "radio",
        name: "kind",
        value: kind,
        checked: kind === this.kind,
      });
      input.addEventListener("change", () => {
        this.kind = kind;
        this.stage = 0;
        this.layOut();
      });
      kinds.append(h("label", {}, input, h("span", {}, kind)));
    }
    this.play = h("button", { class: "small", type: "button" });
    this.play.addEventListener("click", () => {
      this.playing = !this.playing;
      this.label();
      this.run();
    });
    this.about = h("p", { class: "help" });
    this.drawing = h("div", {});
    this.list = h("ol", {
      class: "equations",
      "aria-label": "Equations, in the order of the flow",
    });
    this.root.replaceChildren(
      h(
        "div",
        { class: "card-head" },
        h("h2", { id: "figure-title" }, "Where the memory sits"),
        h("div", { class: "actions" }, kinds, this.play),
      ),
      this.about,
      h("div", { class: "sits" }, this.drawing, this.list),
    );
    this.label();
    this.layOut();
  }

  label() {
    this.play.textContent = this.playing ? "Pause" : "Play";
  }

  layOut() {
    const figure = FIGURES[this.kind];
    const own = this.kind === this.own ? " The model on this page is of this kind." : "";
    this.about.textContent = `${figure.name}. ${figure.about}${own}`;
    const left = Math.min(...Object.values(figure.boxes).map(([x]) => x));
    const right = Math.max(...Object.values(figure.boxes).map(([x, , wide]) => x + wide));
    const height = Math.max(...Object.values(figure.boxes).map(([, y, , tall]) => y + tall)) + 22;
    const marker = svg(
      "marker",
      {
        id: "head",
        viewBox: "0 0 8 8",
        refX: 7,
        refY: 4,
        markerWidth: 7,
        markerHeight: 7,
        orient: "auto",
        markerUnits: "userSpaceOnUse",
      },
      svg("path", { class: "head", d: "M0 0.5 8 4 0 7.5z" }),
    );
    this.wires = Object.fromEntries(
      Object.entries(figure.wires).map(([name, d]) => [
        name,
        svg("path", {
          class: `wire ${name === "write" ? "write" : ""}`,
          d,
          "marker-end": "url(#head)",
        }),
      ]),
    );
    this.nodes = Object.fromEntries(
      Object.entries(figure.boxes).map(([name, box]) => [name, node(name, box)]),
    );
    this.dots = svg("g", { "aria-hidden": "true" });
    this.drawing.replaceChildren(
      svg(
        "svg",
        {
          viewBox: `${left - 8} 10 ${right - left + 16} ${height - 14}`,
          role: "img",
          "aria-label": `${figure.name}: ${figure.stages.map(([, text]) => text).join(" ")}`,
        },
        svg("defs", {}, marker),
        Object.values(this.wires),
        this.dots,
        Object.values(this.nodes),
      ),
    );
    this.list.replaceChildren(
      ...figure.stages.map(([text, words], i) =>
        h(
          "li",
          {},
          h(
            "button",
            { type: "button", onclick: () => this.pick(i) },
            h("span", { class: "formula" }, formula(text)),
            h("small", {}, words),
          ),
        ),
      ),
    );
    this.light();
  }

  /** A stage chosen by hand stays. */
  pick(stage) {
    this.stage = stage;
    this.playing = false;
    this.label();
    this.light();
    this.run();
  }

  light() {
    const [, , nodes, wires] = FIGURES[this.kind].stages[this.stage];
    for (const [name, element] of Object.entries(this.nodes))
      element.classList.toggle("on", nodes.includes(name));
    for (const [name, element] of Object.entries(this.wires))
      element.classList.toggle("on", wires.includes(name));
    this.list.querySelectorAll("button").forEach((button, i) => {
      if (i === this.stage) button.setAttribute("aria-current", "step");
      else button.removeAttribute("aria-current");
    });
    this.dots.replaceChildren();
    this.flows = wires.map((name, i) => ({
      wire: this.wires[name],
      length: this.wires[name].getTotalLength(),
      begin: i * 0.2,
      dots: [0, 1, 2].map(() =>
        this.dots.appendChild(svg("circle", { class: "dot", r: 4.5, visibility: "hidden" })),
      ),
    }));
    this.started = performance.now();
  }

  /** The view was opened or left. */
  shown(visible) {
    const own = studio.info && studio.model.variant.toUpperCase();
    if (visible && own !== this.own) {
      this.own = own;
      if (own in FIGURES) this.kind = own;
      this.stage = 0;
      this.build();
    }
    this.visible = visible;
    this.started = performance.now();
    this.run();
  }

  run() {
    cancelAnimationFrame(this.frame);
    if (!this.visible || !motion()) return;
    const step = (now) => {
      const elapsed = now - this.started;
      if (this.playing && elapsed > PAUSE) {
        this.stage = (this.stage + 1) % FIGURES[this.kind].stages.length;
        this.light();
      } else this.move(elapsed / 1000);
      this.frame = requestAnimationFrame(step);
    };
    this.frame = requestAnimationFrame(step);
  }

  /** Dots run along the lit wires, one after the other. */
  move(seconds) {
    for (const { wire, length, begin, dots } of this.flows) {
      dots.forEach((dot, i) => {
        const share = ((seconds - begin - i * 0.28) * 230) / length;
        const looped = this.playing ? share : share < 0 ? share : share % (1 + 200 / length);
        const on = looped > 0 && looped < 1;
        dot.setAttribute("visibility", on ? "visible" : "hidden");
        if (!on) return;
        const { x, y } = wire.getPointAtLength(looped * length);
        dot.setAttribute("cx", x);
        dot.setAttribute("cy", y);
      });
    }
  }
}

function node(name, [x, y, width, height, label, second]) {
  const middle = x + width / 2;
  return svg(
    "g",
    { class: `node ${name}` },
    svg("rect", { x, y, width, height, rx: 9 }),
    svg("text", { x: middle, y: y + height / 2 - (second ? 8 : 0) }, label),
    second ? svg("text", { class: "sub", x: middle, y: y + height / 2 + 10 }, second) : [],
  );
}
