// One question, three readers of the same text: with its memory, with writing off, attention only.

import { byId, h, plural } from "./dom.js";
import { api, studio } from "./studio.js";

const READERS = [
  ["memory", "With its memory"],
  ["off", "Writing switched off"],
  ["attention", "Attention only"],
];

export class Ask {
  constructor() {
    this.form = byId("ask-form");
    this.question = byId("question");
    this.answers = byId("answers");
    this.suggestions = byId("suggestions");
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.ask();
    });
    for (const name of ["session", "session-changed", "busy"]) {
      studio.addEventListener(name, () => this.update());
    }
    studio.addEventListener("session", () => this.current?.abort()); // it was about another memory
  }

  /** Offer what was noted in the text; say what is missing where nothing was read. */
  update() {
    const read = studio.session?.tokens_read > 0;
    byId("ask-button").disabled = studio.busy || !read;
    if (studio.busy || !read) {
      byId("ask-help").textContent = studio.busy
        ? "You can ask as soon as the text is read."
        : "First let the model read a text. Then ask what was in it.";
      this.suggestions.replaceChildren();
      this.answers.replaceChildren();
      return;
    }
    const facts = studio.log.facts();
    byId("ask-help").textContent = facts.length
      ? "Codes noted in this text; one click asks:"
      : "The model goes on from what you type, three ways.";
    this.suggestions.replaceChildren(
      ...facts.map((fact) => {
        const button = h("button", { class: "suggestion", type: "button" }, `«${fact.name}: …`);
        button.addEventListener("click", () => {
          this.question.value = ` «${fact.name}: `;
          this.ask();
        });
        return button;
      }),
    );
  }

  async ask() {
    const prompt = this.question.value;
    if (!prompt) {
      this.question.focus();
      return;
    }
    this.current?.abort();
    const current = (this.current = new AbortController());
    this.answers.className = "answers";
    this.answers.replaceChildren(h("p", { class: "busy" }, "Three readers are answering …"));
    try {
      const content = { prompt, ...settings(prompt) };
      const { readers } = await api.compareAsk(studio.session.id, content, current.signal);
      this.show(prompt, readers);
    } catch (error) {
      if (error.name === "AbortError" || studio.closed(error)) return;
      this.answers.replaceChildren(h("p", { class: "notice bad", role: "alert" }, error.message));
    }
  }

  show(prompt, readers) {
    const expected = expectedFor(prompt);
    const texts = READERS.map(([key]) => readers[key].text ?? "");
    this.answers.classList.toggle(
      "long",
      texts.some((text) => text.length > 24),
    );
    this.answers.replaceChildren(
      h(
        "p",
        { class: "asked" },
        "After ",
        h("span", { class: "mono" }, ending(prompt.trim())),
        expected ? `, of which the text said ${expected}:` : ":",
      ),
      ...READERS.map(([key, title]) => card(key, title, readers[key], expected)),
    );
  }
}

/** The end of a long prompt, which is where the answer goes on. */
const ending = (prompt) => (prompt.length > 80 ? `… ${prompt.slice(-80)}` : prompt);

/** A question about a noted code ends where the note does. */
function settings(prompt) {
  const noted = /«\w+: $/.test(prompt);
  const most = Number(byId("tokens").value) || 40;
  return {
    max_tokens: noted ? Math.min(12, most) : most,
    temperature: Number(byId("temperature").value) || 0,
    stop: noted ? ["»"] : [],
    seed: 0,
  };
}

/** What the text said, where the question is about something noted in it. */
function expectedFor(prompt) {
  const name = /«(\w+): $/.exec(prompt)?.[1];
  return studio.log.facts().find((fact) => fact.name === name)?.value;
}

function card(key, title, reader, expected) {
  if (reader.unavailable) {
    return h(
      "article",
      { class: "answer", dataset: { reader: key } },
      h("h3", {}, title),
      h("pre", {}, "–"),
      h("p", { class: "verdict" }, reader.unavailable),
    );
  }
  const right = expected !== undefined && reader.text === expected;
  const verdict =
    expected === undefined
      ? `read ${plural(reader.tokens_read, "token")}`
      : right
        ? "✓ as in the text"
        : "✗ not what it said";
  return h(
    "article",
    {
      class: `answer ${expected === undefined ? "" : right ? "right" : "wrong"}`,
      dataset: { reader: key },
    },
    h("h3", {}, title),
    h("pre", {}, reader.text || "(nothing)"),
    h("p", { class: "verdict" }, verdict),
  );
}
