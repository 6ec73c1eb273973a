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
  busyWith = new Set(); // "reading" (or showing) a text, "erasing"
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

  get busy() {
    return this.busyWith.size > 0;
  }

  setBusy(what, busy) {
    this.busyWith[busy ? "add" : "delete"](what);
    this.tell("busy");
  }

  tell(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }

  /** Show that something went wrong; the message is a whole sentence. */
  fail(error) {
    const wanted = error.name === "AbortError" || error.code === "stopped";
    if (wanted || this.closed(error)) return;
    this.say(error.message);
  }

  say(message) {
    byId("failure-text").textContent = message;
    byId("failure").hidden = false;
  }

  /** Has the server lost the open memory? That is said; event "gone" lets the page close it. */
  closed(error) {
    if (error.status !== 404 || !this.session || error.session !== this.session.id) return false;
    this.tell("gone");
    this.say("The server no longer has this memory. What you read next goes into a new one.");
    return true;
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
