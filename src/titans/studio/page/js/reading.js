// The text as it is read: every token tinted by surprise, marked where the memory wrote.
// Only the lines in view are in the document, so a text may have millions of tokens.

import { announce, byId, h, number } from "./dom.js";

const SPARE = 6; // lines drawn above and below the view
const PREVIEW = 3000; // characters of unread text that are laid out
const LEVELS = 8; // of tint, in the style sheet

export class ReadingPane extends EventTarget {
  /** Events: "cursor" (a token was chosen), "probe" (Enter), "erase" (Delete). */
  constructor(log) {
    super();
    this.log = log;
    this.scroller = byId("pane");
    this.sheet = byId("pane-sheet");
    this.jump = byId("jump");
    this.measure = "surprise";
    this.rest = "";
    this.cursor = null;
    this.anchor = null; // the other end of the selection
    this.marks = []; // tokens before which something was erased
    this.following = true;
    this.drawn = new Map();
    this.reset();
    this.listen();
    new ResizeObserver(() => this.resize()).observe(this.scroller);
  }

  /** Lay everything out anew. */
  reset() {
    this.starts = [0]; // first token of every line
    this.column = 0;
    this.laid = 0;
    this.scaled = 0;
    this.low = 0;
    this.high = 1;
    this.clearLines();
    this.update();
  }

  clear(rest = "") {
    this.rest = rest;
    this.cursor = this.anchor = null;
    this.marks = [];
    this.following = true;
    this.reset();
    this.scroller.scrollTop = 0;
  }

  clearLines() {
    this.drawn.forEach((line) => line.remove());
    this.drawn.clear();
  }

  resize() {
    const probe = h("span", {}, "0".repeat(50));
    this.sheet.append(probe);
    const width = probe.getBoundingClientRect().width / 50;
    this.lineHeight = Math.round(parseFloat(getComputedStyle(this.sheet).lineHeight));
    probe.remove();
    const columns = Math.max(16, Math.floor((this.sheet.clientWidth - 1) / width));
    if (columns === this.columns) return this.update();
    this.columns = columns;
    this.reset();
  }

  /** Take up tokens that the log has gained, and draw. */
  update() {
    if (!this.columns) return;
    const before = this.starts.length - 1;
    for (; this.laid < this.log.length; this.laid++)
      this.place(this.log.text[this.laid], this.laid);
    this.preview = this.layOut(this.rest.slice(0, PREVIEW));
    for (const index of this.drawn.keys()) if (index >= before) this.forget(index);
    this.rescale();
    byId("text").classList.toggle("dense", this.log.writes > 0.3 * this.log.length);
    this.sheet.style.height = `${this.lineCount * this.lineHeight + 4}px`;
    if (this.following && this.log.length && this.rest) this.scrollToLine(this.starts.length - 1);
    this.draw();
  }

  get lineCount() {
    return this.starts.length + this.preview.length - 1;
  }

  place(text, index) {
    const width = [...text].length;
    if (this.column && this.column + width > this.columns) {
      this.starts.push(index);
      this.column = 0;
    }
    this.column += width;
    if (text.includes("\n")) {
      this.starts.push(index + 1);
      this.column = 0;
    }
  }

  /** Unread text as lines; the first goes on where the read text ends. */
  layOut(text) {
    const lines = [""];
    let column = this.column;
    for (const character of text) {
      if (column >= this.columns) {
        lines.push("");
        column = 0;
      }
      lines[lines.length - 1] += character;
      column += 1;
      if (character === "\n") {
        lines.push("");
        column = 0;
      }
    }
    return lines;
  }

  forget(index) {
    this.drawn.get(index)?.remove();
    this.drawn.delete(index);
  }

  /** Tints span the middle of what was seen; looked at again whenever the text has doubled. */
  rescale() {
    if (this.log.length < Math.max(32, 1.5 * this.scaled)) return;
    this.scaled = this.log.length;
    const values = this.values()
      .slice(0, this.log.length)
      .filter((x) => !Number.isNaN(x))
      .sort();
    this.low = values[Math.floor(values.length * 0.5)];
    this.high = values[Math.floor(values.length * 0.995)];
    this.clearLines();
  }

  values() {
    return (this.measure === "surprise" ? this.log.surprise : this.log.nats).values;
  }

