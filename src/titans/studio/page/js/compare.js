// Two memories side by side: how far apart they are, what each says, and what each may read next.

import { byId, count, h, number, plural } from "./dom.js";
import { api, studio } from "./studio.js";

export class Comparison {
  /** changed(): a memory has read on. */
  constructor(changed) {
    this.changed = changed;
    this.root = byId("comparison");
    this.pair = null;
    this.readings = new Set(); // AbortControllers
  }

  /** Close it; what its memories are reading ends with what they have read. */
  clear() {
    this.pair = null;
    for (const reading of this.readings) reading.abort();
    this.root.replaceChildren();
  }

  drop(id) {
    if (this.pair?.some((session) => session.id === id)) this.clear();
  }

  /** A memory has another name now. */
  renamed(session) {
    if (!this.pair) return;
    for (const held of [this.pair, this.choices]) {
      for (const [index, other] of held.entries()) {
        if (other.id === session.id) held[index] = { ...other, name: session.name };
      }
    }
    for (const option of this.root.querySelectorAll("option")) {
      if (option.value === session.id) option.textContent = session.name;
    }
  }

  async show(left, right, choices) {
    this.clear();
    this.pair = [left, right];
    this.choices = choices;
    this.build();
    await this.measure();
    this.root.scrollIntoView({ block: "start", behavior: "smooth" });
    byId("comparison-title").focus({ preventScroll: true });
  }

