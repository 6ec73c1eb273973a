// Forgetting a passage: everything is read again without it, and the questions are asked again.

import { announce, byId, h, named, number, plural } from "./dom.js";
import { api, studio } from "./studio.js";

/** That are asked again; the server's limit. */
const MOST_QUESTIONS = 32;

export class ErasePanel {
  /** reload(id, from): where that memory is still open, show what it has read and the change. */
  constructor(pane, reload) {
    this.pane = pane;
    this.reload = reload;
    this.body = byId("erase-body");
    this.result = null;
    this.running = false;
    this.stopped = false;
    this.instead = h("input", {
      type: "text",
      id: "instead",
      class: "question",
      autocomplete: "off",
      spellcheck: "false",
    });
    this.keep = h("input", { type: "checkbox", id: "keep" });
    this.chooseAnew(null);
    pane.addEventListener("cursor", () => this.update());
    pane.addEventListener("erase", () => this.erase(pane.passage()));
    for (const name of ["session-changed", "busy"])
      studio.addEventListener(name, () => this.update());
    studio.addEventListener("session", () => {
      this.result = null;
      this.chooseAnew(null);
      this.update();
    });
  }

  /** What was typed belongs to the passage that begins at this end of the selection; null: to
   * whatever is selected next. */
  chooseAnew(anchor) {
    this.anchor = anchor;
    this.instead.value = "";
    this.keep.checked = true;
  }

  range() {
    return this.pane.selection();
  }

  update() {
    if (this.running) return;
    const range = this.range();
    const { anchor } = this.pane;
    if (this.anchor === null) this.anchor = anchor;
    else if (anchor !== this.anchor) this.chooseAnew(anchor);
    const facts = studio.busy ? [] : studio.log.facts();
    const help = h(
      "p",
      { class: "help" },
      "The memory reads everything again without a passage, or with another in its place: as if it had never stood in the text.",
    );
    const parts = [help];
    if (facts.length) {
      parts.push(
        h(
          "div",
          { class: "suggestions", role: "group", "aria-label": "Passages to select" },
          facts.map((fact) => this.suggestion(fact)),
        ),
      );
    }
    if (range) {
      parts.push(
        h(
          "div",
          { class: "quote", tabindex: "0", "aria-label": "Selected passage" },
          studio.log.slice(...range),
        ),
        h("label", { class: "field" }, h("span", {}, "Read instead (empty: nothing)"), this.instead),
        h("label", { class: "check" }, this.keep, "Keep the memory as it is now, as a fork"),
        h(
          "div",
          { class: "row" },
          h("span", { class: "help" }, plural(range[1] - range[0], "token")),
          h(
            "button",
            {
              class: "primary",
              type: "button",
              id: "erase-button",
              disabled: studio.busy,
              onclick: () => this.erase(),
            },
            "Erase and read again",
          ),
        ),
      );
    } else if (studio.log.length) {
      parts.push(
        h(
          "p",
          { class: "empty" },
          facts.length
            ? "Choose a note above, or select a passage in the text."
            : "Select a passage in the text.",
        ),
      );
    }
    if (this.result) parts.push(this.result);
    this.body.replaceChildren(...parts);
  }

  suggestion(fact) {
    const select = () => {
      const { log } = studio;
      this.pane.select(log.tokenAt(fact.offset), log.tokenAt(fact.offset + fact.size - 1) + 1);
    };
    return h(
      "button",
      { class: "suggestion", type: "button", onclick: select },
      `«${fact.name}: ${fact.value}»`,
    );
  }

  async erase(range = this.range()) {
    if (!range || studio.busy) return;
    const typed = this.range() !== null; // else the form is hidden, and what it holds is old
    const instead = typed ? this.instead.value : "";
    const words = studio.log.slice(...range);
    const { session } = studio;
    const questions = nearest(studio.log.facts(), range).map((fact) => ({
      ...fact,
      prompt: ` «${fact.name}: `,
      edited: new RegExp(`«${fact.name}: (\\w+)»`).exec(instead)?.[1],
    }));
    const passage = {
      start: range[0] + studio.log.skipped,
      stop: range[1] + studio.log.skipped,
      tokens_read: studio.log.first + studio.log.length, // that the passage was chosen from
      instead,
      questions: questions.map((fact) => fact.prompt),
    };
    const keep = !typed || this.keep.checked;
    this.result = null;
    this.stopped = false;
    this.running = true;
    studio.setBusy("erasing", true);
    this.body.replaceChildren(
      h(
        "div",
        { class: "row" },
        h(
          "p",
          { class: "busy" },
          `Reading everything again ${instead ? "as edited" : "without the passage"} …`,
        ),
        h(
          "button",
          { class: "small", type: "button", onclick: (event) => this.stop(session, event.target) },
          "Cancel",
        ),
      ),
    );
    const done = await studio.attempt(async () => {
      const result = await this.request(session, passage, keep);
      if (studio.session?.id === session.id) this.result = report(result, questions);
      this.chooseAnew(null);
      await this.reload(session.id, range[0]);
      return true;
    });
    this.running = false;
    const failed = !done && studio.session?.id === session.id;
    if (failed) this.resume(range, words);
    studio.setBusy("erasing", false);
    byId(failed ? "erase-button" : "erase-result")?.focus();
  }