  setMeasure(measure) {
    this.measure = measure;
    this.scaled = 0;
    this.rescale();
    this.draw();
  }

  draw() {
    if (!this.columns) return;
    const top = this.scroller.scrollTop;
    const first = Math.max(0, Math.floor(top / this.lineHeight) - SPARE);
    const shown = Math.ceil(this.scroller.clientHeight / this.lineHeight) + 2 * SPARE;
    const last = Math.min(this.lineCount, first + shown);
    for (const index of this.drawn.keys()) if (index < first || index >= last) this.forget(index);
    for (let index = first; index < last; index++) {
      if (this.drawn.has(index)) continue;
      const line = this.line(index);
      line.style.top = `${index * this.lineHeight}px`;
      this.drawn.set(index, line);
      this.sheet.append(line);
    }
    const end = (this.starts.length - 1) * this.lineHeight;
    const away = end < top || end > top + this.scroller.clientHeight;
    this.jump.hidden = !(away && this.rest && this.log.length);
  }

  line(index) {
    const line = h("div", { class: "text-line" });
    if (index < this.starts.length) {
      const end = this.starts[index + 1] ?? this.log.length;
      for (let token = this.starts[index]; token < end; token++) {
        if (this.marks.includes(token)) line.append(h("i", { class: "gap", title: "erased here" }));
        line.append(this.token(token));
      }
    }
    if (index >= this.starts.length - 1) {
      if (index === this.starts.length - 1 && this.rest && this.log.length) {
        line.append(h("i", { class: "reader" }));
      }
      const unread = this.preview[index - this.starts.length + 1] ?? "";
      if (unread) line.append(h("span", { class: "unread" }, unread.replace("\n", "")));
    }
    return line;
  }

  token(index) {
    const classes = ["t"];
    const value = this.values()[index];
    const level = Math.round((LEVELS * (value - this.low)) / (this.high - this.low || 1));
    if (level > 0) classes.push(`s${Math.min(level, LEVELS)}`);
    if (this.log.written.values[index] > 0) classes.push("written");
    const [from, to] = this.selection() ?? [0, 0];
    if (index >= from && index < to) classes.push("selected");
    if (index === this.cursor) classes.push("cursor");
    return h(
      "span",
      { class: classes.join(" "), dataset: { i: index } },
      visible(this.log.text[index]),
    );
  }

  /** Selected tokens as [from, to), or null where there are not at least two. */
  selection() {
    return this.anchor === null || this.anchor === this.cursor ? null : this.passage();
  }

  /** The same; without a selection the character at the cursor, or null where there is none. */
  passage() {
    if (this.cursor === null) return null;
    const { text, length } = this.log;
    const anchor = this.anchor ?? this.cursor;
    let [from, to] = [Math.min(anchor, this.cursor), Math.max(anchor, this.cursor) + 1];
    // A character of several byte tokens is shown at its last: take it whole.
    while (from > 0 && text[from - 1] === "") from -= 1;
    while (to < length && text[to - 1] === "") to += 1;
    return [from, to];
  }

  choose(index, { extend = false, scroll = true } = {}) {
    if (this.log.length === 0) return;
    index = Math.max(0, Math.min(index, this.log.length - 1));
    if (!extend) this.anchor = index;
    this.cursor = index;
    if (scroll) this.reveal(index);
    this.clearLines();
    this.draw();
    this.dispatchEvent(new Event("cursor"));
  }

  select(from, to) {
    this.anchor = from;
    this.choose(to - 1, { extend: true });
  }

