// The dashboard: asks for the status twice a second, listens to events, and streams a chat. No dependencies.
"use strict";

const byId = (id) => document.getElementById(id);
const PHASE_COLOURS = ["--p0", "--p1", "--p2", "--p3", "--p4", "--p5"];
const BAD_EVENTS = new Set(["rank_lost", "no_capacity", "step_failed", "restart_failed", "rejoin_failed"]);
const GOOD_EVENTS = new Set(["ready", "recovered", "rejoined", "lattice_ready"]);
const WINDOW_S = 60;
const INTERVAL_MS = 500;
const MAX_EVENTS = 200;

let server = null; // the last status
let samples = []; // {at, rate}, seconds
let losses = []; // when ranks were lost, seconds
let last = null; // {at, tokens} of the last status
let conversation = []; // the conversation
let answering = null; // AbortController of the answer that is being written
let lostMeanwhile = []; // ranks to mark in the answer, at its next space

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") Object.assign(node.style, value);
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

// -- Status ---------------------------------------------------------------------------------------------------

async function refresh() {
  try {
    const answer = await fetch("fault_tolerance/status", { cache: "no-store" });
    show(await answer.json());
  } catch {
    badge("not reachable", "bad");
  } finally {
    setTimeout(refresh, INTERVAL_MS);
  }
}

function show(now) {
  server = now;
  badge(now.draining ? "draining" : now.ready ? "ready" : "no capacity", now.ready && !now.draining ? "good" : "bad");
  const model = now.model;
  byId("model").textContent =
    `${model.name} · ${model.experts} experts in ${model.moe_layers} of ${model.layers} layers · ` +
    `context ${model.max_context}`;
  const alive = now.ranks.filter((rank) => rank.state === "serving").length;
  const rate = measure(now.tokens);
  figures([
    [`${alive} / ${now.ranks.length}`, "ranks serving"],
    [now.epoch, "epoch"],
    [now.running, "running"],
    [now.waiting, "waiting"],
    [rate.toFixed(rate < 100 ? 1 : 0), "tokens / s"],
    [now.recoveries, "recoveries"],
  ]);
  const axes = Object.entries(now.axes).filter(([, size]) => size > 1);
  byId("mesh").textContent = axes.map(([name, size]) => `${name} ${size}`).join(" × ");
  ranks(now);
  facts(now);
  draw();
}

function badge(text, kind) {
  const node = byId("state");
  if (node.textContent !== text) node.textContent = text; // a screen reader speaks changes only
  node.className = `badge ${kind}`;
}

function figures(values) {
  byId("figures").replaceChildren(
    ...values.map(([value, name]) =>
      element("div", { class: "figure" }, element("b", {}, String(value)), element("span", { class: "quiet" }, name))),
  );
}

function facts(now) {
  const lattice = Object.entries(now.lattice).map(([loss, share]) => `${loss} ${Math.round(share * 100)} %`);
  const masked = now.masked.map(([layer, expert]) => `${layer}:${expert}`);
  const values = {
    "losses prepared": lattice.join(", ") || "none",
    "slots per rank": now.slots_per_rank,
    "experts masked": masked.length > 6 ? masked.length : masked.join(", ") || "none",
    "requests finished": now.finished,
    "requests failed": now.failed,
    "compiles since ready": now.compiles_after_ready,
  };
  byId("facts").replaceChildren(
    ...Object.entries(values).map(([name, value]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, String(value)))),
  );
}

// Tiles are kept and changed in place, so that a button under the pointer or with the focus stays what it is.
function ranks(now) {
  const box = byId("ranks");
  for (const rank of now.ranks) {
    let tile = byId(`rank-${rank.id}`);
    if (!tile) {
      tile = newTile(rank.id);
      box.append(tile);
    }
    const used = rank.pages ? Math.round((100 * rank.pages_used) / rank.pages) : 0;
    tile.className = `rank ${rank.state}`;
    tile.querySelector(".state").textContent = rank.state;
    tile.querySelector(".pid").textContent = rank.pid === null ? "no process" : `pid ${rank.pid} · ${rank.step_ms.toFixed(0)} ms`;
    tile.querySelector(".use").textContent = `${rank.running} req · cache ${used}%`;
    tile.querySelector(".bar i").style.width = `${used}%`;
    tile.querySelector(".slots").replaceChildren(...slots(rank, now));
    tile.querySelector(".buttons").hidden = !now.chaos;
    for (const button of tile.querySelectorAll("button")) button.disabled = rank.state !== "serving";
  }
}

