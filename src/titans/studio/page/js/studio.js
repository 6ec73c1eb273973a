// What the modules share: the server's models, the open memory, and what it has read.

import { api } from "./api.js";
import { byId, count } from "./dom.js";
import { TokenLog } from "./log.js";

const OPEN = "titans-open-memory";

class Studio extends EventTarget {
  log = new TokenLog();
  info = null; // of /studio/info
  texts = [];
  session = null;
  busy = false; // a text is being read or shown
  attempts = 0; // that are under way

  get model() {
    const name = this.session?.model ?? this.info.models[0].name;
    return this.info.models.find((model) => model.name === name) ?? this.info.models[0];
  }

  /** The session as the server described it last. Event "session" when it is another memory. */
  setSession(session) {
    const other = session?.id !== this.session?.id;
    this.session = session;
    if (session) sessionStorage.setItem(OPEN, session.id);
    else sessionStorage.removeItem(OPEN);
    byId("chip").hidden = !session;
    if (session) {
      byId("chip-name").textContent = session.name;
      byId("chip-detail").textContent = `${count(session.tokens_read)} tokens read`;
    }
    this.tell(other ? "session" : "session-changed");
  }

  get remembered() {
    return sessionStorage.getItem(OPEN);
  }

  setBusy(busy) {
    this.busy = busy;
    this.tell("busy");
  }

  tell(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }

  /** Show that something went wrong; the message is a whole sentence. */
  fail(error) {
    if (error.name === "AbortError") return;
    byId("failure-text").textContent = error.message;
    byId("failure").hidden = false;
  }

  clearFailure() {
    byId("failure").hidden = true;
  }

  /** Run something that may fail; what fails is shown. Returns undefined then. */
  async attempt(work) {
    if (this.attempts === 0) this.clearFailure();
    this.attempts += 1;
    try {
      return await work();
    } catch (error) {
      this.fail(error);
      return undefined;
    } finally {
      this.attempts -= 1;
    }
  }
}

export const studio = new Studio();
export { api };
