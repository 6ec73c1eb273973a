// The page: its views, and what happens when one part changes something that another one shows.

import { Ask } from "./ask.js";
import { Charts } from "./charts.js";
import { byId } from "./dom.js";
import { ErasePanel } from "./erase.js";
import { Explain } from "./explain.js";
import { Figure } from "./figure.js";
import { Memories } from "./memories.js";
import { ProbePanel } from "./probe.js";
import { Reader } from "./reader.js";
import { ReadingPane } from "./reading.js";
import { api, studio } from "./studio.js";

const pane = new ReadingPane(studio.log);
const charts = new Charts(studio.log);
const reader = new Reader(pane, charts);
const ask = new Ask();
const probe = new ProbePanel(pane);
const erase = new ErasePanel(pane, reloadAfterErasing);
const memories = new Memories((session) => reader.show(session));
const explain = new Explain();
const figure = new Figure();
let stale = false; // the open memory read on elsewhere

pane.addEventListener("cursor", () => charts.point(pane.cursor));
charts.addEventListener("pick", (event) => pane.choose(event.position));
studio.addEventListener("session", () => probe.clear());
studio.addEventListener("session", () => {
  if (!byId("view-memories").hidden) memories.refresh();
});
studio.addEventListener("stale", () => (stale = true));
studio.addEventListener("gone", () => reader.show(null));
byId("tint").addEventListener("change", (event) => tint(event.target.value));
byId("failure-close").addEventListener("click", () => studio.clearFailure());
addEventListener("themechange", () => charts.draw());
addEventListener("hashchange", navigate);
// A file that misses its place must not take the browser away from the page.
for (const name of ["dragover", "drop"]) {
  addEventListener(name, (event) => {
    if (event.dataTransfer.types.includes("Files")) event.preventDefault();
  });
}

function tint(measure) {
  const texts = {
    surprise: "Tint: how far the memory’s own guess was off, |∇ℓ|, mean over its heads.",
    nats: "Tint: how unlikely the whole model found the token, −log p.",
  };
  byId("tint-help").textContent = texts[measure];
  pane.setMeasure(measure);
}

async function reloadAfterErasing(id, from) {
  const open = () => studio.session?.id === id; // another may have been opened meanwhile
  if (open()) await reader.show(studio.session);
  if (!open()) return;
  probe.clear();
  if (from === undefined) return;
  pane.marks.push(from);
  pane.reveal(from);
  pane.clearLines();
  pane.draw();
}

function navigate() {
  const view = ["memories", "how"].find((name) => location.hash === `#${name}`) ?? "read";
  for (const section of document.querySelectorAll("main > section")) {
    section.hidden = section.dataset.view !== view;
  }
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  figure.shown(view === "how");
  if (view === "memories") memories.refresh();
  if (view === "how") explain.open(pane.cursor);
  if (view === "read") {
    pane.resize();
    charts.draw();
    if (stale && studio.session) {
      stale = false;
      studio.attempt(async () => reader.show(await api.session(studio.session.id)));
    }
  }
  scrollTo(0, 0);
}

async function start() {
  await studio.attempt(async () => {
    [studio.info, studio.texts] = await Promise.all([api.info(), api.texts()]);
    reader.offer();
    ask.update();
    erase.update();
    const id = studio.remembered;
    const session = id ? await api.session(id).catch(() => null) : null;
    // A long past takes a while to show: the page is there before.
    if (session) reader.show(session);
    else studio.setSession(null);
  });
  navigate();
  document.documentElement.dataset.ready = "yes";
}

tint("surprise");
start();