function newTile(id) {
  const kill = (signal) => () => killRank(id, signal);
  return element("article", { id: `rank-${id}`, "aria-label": `Rank ${id}` },
    element("header", {}, element("b", {}, `rank ${id}`), element("span", { class: "state" })),
    element("div", { class: "pid quiet" }),
    element("div", { class: "use quiet" }),
    element("div", { class: "bar" }, element("i")),
    element("div", { class: "slots", "aria-label": "Experts in slots of the first MoE layers" }),
    element("div", { class: "buttons" },
      element("button", { class: "kill", onclick: kill("SIGKILL"), title: "SIGKILL", "aria-label": `Kill rank ${id}` }, "Kill"),
      element("button", { class: "kill", onclick: kill("SIGSTOP"), title: "SIGSTOP", "aria-label": `Hang rank ${id}` }, "Hang")),
  );
}

function slots(rank, now) {
  return rank.slots.slice(0, 2).map((row) =>
    element("div", {}, ...row.map((expert) => {
      const hue = Math.round((360 * expert) / Math.max(1, now.model.experts));
      const colour = expert < 0 ? "transparent" : `hsl(${hue} 60% 50% / 0.3)`;
      return element("span", { style: { background: colour } }, expert < 0 ? "·" : String(expert));
    })));
}

async function killRank(rank, signal) {
  const answer = await fetch("fault_tolerance/kill", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ rank, signal }),
  });
  if (!answer.ok) addTurn("error", (await answer.json()).error.message);
}

// -- Token rate -----------------------------------------------------------------------------------------------

function measure(tokens) {
  const at = performance.now() / 1000;
  if (last && tokens >= last.tokens) samples.push({ at, rate: (tokens - last.tokens) / (at - last.at) });
  last = { at, tokens };
  samples = samples.filter((sample) => sample.at > at - WINDOW_S);
  const recent = samples.slice(-4);
  return recent.length ? recent.reduce((sum, sample) => sum + sample.rate, 0) / recent.length : 0;
}

function draw() {
  const svg = byId("rate");
  const width = 600, height = 84, now = performance.now() / 1000;
  const top = Math.max(10, ...samples.map((sample) => sample.rate));
  const x = (at) => width * (1 - (now - at) / WINDOW_S);
  const points = samples.map((sample) => `${x(sample.at).toFixed(1)},${(height - (height - 4) * sample.rate / top).toFixed(1)}`);
  byId("peak").textContent = `last minute, peak ${samples.length ? Math.max(...samples.map((s) => s.rate)).toFixed(0) : 0}`;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const shape = (tag, attributes) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  };
  losses = losses.filter((at) => at > now - WINDOW_S);
  const marks = losses.map((at) => shape("line", { x1: x(at), x2: x(at), y1: 0, y2: height }));
  if (!points.length) return svg.replaceChildren(...marks);
  const first = x(samples[0].at).toFixed(1), end = x(samples.at(-1).at).toFixed(1);
  svg.replaceChildren(
    shape("polygon", { points: `${first},${height} ${points.join(" ")} ${end},${height}` }),
    shape("polyline", { points: points.join(" ") }),
    ...marks,
  );
}

// -- Events ---------------------------------------------------------------------------------------------------

function listen() {
  const source = new EventSource("fault_tolerance/events");
  source.onmessage = (message) => addEvent(JSON.parse(message.data));
}

