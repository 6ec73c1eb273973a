// Pieces arrive from the server faster than one can watch; this hands them on at a pace.

import { motion } from "./dom.js";

export const CALM = 450; // tokens a second
const FULL = 30000;
const AHEAD = 8000; // tokens that may wait to be shown before no more are taken

export class Player {
  /** show(piece, from, to) for every part of a piece; drawn() after every frame with parts. */
  constructor(show, drawn) {
    this.show = show;
    this.drawn = drawn;
    this.pace = CALM;
    this.stop();
    document.addEventListener("visibilitychange", () => {
      if (!this.running) return;
      this.cancel();
      this.schedule();
    });
  }

  stop() {
    this.cancel();
    this.queue = [];
    this.waiting = 0;
    this.running = false;
  }

  cancel() {
    cancelAnimationFrame(this.frame);
    clearTimeout(this.timer);
  }

  /** Everything now, without animation. */
  hurry() {
    this.pace = FULL;
  }

  /** Take a piece; resolves when more may come. */
  async add(piece) {
    this.queue.push({ piece, at: 0 });
    this.waiting += piece.text.length;
    if (!this.running) this.begin();
    if (this.waiting > AHEAD) await this.until(() => this.waiting < AHEAD / 2);
  }

  /** Resolves when all was shown. */
  async finish() {
    await this.until(() => this.waiting === 0);
  }

  until(condition) {
    if (condition()) return Promise.resolve();
    return new Promise((resolve) => {
      const timer = setInterval(() => {
        if (condition()) {
          clearInterval(timer);
          resolve();
        }
      }, 20);
    });
  }

  begin() {
    this.running = true;
    this.last = performance.now();
    this.credit = 0;
    this.schedule();
  }

  /** A hidden page gets no frames: there it goes on without them, and all at once. */
  schedule() {
    const step = () => this.step(performance.now());
    if (document.hidden) {
      this.timer = setTimeout(step, 50);
    } else this.frame = requestAnimationFrame(step);
  }

  step(now) {
    const elapsed = Math.min(0.1, (now - this.last) / 1000);
    this.last = now;
    this.credit += elapsed * (motion() && !document.hidden ? this.pace : FULL);
    let shown = 0;
    while (this.queue.length && this.credit >= 1) {
      const head = this.queue[0];
      const take = Math.min(Math.floor(this.credit), head.piece.text.length - head.at);
      this.show(head.piece, head.at, head.at + take);
      head.at += take;
      this.credit -= take;
      shown += take;
      if (head.at === head.piece.text.length) this.queue.shift();
    }
    this.waiting -= shown;
    if (shown) this.drawn();
    this.running = this.queue.length > 0;
    if (this.running) this.schedule();
  }
}