  build() {
    this.distances = h("div", {}, h("p", { class: "busy" }, "Comparing …"));
    this.sides = this.pair.map((session, index) => this.side(session, index));
    const question = h("input", {
      class: "question",
      type: "text",
      id: "both-question",
      spellcheck: "false",
      autocomplete: "off",
      value: this.suggested(),
    });
    const ask = h("button", { class: "primary", type: "submit" }, "Ask both");
    const form = h(
      "form",
      { class: "row" },
      h("label", { class: "field grow" }, h("span", {}, "The same question to both"), question),
      ask,
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.askBoth(question.value);
    });
    this.root.replaceChildren(
      h(
        "section",
        { class: "card comparison", "aria-labelledby": "comparison-title" },
        h(
          "div",
          { class: "card-head" },
          h("h2", { id: "comparison-title", tabindex: "-1" }, "Two memories compared"),
          h("button", { class: "small", type: "button", onclick: () => this.clear() }, "Close"),
        ),
        h(
          "div",
          { class: "pair" },
          this.sides.map((side) => side.element),
        ),
        form,
        h("h3", {}, "How far their weights are apart"),
        h(
          "p",
          { class: "help" },
          h("var", {}, "|M", h("sub", {}, "A"), " − M", h("sub", {}, "B"), "|"),
          " per head: 0 where both have written the same.",
        ),
        this.distances,
      ),
    );
  }

  /** The question that the two built-in endings answer differently. */
  suggested() {
    const fact = studio.texts.find((text) => text.id === "left")?.facts[0];
    return fact ? fact.question : "";
  }

  side(session, index) {
    const label = index ? "B" : "A";
    const choose = h("select", { "aria-label": `Memory ${label}` });
    for (const other of this.choices) {
      choose.append(
        h("option", { value: other.id, selected: other.id === session.id }, other.name),
      );
    }
    choose.addEventListener("change", () => {
      this.pair[index] = this.choices.find((other) => other.id === choose.value);
      status.textContent = told(this.pair[index]);
      answer.replaceChildren();
      this.measure();
    });
    const text = h("select", { "aria-label": `Text for memory ${label}` });
    for (const builtIn of studio.texts) {
      const preset = builtIn.id === (index ? "right" : "left");
      text.append(h("option", { value: builtIn.id, selected: preset }, builtIn.title));
    }
    text.append(h("option", { value: "own" }, "Your own text"));
    const own = h("textarea", {
      rows: 3,
      "aria-label": `Your text for memory ${label}`,
      hidden: true,
    });
    text.addEventListener("change", () => (own.hidden = text.value !== "own"));
    const start = h("button", { type: "button" }, "Let it read");
    const stop = h("button", { type: "button", hidden: true }, "Stop");
    const status = h("p", { class: "help", role: "status" }, told(session));
    const answer = h("div", { class: "both-answer", "aria-live": "polite" });
    start.addEventListener("click", () => {
      const chosen = studio.texts.find((builtIn) => builtIn.id === text.value);
      this.readOn(index, chosen?.text ?? own.value, { choose, start, stop, status });
    });
    const element = h(
      "div",
      { class: "side-card", dataset: { side: label.toLowerCase() } },
      h("label", { class: "field" }, h("span", {}, `Memory ${label}`), choose),
      status,
      h(
        "div",
        { class: "row" },
        h("label", { class: "field grow" }, h("span", {}, "Reads on with"), text),
        start,
        stop,
      ),
      own,
      answer,
    );
    return { element, answer };
  }

  /** What was read counts, however it ends. */
  async readOn(index, text, { choose, start, stop, status }) {
    if (!text) return;
    const { pair } = this; // another may be compared before the end
    const { id } = pair[index];
    const reading = new AbortController();
    const running = (yes) => {
      this.readings[yes ? "add" : "delete"](reading);
      const [shown, gone] = yes ? [stop, start] : [start, stop];
      const focused = document.activeElement === gone;
      choose.disabled = yes;
      [shown.hidden, gone.hidden] = [false, true];
      if (focused) shown.focus();
    };
    stop.onclick = async () => {
      const { stopped } = await api.stop(id).catch(() => ({}));
      if (!stopped) reading.abort(); // before the server knew of it
    };
    running(true);
    status.textContent = "Reading …";
    await studio.attempt(async () => {
      try {
        for await (const { event, data } of api.read(id, text, reading.signal)) {
          if (event === "done") pair[index] = data;
          else status.textContent = `${count(data.start + data.text.length)} tokens …`;
        }
      } catch (error) {
        pair[index] = await api.session(id).catch(() => pair[index]);
        throw error;
      } finally {
        running(false);
        status.textContent = told(pair[index]);
        if (id === studio.session?.id) {
          studio.tell("stale");
          studio.setSession(pair[index]);
        }
        if (this.pair === pair) await this.measure();
        await this.changed();
      }
    });
  }

  async measure() {
    const { pair } = this;
    const [a, b] = pair;
    const shown = await api.compare(a.id, b.id).then(
      ({ distance }) => bars(distance),
      (error) => h("p", { class: "notice bad", role: "alert" }, error.message),
    );
    const asked = this.pair === pair && pair[0] === a && pair[1] === b; // still
    if (asked) this.distances.replaceChildren(shown);
  }

  async askBoth(prompt) {
    if (!prompt) return;
    const noted = /«\w+: $/.test(prompt);
    const content = {
      prompt,
      max_tokens: noted ? 12 : 40,
      temperature: 0,
      stop: noted ? ["»"] : [],
    };
    for (const { answer } of this.sides)
      answer.replaceChildren(h("p", { class: "busy" }, "Answering …"));
    await Promise.all(
      this.pair.map(async (session, index) => {
        const { answer } = this.sides[index];
        try {
          const { text } = await api.ask(session.id, content);
          const long = text.length > 24;
          answer.replaceChildren(
            h(
              "article",
              { class: `answer ${long ? "long" : ""}` },
              h("h3", {}, `${session.name} goes on`),
              h("pre", {}, text || "(nothing)"),
            ),
          );
        } catch (error) {
          answer.replaceChildren(h("p", { class: "notice bad", role: "alert" }, error.message));
        }
      }),
    );
  }
}

const told = (session) => `${plural(session.tokens_read, "token")} read`;

function bars(distance) {
  const all = distance.flat();
  const most = Math.max(1e-12, ...all);
  const rows = distance.flatMap((memory, m) =>
    memory.flatMap((value, head) => {
      const n = distance.slice(0, m).flat().length + head;
      const fill = h("i", { class: `series-${(n % 8) + 1}` });
      fill.style.width = `${(100 * value) / most}%`;
      return [
        h("span", {}, `layer ${m + 1}, head ${head + 1}`),
        h("div", { class: "bar", "aria-hidden": "true" }, fill),
        h("span", { class: "n" }, number(value)),
      ];
    }),
  );
  return h("div", { class: "bars" }, rows);
}
