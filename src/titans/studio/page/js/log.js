// What a memory has read, token by token: what is shown, and the numbers behind the curves.

const BINS = 1 << 16;

/** Values in order, in bounded space: beyond 65,536 of them neighbours share a bin, as maxima. */
export class Series {
  constructor() {
    this.bins = new Float32Array(1024);
    this.width = 1;
    this.length = 0;
    this.largest = 0;
  }

  push(value) {
    const bin = Math.floor(this.length / this.width);
    if (bin === this.bins.length) {
      if (bin < BINS) this.grow();
      else this.halve();
      this.push(value);
      return;
    }
    const fresh = this.length % this.width === 0;
    this.bins[bin] = fresh ? value : Math.max(this.bins[bin], value);
    this.largest = Math.max(this.largest, value);
    this.length += 1;
  }

  grow() {
    const bins = new Float32Array(this.bins.length * 2);
    bins.set(this.bins);
    this.bins = bins;
  }

  halve() {
    for (let i = 0; i < BINS / 2; i++) {
      this.bins[i] = Math.max(this.bins[2 * i], this.bins[2 * i + 1]);
    }
    this.width *= 2;
  }

  /** The value at a position; of long series the largest of its bin. */
  at(index) {
    return index >= 0 && index < this.length ? this.bins[Math.floor(index / this.width)] : NaN;
  }

  /** Smallest and largest bin within positions from..to, and their mean. */
  range(from, to) {
    const first = Math.max(0, Math.floor(from / this.width));
    const last = Math.min(Math.ceil(to / this.width), Math.ceil(this.length / this.width));
    let [low, high, sum] = [Infinity, -Infinity, 0];
    for (let i = first; i < last; i++) {
      if (this.bins[i] < low) low = this.bins[i];
      if (this.bins[i] > high) high = this.bins[i];
      sum += this.bins[i];
    }
    return [low, high, sum / (last - first)];
  }
}

/** Values that are known only at the ends of pieces. */
class Points {
  constructor() {
    this.at = [];
    this.values = [];
    this.largest = 0;
  }

  push(position, value) {
    this.at.push(position);
    this.values.push(value);
    this.largest = Math.max(this.largest, value);
  }

  get last() {
    return this.values.length ? this.values[this.values.length - 1] : NaN;
  }
}

/** A growing array of numbers, one per token. */
class Column {
  constructor() {
    this.values = new Float32Array(4096);
    this.length = 0;
  }

  push(value) {
    if (this.length === this.values.length) {
      const values = new Float32Array(this.length * 2);
      values.set(this.values);
      this.values = values;
    }
    this.values[this.length++] = value;
  }
}

/** Per token: per memory and head. Per piece: likewise. In the order in which they are drawn. */
export const QUANTITIES = [
  "surprise",
  "past_surprise",
  "learning_rate",
  "momentum",
  "decay",
  "moved",
];
const PER_PIECE = new Set(["past_surprise", "moved"]);

export class TokenLog {
  constructor() {
    this.clear();
  }

  clear() {
    this.text = []; // what is shown of each token
    this.nats = new Column(); // -log p of the token; NaN for the first
    this.surprise = new Column(); // mean over memories and heads
    this.written = new Column(); // largest learning rate of any head
    this.writes = 0; // tokens that any head wrote
    this.searched = -1; // length at which facts were looked for
    this.lines = null; // [quantity][memory][head]: Series or Points; null before the first piece
    this.first = 0; // position of the first token shown: a memory from a file has read others
    this.skipped = 0; // tokens before it that the server could read again
  }

  get length() {
    return this.text.length;
  }

  /** Take tokens from..to of a piece. The numbers per piece arrive with its last token. */
  append(piece, from, to) {
    this.lines ??= Object.fromEntries(
      QUANTITIES.map((name) => [
        name,
        piece[name]
          ? piece[name].map((heads) =>
              heads.map(() => new (PER_PIECE.has(name) ? Points : Series)()),
            )
          : null,
      ]),
    );
    if (this.length === 0) this.first = piece.start + from;
    for (let t = from; t < to; t++) {
      this.text.push(piece.text[t]);
      this.nats.push(piece.nll[t] ?? NaN);
      let [sum, heads, rate] = [0, 0, 0];
      piece.surprise.forEach((memory, m) =>
        memory.forEach((values, h) => {
          sum += values[t];
          heads += 1;
          rate = Math.max(rate, piece.learning_rate[m][h][t]);
        }),
      );
      this.surprise.push(heads ? sum / heads : 0);
      this.written.push(rate);
      if (rate > 0) this.writes += 1;
    }
    for (const name of QUANTITIES) {
      this.lines[name]?.forEach((memory, m) =>
        memory.forEach((line, h) => {
          if (!PER_PIECE.has(name)) {
            for (let t = from; t < to; t++) line.push(piece[name][m][h][t]);
          } else if (to === piece.text.length) {
            line.push(this.length, piece[name][m][h]);
          }
        }),
      );
    }
  }

  slice(from, to) {
    return this.text.slice(from, to).join("");
  }

  /** The facts noted in what was read: `«name: code»`, each name with its last code. */
  facts() {
    if (this.searched === this.length) return this.found;
    const found = new Map();
    const whole = this.text.join("");
    for (const match of whole.matchAll(/«(\w{1,12}): (\w{1,12})»/g)) {
      found.set(match[1], {
        name: match[1],
        value: match[2],
        offset: match.index,
        size: match[0].length,
      });
    }
    this.searched = this.length;
    this.found = [...found.values()];
    return this.found;
  }

  /** The token that holds a character of the joined text. */
  tokenAt(offset) {
    let end = 0;
    for (let i = 0; i < this.text.length; i++) {
      end += this.text[i].length;
      if (end > offset) return i;
    }
    return this.text.length - 1;
  }
}
