// Choosing a text, and reading it: the pieces go into the log, the pane and the curves.

import { announce, byId, bytes, count, h, plural } from "./dom.js";
import { Player } from "./player.js";
import { api, studio } from "./studio.js";

const OWN = "own";
const NEXT = "";
const CHARTS_EVERY = 100; // milliseconds

export class Reader {
  constructor(pane, charts) {
    this.pane = pane;
    this.charts = charts;
    this.choice = byId("text-choice");
    this.own = byId("own-text");
    this.player = new Player(
      (piece, from, to) => studio.log.append(piece, from, to),
      () => this.drawn(),
    );
    this.choice.addEventListener("change", () => this.preview());
    this.own.addEventListener("input", () => this.preview());
    byId("read").addEventListener("click", () => this.read());
    byId("hurry").addEventListener("click", () => this.player.hurry());
    byId("stop").addEventListener("click", () => this.stop());
    byId("own-file-button").addEventListener("click", () => byId("own-file").click());
    byId("own-file").addEventListener("change", (event) => {
      this.take(event.target.files[0]);
      event.target.value = "";
    });
    this.acceptDrops(byId("view-read"));
  }

  /** Offer the built-in texts. */
  offer() {
    this.choice.replaceChildren(
      ...studio.texts.map((text) => h("option", { value: text.id }, text.title)),
      h("option", { value: OWN }, "Your own text"),
      h("option", { value: NEXT, hidden: true }, "Choose what to read next"),
    );
    this.preview();
  }

  get chosen() {
    return studio.texts.find((text) => text.id === this.choice.value);
  }

  text() {
    if (this.choice.value === NEXT) return "";
    return this.chosen?.text ?? this.file ?? this.own.value;
  }

  /** Show what would be read next, after what was read. */
  preview() {
    if (studio.busy) return;
    const own = this.choice.value === OWN;
    byId("own").hidden = !own;
    byId("text-about").textContent = own ? "" : (this.chosen?.about ?? "");
    const text = this.text();
    byId("own-size").textContent = own && text ? `${count(text.length)} characters` : "";
    byId("read").textContent = studio.session?.tokens_read > 0 ? "Read on" : "Read";
    byId("read").disabled = text.length === 0;
    this.pane.rest = text;
    this.pane.update();
  }

  async take(file) {
    if (!file) return;
    await studio
      .attempt(async () => {
        const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
        this.choice.value = OWN;
        this.own.value = text.length > 100000 ? "" : text;
        this.file = text.length > 100000 ? text : null;
        this.own.placeholder = this.file
          ? `${file.name}, ${bytes(file.size)}, is ready to be read.`
          : "";
        this.preview();
      })
      .catch(() => {});
  }

  acceptDrops(element) {
    const card = element.querySelector(".source");
    element.addEventListener("dragover", (event) => {
      event.preventDefault();
      card.classList.add("dropping");
    });
    element.addEventListener("dragleave", () => card.classList.remove("dropping"));
    element.addEventListener("drop", (event) => {
      event.preventDefault();
      card.classList.remove("dropping");
      this.take(event.dataTransfer.files[0]);
    });
  }

  async read() {
    const text = this.text();
    if (!text || studio.busy) return;
    const controller = (this.controller = new AbortController());
    await studio.attempt(async () => {
      if (!studio.session) studio.setSession(await api.create({ name: "First reading" }));
      this.begin(text);
      try {
        await this.consume(api.read(studio.session.id, text, controller.signal));
      } catch (error) {
        // The server may have read more than was shown, or less: show what it has.
        if (this.controller === controller) await this.show(studio.session);
        throw error;
      }
      this.choice.value = NEXT;
      announce(`Read. ${plural(studio.session.tokens_read, "token")} in all.`);
    });
    if (this.controller === controller) this.end();
  }

  /** Show what a memory has read so far. */
  async show(session) {
    this.controller?.abort();
    this.player.stop();
    studio.log.clear();
    this.pane.clear();
    this.charts.build();
    studio.setSession(session);
    const controller = (this.controller = new AbortController());
    if (session) {
      this.begin("");
      this.player.hurry();
      await studio.attempt(() => this.consume(api.history(session.id, controller.signal)));
    }
    if (this.controller === controller) this.end();
  }

  begin(text) {
    studio.setBusy(true);
    this.unread = text;
    this.taken = studio.log.length; // tokens of the log that are accounted for
    this.seen = 0; // characters of this text that were read
    this.player.pace = Number(byId("pace").value);
    this.pane.rest = text;
    this.pane.following = true;
    for (const id of ["read", "pace-field"]) byId(id).hidden = true;
    for (const id of ["hurry", "stop"]) byId(id).hidden = text === "";
    this.choice.disabled = true;
    byId("progress").classList.toggle("shown", text !== "");
  }

  async consume(pieces) {
    for await (const { event, data } of pieces) {
      if (event === "piece") await this.player.add(data);
      else if (event === "done") {
        await this.player.finish();
        studio.log.skipped = data.skipped ?? studio.log.skipped;
        studio.setSession(data);
      }
    }
  }

  drawn() {
    const { log } = studio;
    if (this.unread) {
      while (this.taken < log.length) this.seen += log.text[this.taken++].length;
      this.pane.rest = this.unread.slice(this.seen);
      const share = Math.min(1, this.seen / this.unread.length);
      byId("progress").setAttribute("aria-valuenow", Math.round(100 * share));
      byId("progress").firstElementChild.style.transform = `scaleX(${share})`;
    }
    byId("chip-detail").textContent = `${count(log.first + log.length)} tokens read`;
    this.pane.update();
    const now = performance.now();
    if (now - (this.charted ?? 0) < CHARTS_EVERY) return;
    this.charted = now;
    this.charts.draw();
  }

  stop() {
    this.controller.abort();
  }

  end() {
    studio.setBusy(false);
    for (const id of ["read", "pace-field"]) byId(id).hidden = false;
    for (const id of ["hurry", "stop"]) byId(id).hidden = true;
    byId("progress").classList.remove("shown");
    this.choice.disabled = false;
    this.unread = "";
    this.preview();
    this.charts.draw();
  }
}