  lineOf(token) {
    let [low, high] = [0, this.starts.length - 1];
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.starts[middle] <= token) low = middle;
      else high = middle - 1;
    }
    return low;
  }

  reveal(token) {
    this.following = false;
    const top = this.lineOf(token) * this.lineHeight;
    const view = this.scroller.clientHeight;
    if (
      top < this.scroller.scrollTop ||
      top > this.scroller.scrollTop + view - 2 * this.lineHeight
    ) {
      this.scroller.scrollTop = top - view / 2;
    }
  }

  scrollToLine(line) {
    const top = line * this.lineHeight - this.scroller.clientHeight * 0.6;
    if (top > this.scroller.scrollTop) this.scroller.scrollTop = top;
  }

  follow() {
    this.following = true;
    this.scroller.scrollTop = Math.max(
      0,
      (this.starts.length - 1) * this.lineHeight - this.scroller.clientHeight * 0.6,
    );
    this.draw();
  }

  listen() {
    this.scroller.addEventListener("scroll", () => this.draw(), { passive: true });
    for (const name of ["wheel", "touchmove"]) {
      this.scroller.addEventListener(name, () => (this.following = false), { passive: true });
    }
    this.jump.addEventListener("click", () => this.follow());
    this.sheet.addEventListener("pointerdown", (event) => {
      const index = tokenUnder(event.target);
      if (index === null || event.button !== 0) return;
      event.preventDefault();
      this.scroller.focus({ preventScroll: true });
      this.choose(index, { extend: event.shiftKey, scroll: false });
      if (event.pointerType === "touch") return;
      this.dragging = true;
    });
    this.sheet.addEventListener("pointermove", (event) => {
      if (!this.dragging) return;
      const index = tokenUnder(document.elementFromPoint(event.clientX, event.clientY));
      if (index !== null && index !== this.cursor)
        this.choose(index, { extend: true, scroll: false });
    });
    addEventListener("pointerup", () => {
      if (this.dragging && !this.selection()) this.dispatchEvent(new Event("probe"));
      this.dragging = false;
    });
    this.sheet.addEventListener("click", (event) => {
      if (event.pointerType === "touch" && tokenUnder(event.target) !== null) {
        this.dispatchEvent(new Event("probe"));
      }
    });
    this.scroller.addEventListener("keydown", (event) => this.key(event));
  }

  key(event) {
    const here =
      this.cursor ??
      Math.max(0, this.starts[Math.floor(this.scroller.scrollTop / this.lineHeight)] ?? 0);
    const line = this.lineOf(here);
    const column = here - this.starts[line];
    const inLine = (index) => {
      const wanted = Math.max(0, Math.min(index, this.starts.length - 1));
      const end = this.starts[wanted + 1] ?? this.log.length;
      return Math.min(this.starts[wanted] + column, Math.max(end - 1, this.starts[wanted]));
    };
    const page = Math.max(1, Math.floor(this.scroller.clientHeight / this.lineHeight) - 2);
    const moves = {
      ArrowLeft: () => here - 1,
      ArrowRight: () => (this.cursor === null ? here : here + 1),
      ArrowUp: () => inLine(line - 1),
      ArrowDown: () => inLine(line + 1),
      PageUp: () => inLine(line - page),
      PageDown: () => inLine(line + page),
      Home: () => (event.ctrlKey ? 0 : this.starts[line]),
      End: () => (event.ctrlKey ? this.log.length : (this.starts[line + 1] ?? this.log.length) - 1),
    };
    if (moves[event.key] && !event.altKey && !event.metaKey && this.log.length) {
      event.preventDefault();
      this.choose(moves[event.key](), { extend: event.shiftKey });
      this.say();
    } else if (event.key === "Enter" && this.cursor !== null) {
      this.dispatchEvent(new Event("probe"));
    } else if ((event.key === "Delete" || event.key === "Backspace") && this.cursor !== null) {
      event.preventDefault();
      this.dispatchEvent(new Event("erase"));
    } else if (event.key === "Escape" && this.selection()) {
      this.choose(this.cursor);
    }
  }

  say() {
    const [token, rate] = [this.cursor, this.log.written.values[this.cursor]];
    const surprise = number(this.log.surprise.values[token]);
    announce(
      `Token ${token}, ${spoken(this.log.text[token])}, surprise ${surprise}` +
        (rate > 0 ? `, written at rate ${number(rate)}` : ", not written"),
    );
  }
}

function tokenUnder(element) {
  const token = element?.closest?.(".t");
  return token ? Number(token.dataset.i) : null;
}

/** A token as the page shows it: line ends take the width of a space. */
export function visible(text) {
  return text.replaceAll("\r", "").replaceAll("\n", " ").replaceAll("\t", " ");
}

/** A token in words, where it would not be seen. */
export function spoken(text) {
  const names = {
    " ": "space",
    "\n": "line end",
    "\t": "tab",
    "\r": "carriage return",
    "": "part of the next character",
  };
  return names[text] ?? text;
}
