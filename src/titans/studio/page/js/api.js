// The server's HTTP interface. Every failure is an Error whose message can be shown as it is; its
// `status` and `code` are of the server's answer, where there was one, and `session` is the memory
// it was asked of.

const KEY = "titans-token";
const LONG = 20000; // characters from which a text is read in larger pieces

/** A token given as ?token=... is kept for this tab and taken out of the address. */
function token() {
  const address = new URL(location.href);
  const given = address.searchParams.get("token");
  if (given) {
    sessionStorage.setItem(KEY, given);
    address.searchParams.delete("token");
    history.replaceState(null, "", address);
  }
  return sessionStorage.getItem(KEY);
}

const sessionOf = (path) => /\/sessions\/([^/?]+)/.exec(path)?.[1];

async function request(path, options = {}) {
  const { method = "GET", body, signal, session = sessionOf(path) } = options;
  let { headers = {} } = options;
  const secret = token();
  if (secret) headers = { ...headers, Authorization: `Bearer ${secret}` };
  const answer = await fetch(path, { method, headers, body, signal }).catch(lost);
  if (!answer.ok) throw await failure(answer, session);
  return answer;
}

/** What the browser says of a broken connection, in words. */
function lost(error) {
  if (error?.name === "AbortError") throw error;
  throw new Error("The server does not answer. Is titans studio still running?", { cause: error });
}

async function failure(answer, session) {
  const { status } = answer;
  let [message, code] = [`The server answered ${status}.`, null];
  try {
    const { error } = await answer.json();
    [message, code] = [sentence(error.message), error.code];
  } catch {
    // Not JSON: the status says all there is.
  }
  return Object.assign(new Error(message), { status, code, session });
}

/** A message of the server as a whole sentence; names of fields stay as they are. */
function sentence(message) {
  const text = message.replace(/^[a-z]+(?![\w.])/, (word) => word[0].toUpperCase() + word.slice(1));
  return /[.!?]$/.test(text) ? text : `${text}.`;
}

const json = async (path, options) => (await request(path, options)).json().catch(lost);

const post = (path, content, options = {}) =>
  json(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(content),
    ...options,
  });

/** The server's events, one {event, data} after the other; the last is "done". */
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let [rest, last] = ["", ""];
  while (true) {
    const { value, done } = await reader.read().catch(lost);
    if (done && last !== "done") lost();
    if (done) return;
    const blocks = (rest + value).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      let event = "message";
      const data = [];
      for (const line of block.split(/\r?\n/)) {
        if (line.startsWith("event:")) event = line.slice(6).trim();
        else if (line.startsWith("data:")) data.push(line.slice(5));
      }
      if (data.length === 0) continue;
      const content = JSON.parse(data.join("\n"));
      if (event === "error") throw new Error(sentence((content.error ?? content).message));
      last = event;
      yield { event, data: content };
    }
  }
}

const at = (id, rest = "") => `/v1/sessions/${encodeURIComponent(id)}${rest}`;
const studio = (id, rest) => `/studio/sessions/${encodeURIComponent(id)}/${rest}`;

export const api = {
  info: () => json("/studio/info"),
  texts: async () => (await json("/studio/texts")).texts,

  sessions: async () => (await json("/v1/sessions")).sessions,
  session: (id) => json(at(id)),
  create: (content) => post("/v1/sessions", content, { session: content.fork }),
  rename: (id, name) => post(at(id), { name }, { method: "PATCH" }),
  remove: (id) => request(at(id), { method: "DELETE" }),
  reset: (id) => post(at(id, "/reset"), {}),
  ask: (id, content) => post(at(id, "/ask"), content),
  download: async (id) => (await request(at(id, "/memory"))).blob().catch(lost),
  upload: (file, name) =>
    json(`/v1/sessions?name=${encodeURIComponent(name)}`, {
      method: "POST",
      headers: { "Content-Type": "application/octet-stream" },
      body: file,
    }),

  /** Read a text; yields pieces as the memory saw them, and the session at the end. */
  async *read(id, text, signal) {
    const piece = text.length > LONG ? 256 : 64; // tokens
    const answer = await request(at(id, `/read?piece=${piece}`), {
      method: "POST",
      headers: { "Content-Type": "text/plain; charset=utf-8", Accept: "text/event-stream" },
      body: text,
      signal,
    });
    yield* events(answer);
  },
  /** What a memory has read so far, as pieces. */
  async *history(id, signal) {
    yield* events(await request(studio(id, "history"), { signal }));
  },

  compareAsk: (id, content, signal) => post(studio(id, "compare-ask"), content, { signal }),
  probe: (id, content, signal) => post(studio(id, "probe"), content, { signal }),
  erase: (id, content) => post(studio(id, "erase"), content),
  stop: (id) => post(studio(id, "stop"), {}),
  compare: (id, other) => json(studio(id, `compare?with=${encodeURIComponent(other)}`)),
  explain: (content, signal) =>
    post("/studio/explain", content, { signal, session: content.session }),
};
