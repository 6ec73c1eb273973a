// Choosing a text, and reading it: the pieces go into the log, the pane and the curves.

import { announce, byId, bytes, count, h, plural } from "./dom.js";
import { Player } from "./player.js";
import { api, studio } from "./studio.js";

const OWN = "own";
const NEXT = "";
const FIELD = 100000; // characters that are shown in the field; more are kept beside it
const CHARTS_EVERY = 100; // milliseconds
const PATIENCE = 400; // milliseconds before the page says that it reads a memory's past

export class Reader {
  constructor(pane, charts) {
    this.pane = pane;
    this.charts = charts;
    this.choice = byId("text-choice");
    this.own = byId("own-text");
    this.partial = false; // of the open memory's past, not all is in the log
    this.player = new Player(
      (piece, from, to) => studio.log.append(piece, from, to),
      () => this.drawn(),
    );
    this.choice.addEventListener("change", () => this.preview());
    this.own.addEventListener("paste", (event) => {
      const words = event.clipboardData.getData("text/plain");
      if (words.length <= FIELD) return;
      event.preventDefault(); // laying that much out in the field takes seconds
      this.take(new File([words], "What was pasted"));
    });
    this.own.addEventListener("input", () => {
      this.file = null; // what is typed last counts
      this.preview();
    });
    byId("read").addEventListener("click", () => this.read());
    byId("hurry").addEventListener("click", () => this.player.hurry());
    byId("stop").addEventListener("click", () => this.stopReading());
    byId("stop-past").addEventListener("click", () => this.stop());
    studio.addEventListener("busy", () => {
      this.choice.disabled = studio.busy;
      if (studio.busy) byId("read").disabled = true;
      else this.preview();
    });
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
    await studio.attempt(async () => {
      const content = await file.arrayBuffer();
      let text;
      try {
        text = new TextDecoder("utf-8", { fatal: true }).decode(content);
      } catch {
        throw new Error(`${file.name} is not a text in UTF-8.`);
      }
      this.choice.value = OWN;
      this.own.value = text.length > FIELD ? "" : text;
      this.file = text.length > FIELD ? text : null;
      this.own.placeholder = this.file
        ? `${file.name}, ${bytes(file.size)}, is ready to be read.`
        : "";
      this.preview();
    });
  }

  acceptDrops(element) {
    const card = element.querySelector(".source");
    element.addEventListener("dragover", (event) => {
      event.preventDefault();
      card.classList.add("dropping");
    });
    element.addEventListener("dragleave", () => card.classList.remove("dropping"));
    element.addEventListener("drop", (event) => {
      card.classList.remove("dropping");
      const [file] = event.dataTransfer.files;
      if (!file && event.target.closest("input, textarea")) return; // words go into the field
      event.preventDefault();
      const words = event.dataTransfer.getData("text/plain");
      this.take(file ?? (words && new File([words], "What was dropped")));
    });
  }

  async read() {
    const text = this.text();
    if (!text || studio.busy) return;
    const controller = (this.controller = new AbortController());
    studio.setBusy("reading", true);
    await studio.attempt(async () => {
      if (!studio.session) studio.setSession(await api.create({ name: "First reading" }));
      this.begin(text);
      try {
        await this.consume(api.read(studio.session.id, text, controller.signal), controller.signal);
      } catch (error) {
        // The server may have read more than was shown, or less: show what it has.
        if (this.controller === controller && error.status !== 404) await this.show(studio.session);
        throw error;
      }
      if (!this.stopped) this.choice.value = NEXT;
      announce(`Read. ${plural(studio.session.tokens_read, "token")} in all.`);
      // Something else had let it read, or a past could not be shown: begin anew.
      const { first, length } = studio.log;
      if (first + length !== studio.session.tokens_read) await this.show(studio.session);
    });
    if (this.controller === controller) this.end();
  }

  /** Show what a memory has read so far; what was shown before stays until its past arrives. */
  async show(session) {
    this.controller?.abort();
    this.player.stop();
    const { signal } = (this.controller = new AbortController());
    if (!session) this.open(null);
    else {
      this.begin("");
      this.player.hurry();
      clearTimeout(this.slow);
      this.slow = setTimeout(() => (byId("past").hidden = false), PATIENCE);
      await studio.attempt(() =>
        this.consume(api.history(session.id, signal), signal, () => this.open(session)),
      );
    }
    if (this.controller.signal !== signal) return;
    // Of a past in part nobody knows which tokens these are: nothing could be probed or erased.
    if (this.partial || (signal.aborted && !studio.session)) this.open(null);
    this.end();
  }

  /** Take a memory, of which nothing is shown yet. */
  open(session) {
    this.partial = session !== null;
    studio.log.clear();
    this.pane.clear();
    this.charts.build();
    studio.setSession(session);
  }

  begin(text) {
    studio.setBusy("reading", true);
    this.stopped = false;
    this.unread = text;
    this.taken = studio.log.length; // tokens of the log that are accounted for
    this.seen = 0; // characters of this text that were read
    this.player.pace = Number(byId("pace").value);
    this.pane.rest = text;
    this.pane.following = true;
    for (const id of ["read", "pace-field"]) byId(id).hidden = true;
    for (const id of ["hurry", "stop"]) byId(id).hidden = text === "";
    byId("progress").classList.toggle("shown", text !== "");
  }

  /** Show the pieces as they come; begun() is called before the first event is. */
  async consume(pieces, signal, begun = () => {}) {
    for await (const { event, data } of pieces) {
      signal.throwIfAborted(); // events that had arrived by then still come
      begun();
      begun = () => {};
      if (event === "piece") await this.player.add(data);
      else if (event === "done") {
        await this.player.finish();
        signal.throwIfAborted();
        studio.log.skipped = data.skipped ?? studio.log.skipped;
        this.partial = false;
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
    this.player.stop();
  }

  /** The server ends the reading, and all that it has read arrives; where it does not know of it
   * yet, or does not answer, the page turns away. */
  async stopReading() {
    const { controller } = this;
    this.player.hurry();
    this.stopped = true;
    const { stopped } = await api.stop(studio.session?.id).catch(() => ({}));
    if (!stopped && this.controller === controller && this.unread) this.stop();
  }

  end() {
    for (const id of ["read", "pace-field"]) byId(id).hidden = false;
    for (const id of ["hurry", "stop"]) byId(id).hidden = true;
    byId("progress").classList.remove("shown");
    clearTimeout(this.slow);
    byId("past").hidden = true;
    this.unread = "";
    studio.setBusy("reading", false);
    this.charts.draw();
  }
}