  /** Erase, after a fork where one is wanted; where the server refuses, nothing is left of that. */
  async request(session, passage, keep) {
    const before = { fork: session.id, name: named(session.name, ", before erasing") };
    const fork = keep ? await api.create(before) : null;
    try {
      if (this.stopped) throw Object.assign(new Error("stopped"), { status: 409, code: "stopped" });
      return await api.erase(session.id, passage);
    } catch (error) {
      // Without an answer it may have been erased: then the fork is what there was.
      if (fork && error.status) await api.remove(fork.id).catch(() => {});
      if (error.code === "stopped") announce("Stopped. The memory is as it was.");
      else if (error.status === 409) await this.reload(session.id); // what it has read by now
      throw error;
    }
  }

  /** Too late, or so early that the server does not know of it: then one can try again. */
  async stop(session, button) {
    this.stopped = true;
    button.disabled = true;
    await studio.attempt(() => api.stop(session.id));
    button.disabled = false;
  }

  /** After a failure: what was typed stays, with the passage where that is still there. */
  resume(range, words) {
    this.anchor = null;
    if (!this.range() && studio.log.slice(...range) === words) this.pane.select(...range);
  }
}

/** The notes that are nearest to the passage, in the order of the text. */
function nearest(facts, [start, stop]) {
  const far = (fact) => {
    const token = studio.log.tokenAt(fact.offset);
    return Math.max(start - token, token - stop, 0);
  };
  return facts
    .map((fact) => [far(fact), fact])
    .sort(([a], [b]) => a - b)
    .slice(0, MOST_QUESTIONS)
    .map(([, fact]) => fact)
    .sort((a, b) => a.offset - b.offset);
}

/** What changed: the weights, and the answers. */
function report(result, questions) {
  const change = result.distance.flat();
  const size = result.moved.flat();
  const largest = change.indexOf(Math.max(...change));
  const rows = questions.map((fact, i) => {
    const [before, after] = [result.answers[i].before, result.answers[i].after];
    const same = before === after;
    return h(
      "tr",
      {},
      h("th", { scope: "row", class: "mono" }, `«${fact.name}`),
      h("td", { class: "n mono" }, before),
      h("td", { class: "n mono" }, after || "nothing"),
      h(
        "td",
        { class: `n ${same ? "kept" : "gone"}` },
        same ? "kept" : after === fact.edited ? "edited" : "gone",
      ),
    );
  });
  const [memory, head] = change.length ? place(result.distance, largest) : [];
  return h(
    "div",
    { id: "erase-result", tabindex: "-1", class: "column" },
    h(
      "p",
      {},
      h(
        "b",
        {},
        `${plural(result.erased, "token")} erased${result.inserted ? `, ${result.inserted} read instead` : ""}.`,
      ),
      change.length
        ? ` The weights differ from before by ${number(change[largest])} in layer ${memory + 1}, head ${head + 1}, where they had moved ${number(size[largest])}.`
        : null,
    ),
    rows.length
      ? h(
          "table",
          {},
          h(
            "thead",
            {},
            h(
              "tr",
              {},
              h("th", { scope: "col" }, "Asked for"),
              h("th", { scope: "col", class: "n" }, "before"),
              h("th", { scope: "col", class: "n" }, "after"),
              h("td", {}),
            ),
          ),
          h("tbody", {}, rows),
        )
      : null,
  );
}

/** Memory and head of the n-th number of a list of lists. */
function place(lists, n) {
  let memory = 0;
  while (n >= lists[memory].length) n -= lists[memory++].length;
  return [memory, n];
}
