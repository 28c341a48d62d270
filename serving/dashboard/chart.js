// The chart of the token rate, from the history that the server keeps.
import { byId, call, count, timeOfDay } from "./parts.js";

const WIDTH = 600, HEIGHT = 110;
const WINDOWS = { second: 600, minute: 86400 }; // seconds
const SHORTEST_S = 60; // of a server that has just started
const EVERY_MS = { second: 2000, minute: 30000 };

let by = "second";
let columns = null; // of the window that is shown
let failures = []; // {at, failed} of the last ten minutes
let losses = []; // when ranks were lost, seconds since the epoch
let timer = null;

export const recentFailures = () => failures;

export function addLoss(at) {
  losses = [...losses, at].slice(-500);
  draw();
}

async function read() {
  try {
    const response = await call(`fault_tolerance/history?by=${by}`);
    if (response.ok) {
      columns = await response.json();
      if (by === "second") failures = columns.at.map((at, i) => ({ at, failed: columns.failed[i] }));
      draw();
    }
  } catch (error) {
    if (!(error instanceof TypeError)) console.error(error);
  }
  timer = setTimeout(read, EVERY_MS[by]);
}

function draw() {
  if (!columns) return;
  const now = Date.now() / 1000;
  const window = Math.min(WINDOWS[by], Math.max(SHORTEST_S, now - (columns.at[0] ?? now)));
  const x = (at) => WIDTH * (1 - (now - at) / window);
  const top = Math.max(10, ...columns.tokens_per_s);
  const y = (rate) => HEIGHT - (HEIGHT - 6) * rate / top;
  const points = columns.at.map((at, i) => [x(at), y(columns.tokens_per_s[i])]).filter(([at]) => at >= 0);
  const marks = losses.filter((at) => at > now - window).map((at) => shape("line", { x1: x(at), x2: x(at), y1: 0, y2: HEIGHT }));
  const svg = byId("rate");
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  const path = points.map(([a, b]) => `${a.toFixed(1)},${b.toFixed(1)}`).join(" ");
  const area = points.length ? [
    shape("polygon", { points: `${points[0][0].toFixed(1)},${HEIGHT} ${path} ${points.at(-1)[0].toFixed(1)},${HEIGHT}` }),
    shape("polyline", { points: path }),
  ] : [];
  svg.replaceChildren(...area, ...marks);
  const peak = Math.max(0, ...columns.tokens_per_s).toFixed(0);
  byId("peak").textContent = `peak ${peak}${marks.length ? `, ${count(marks.length, "lost rank")} marked` : ""}`;
  const from = new Date((now - window) * 1000);
  byId("rate-from").textContent = timeOfDay(from);
  svg.setAttribute("aria-label", `Tokens per second since ${timeOfDay(from)}: peak ${peak}, ${count(marks.length, "rank")} lost`);
}

function shape(tag, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

for (const button of document.querySelectorAll("#rate-window button")) {
  button.addEventListener("click", () => {
    by = button.dataset.by;
    for (const other of document.querySelectorAll("#rate-window button")) other.setAttribute("aria-pressed", other === button);
    clearTimeout(timer);
    read();
  });
}
read();