function addEvent(event) {
  const kind = BAD_EVENTS.has(event.kind) ? "bad" : GOOD_EVENTS.has(event.kind) ? "good" : "";
  const time = new Date(event.time * 1000);
  const text = [event.kind.replaceAll("_", " ")];
  if (event.rank !== null) text.push(`rank ${event.rank}`);
  text.push(`epoch ${event.epoch}`);
  if (event.cause) text.push(event.cause);
  if (event.message) text.push(event.message);
  const item = element("li", { class: kind },
    element("time", { datetime: time.toISOString() }, time.toLocaleTimeString([], { hour12: false })), text.join(" · "));
  const phases = Object.entries(event.phases).filter(([name]) => name !== "total");
  if (phases.length) item.append(...phaseBar(phases));
  byId("events").prepend(item);
  while (byId("events").children.length > MAX_EVENTS) byId("events").lastChild.remove();
  if (event.kind === "rank_lost" && Date.now() - time < 5000) {
    losses.push(performance.now() / 1000);
    if (answering) lostMeanwhile.push(event.rank);
  }
}

function phaseBar(phases) {
  const total = phases.reduce((sum, [, ms]) => sum + ms, 0);
  const colour = (i) => `var(${PHASE_COLOURS[i % PHASE_COLOURS.length]})`;
  const label = phases.map(([name, ms]) => `${name} ${ms.toFixed(1)} ms`).join(", ");
  return [
    element("div", { class: "phases", role: "img", "aria-label": label },
      ...phases.map(([, ms], i) => element("i", { style: { flexGrow: ms / (total || 1), background: colour(i) } }))),
    element("div", { class: "legend" },
      ...phases.map(([name, ms], i) =>
        element("span", {}, element("i", { style: { background: colour(i) } }), `${name} ${ms.toFixed(1)}`)),
      element("span", {}, `${total.toFixed(1)} ms in all`)),
  ];
}

// -- Chat -----------------------------------------------------------------------------------------------------

function addTurn(role, text) {
  const turn = element("div", { class: `turn ${role}` }, text);
  byId("turns").append(turn);
  follow(true);
  return turn;
}

// Stay at the end, unless the reader has scrolled up.
function follow(always) {
  const box = byId("turns");
  if (always || box.scrollHeight - box.scrollTop - box.clientHeight < 80) box.scrollTop = box.scrollHeight;
}

async function ask(text) {
  conversation.push({ role: "user", content: text });
  addTurn("user", text);
  const turn = addTurn("assistant", "");
  turn.classList.add("open");
  answering = new AbortController();
  lostMeanwhile = [];
  busy(true);
  let answer = "";
  try {
    for await (const part of stream(answering.signal)) {
      if (part.error) throw new Error(part.error.message);
      const choice = part.choices[0];
      const piece = choice ? (choice.delta ? choice.delta.content : choice.text) : "";
      if (piece) {
        answer += piece;
        if (/^\s/.test(piece)) {
          turn.append(...lostMeanwhile.map((rank) => element("mark", {}, ` ⟂ rank ${rank} lost`)));
          lostMeanwhile = [];
        }
        turn.append(piece);
        follow(false);
      }
      if (part.usage) byId("usage").textContent = `${part.usage.completion_tokens} tokens`;
    }
  } catch (error) {
    if (error.name !== "AbortError") addTurn("error", error.message);
  } finally {
    turn.classList.remove("open");
    if (answer) conversation.push({ role: "assistant", content: answer });
    else { conversation.pop(); turn.remove(); }
    answering = null;
    busy(false);
  }
}

// The answer to the conversation so far, as the JSON objects of OpenAI's stream. A model without a chat template
// continues the text instead.
async function* stream(signal) {
  const chat = !server || server.model.has_chat_template;
  const question = chat ? { messages: conversation } : { prompt: conversation.map((turn) => turn.content).join("") };
  const answer = await fetch(chat ? "v1/chat/completions" : "v1/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...question, stream: true, stream_options: { include_usage: true }, temperature: 0.7 }),
    signal,
  });
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const frames = (rest + value).split("\n\n");
    rest = frames.pop();
    for (const frame of frames) {
      const data = frame.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function busy(yes) {
  byId("send").disabled = yes;
  byId("stop").hidden = !yes;
}

byId("chat").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = byId("prompt").value.trim();
  if (!text || answering) return;
  byId("prompt").value = "";
  ask(text);
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("chat").requestSubmit();
  }
});
byId("stop").addEventListener("click", () => answering?.abort());
byId("clear").addEventListener("click", () => {
  answering?.abort();
  conversation = [];
  byId("turns").replaceChildren();
  byId("usage").textContent = "";
});

refresh();
listen();
