// The memories that the server holds: open, fork, save, load, compare, reset, delete.

import { byId, bytes, count, h, named, number } from "./dom.js";
import { Comparison } from "./compare.js";
import { api, studio } from "./studio.js";

export class Memories {
  /** open(session): read it into the page. */
  constructor(open) {
    this.open = open;
    this.list = byId("memory-list");
    this.comparison = new Comparison(() => this.refresh());
    byId("load").addEventListener("click", () => byId("load-file").click());
    byId("load-file").addEventListener("change", (event) => {
      this.load(event.target.files[0]);
      event.target.value = "";
    });
    byId("fresh").addEventListener("click", () => this.create());
    const drop = byId("drop");
    drop.addEventListener("dragover", (event) => {
      event.preventDefault();
      drop.classList.add("dropping");
    });
    drop.addEventListener("dragleave", () => drop.classList.remove("dropping"));
    drop.addEventListener("drop", (event) => {
      event.preventDefault();
      drop.classList.remove("dropping");
      this.load(event.dataTransfer.files[0]);
    });
  }

  async refresh() {
    const sessions = await studio.attempt(() => api.sessions());
    if (!sessions) return;
    this.sessions = sessions.sort((a, b) => b.used - a.used);
    if (this.sessions.length === 0) {
      this.list.replaceChildren(
        h(
          "p",
          { class: "empty" },
          "No memories yet. Read a text, or load a memory file that was saved before.",
        ),
      );
      this.comparison.clear();
      return;
    }
    const focused = document.activeElement?.dataset?.key;
    this.list.replaceChildren(
      h(
        "ul",
        { class: "memories" },
        this.sessions.map((session) => this.card(session)),
      ),
    );
    if (focused) this.list.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
  }

  card(session) {
    const current = session.id === studio.session?.id;
    const parent = this.sessions.find((other) => other.id === session.parent);
    const action = (name, label, work, kind = "") =>
      h(
        "button",
        {
          class: `small ${kind}`,
          type: "button",
          dataset: { key: `${session.id}-${name}` },
          "aria-label": `${label} ${session.name}`,
          onclick: work,
        },
        label,
      );
    const others = this.sessions.filter(
      (other) => other.id !== session.id && other.model === session.model,
    );
    const name = h("input", {
      class: "memory-name",
      type: "text",
      value: session.name,
      "aria-label": "Name of the memory",
      maxlength: 80,
    });
    name.addEventListener("change", () => this.rename(session, name.value));
    const bits = session.surprise?.bits_per_token;
    return h(
      "li",
      { class: `card memory ${current ? "current" : ""}`, dataset: { id: session.id } },
      h(
        "div",
        { class: "memory-head" },
        name,
        current ? h("span", { class: "badge" }, "open") : null,
      ),
      h(
        "dl",
        { class: "facts" },
        h("dt", {}, "Tokens read"),
        h("dd", {}, count(session.tokens_read)),
        h("dt", {}, "Size of the memory"),
        h("dd", {}, bytes(session.state_bytes)),
        h("dt", {}, "Mean surprise of the model"),
        h("dd", {}, bits === null || bits === undefined ? "–" : `${number(bits)} bits a token`),
        h("dt", {}, parent ? "Fork of" : "Model"),
        h("dd", {}, parent ? parent.name : session.model),
      ),
      h(
        "div",
        { class: "actions" },
        action("open", "Open", () => this.show(session)),
        action("fork", "Fork", () => this.fork(session)),
        action("save", "Save", () => this.save(session)),
        others.length ? action("compare", "Compare", () => this.compare(session, others)) : null,
        action("reset", "Reset", () => this.reset(session)),
        action("delete", "Delete", (event) => this.remove(event.currentTarget, session), "danger"),
      ),
    );
  }

  async show(session) {
    location.hash = "read";
    await this.open(session);
  }

  create() {
    return studio.attempt(async () => {
      await api.create({ name: this.unused("New memory") });
      await this.refresh();
    });
  }

  /** A name that no memory has yet. */
  unused(name) {
    const taken = new Set((this.sessions ?? []).map((session) => session.name));
    let next = name;
    for (let i = 2; taken.has(next); i++) next = named(name, ` ${i}`);
    return next;
  }

  rename(session, name) {
    return studio.attempt(async () => {
      const renamed = await api.rename(session.id, name.trim() || session.name);
      if (renamed.id === studio.session?.id) studio.setSession(renamed);
      this.comparison.renamed(renamed);
      await this.refresh();
    });
  }

  fork(session) {
    return studio.attempt(async () => {
      await api.create({ fork: session.id, name: this.unused(named(session.name, ", fork")) });
      await this.refresh();
    });
  }

  save(session) {
    return studio.attempt(async () => {
      const file = URL.createObjectURL(await api.download(session.id));
      const name = session.name.replace(/[^\w.-]+/g, "-").replace(/^-+|-+$/g, "") || "memory";
      h("a", { href: file, download: `${name}.memory` }).click();
      setTimeout(() => URL.revokeObjectURL(file), 10000);
    });
  }

  async load(file) {
    if (!file) return;
    const whole = file.name.replace(/\.(memory|safetensors)$/, "") || "loaded";
    const name = [...whole].slice(0, 80).join("");
    await studio.attempt(async () => {
      const session = await api.upload(file, this.unused(name)).catch((error) => {
        throw new Error(`${file.name} cannot be loaded: ${error.message}`);
      });
      await this.open(session);
    });
    await this.listOnly();
  }

  /** Refresh without taking down what `attempt` has to say. */
  async listOnly() {
    const shown = !byId("failure").hidden && byId("failure-text").textContent;
    await this.refresh();
    if (shown) studio.fail(new Error(shown));
  }

  reset(session) {
    return studio.attempt(async () => {
      const fresh = await api.reset(session.id);
      this.comparison.drop(session.id);
      if (fresh.id === studio.session?.id) await this.open(fresh);
      await this.refresh();
    });
  }

  /** Asks first, in the button itself. */
  remove(button, session) {
    if (button.dataset.sure !== "yes") {
      button.dataset.sure = "yes";
      button.textContent = "Delete for good?";
      setTimeout(() => {
        delete button.dataset.sure;
        button.textContent = "Delete";
      }, 4000);
      return undefined;
    }
    return studio.attempt(async () => {
      await api.remove(session.id);
      if (session.id === studio.session?.id) await this.open(null);
      this.comparison.drop(session.id);
      await this.refresh();
    });
  }

  compare(session, others) {
    const relative =
      others.find((other) => other.id === session.parent || other.parent === session.id) ??
      others.find((other) => other.parent && other.parent === session.parent) ??
      others[0];
    this.comparison.show(session, relative, [session, ...others]);
  }
}
