// The dashboard: reads the status twice a second, follows the events, and streams a chat. It has no dependencies.
import { addLoss, recentFailures } from "./chart.js";
import { showHeadline, showUnreachable } from "./headline.js";
import { byId, call, clock, count, element } from "./parts.js";

const PHASES = ["detect", "fence", "plan", "adopt", "resume", "join", "load", "connect"]; // each has its own colour
const SHOWN_LAYERS = 12;
const SHOWN_RECOVERIES = 8;
const HEAT_WINDOW_S = 15;
const ARMED_MS = 4000; // for which a button waits for the second press
const INTERVAL_MS = 500;
const MAX_EVENTS = 200;

let server = null; // the latest status
let samples = []; // {at, tokens} of the latest statuses, seconds
let events = []; // the latest first
let conversation = []; // the messages so far
let answering = null; // AbortController of the answer that is being streamed
let lostMeanwhile = []; // lost ranks to mark in the answer, at its next space
let loads = []; // {at, load} of recent statuses, for the heat map
let recoveries = []; // events with phases, latest first
let lastSequence = 0; // sequence of the latest event

// -- The server -----------------------------------------------------------------------------------------------

// Yields the JSON objects of server-sent events as they come.
async function* frames(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "));
      if (data === "data: [DONE]") return;
      if (data) yield JSON.parse(data.slice(6));
    }
  }
}

byId("key-form").addEventListener("submit", () => {
  sessionStorage.setItem("key", byId("key").value.trim());
  byId("key").value = "";
});

// -- Status ---------------------------------------------------------------------------------------------------

async function refresh() {
  try {
    const response = await call("fault_tolerance/status");
    if (response.ok) show(await response.json());
    else badge(response.status === 401 ? "API key needed" : `error ${response.status}`, "bad");
  } catch (error) {
    badge("not reachable", "bad");
    showUnreachable();
    if (!(error instanceof TypeError)) console.error(error);
  } finally {
    setTimeout(refresh, INTERVAL_MS);
  }
}

function show(now) {
  server = now;
  const state = now.draining ? "draining" : now.paused ? "paused" : now.ready ? "ready" : "no capacity";
  badge(state, state === "ready" ? "good" : "bad");
  const model = now.model;
  byId("model").textContent =
    `${model.name} · ${model.experts} experts in ${model.moe_layers} of ${model.layers} layers · ` +
    `context ${model.max_context} · weights ${now.weights_version}` +
    (now.next_weights_version ? ` (${now.next_weights_version} are being loaded)` : "");
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
  coverage(now);
  facts(now);
  experts(now);
  showHeadline(now, recentFailures(), events);
}

function badge(text, kind) {
  const node = byId("state");
  if (node.textContent !== text) node.textContent = text; // a screen reader announces changes only
  node.className = `badge ${kind}`;
}

function figures(values) {
  byId("figures").replaceChildren(
    ...values.map(([value, name]) =>
      element("div", { class: "figure" }, element("b", {}, String(value)), element("span", { class: "quiet" }, name))),
  );
}

function coverage(now) {
  const rows = Object.entries(now.lattice).map(([loss, share]) =>
    element("div", {},
      element("span", {}, `loss of ${loss}`),
      element("span", { class: "bar", role: "meter", "aria-label": `Losses of ${loss} prepared`, "aria-valuemin": 0,
        "aria-valuemax": 100, "aria-valuenow": Math.round(100 * share) }, element("i", { style: { width: `${100 * share}%` } })),
      element("span", { class: "quiet" }, share === 1 ? "all prepared" : `${Math.round(100 * share)} % prepared`)));
  byId("lattice").replaceChildren(...rows);
}

function certificateText(now) {
  const why = [now.certificate_reason, now.certificate_repair && `it would with ${now.certificate_repair}`];
  return [now.certificate, ...why.filter(Boolean)].join("; ");
}

function upgradeText(now) {
  const stage = now.upgrade_stage && `${now.upgrade_stage} to ${now.upgrade_build}`;
  const ended = `${now.upgrades_done} done, ${now.upgrades_rolled_back} rolled back`;
  return [now.upgrade.replace("_", " "), stage, now.upgrade_cause, `front ${now.build}`, ended].filter(Boolean).join("; ");
}

function facts(now) {
  const masked = now.masked.map(([layer, expert]) => `${layer}:${expert}`);
  const values = {
    "slots per rank": now.slots_per_rank,
    "experts masked": masked.length > 6 ? masked.length : masked.join(", ") || "none",
    ...(now.edges.length ? {"edges, calls open": now.edges.map((edge) => `pid ${edge.pid}${edge.host && ` on ${edge.host}`}: ${edge.calls}`).join(", ")} : {}),
    ...Object.fromEntries(now.pools.map((pool) => [`${pool.name} pool`,
      `${pool.serving ? "" : "lost, "}${pool.ranks} ranks, ${pool.running} running, ${pool.waiting} waiting`])),
    ...(now.pools.length ? {"requests sent to decode": `${now.requests_sent}, ${now.requests_returned} returned`} : {}),
    ...(now.upgrade ? {upgrade: upgradeText(now)} : {}),
    "requests finished": now.finished,
    "requests failed": now.failed,
    "requests that broke ranks": `${now.convicted} ended, ${now.suspects} run alone`,
    ...(now.drafts ? {"drafted tokens": `${now.accepted} of ${now.drafted} right, ${(1 + now.accepted / now.drafts).toFixed(2)} tokens a step`} : {}),
    "compiles since ready": now.compiles_after_ready,
    ...(now.certificate ? {certificate: certificateText(now)} : {}),
  };
  byId("facts").replaceChildren(
    ...Object.entries(values).map(([name, value]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, String(value)))),
  );
}

// Tiles are updated in place, so that a button under the pointer or with the focus stays the same element.
function ranks(now) {
  const box = byId("ranks");
  for (const rank of now.ranks) {
    let tile = byId(`rank-${rank.id}`);
    if (!tile) {
      tile = newTile(rank.id);
      box.append(tile);
    }
    const used = rank.pages ? Math.round((100 * rank.pages_used) / rank.pages) : 0;
    const kept = rank.snapshots ? ` · ${rank.snapshots_used}/${rank.snapshots} snapshots` : "";
    tile.className = `rank ${rank.state}`;
    tile.querySelector(".state").textContent = rank.state;
    tile.title = [rank.build, rank.last_failure].filter(Boolean).join("; ");
    const agent = rank.relay && "through its host agent";
    tile.querySelector(".place").textContent = [rank.role, rank.host, rank.rack, agent].filter(Boolean).join(" · ");
    tile.querySelector(".pid").textContent = rank.pid === null ? "no process" : `pid ${rank.pid} · ${rank.step_ms.toFixed(0)} ms`;
    tile.querySelector(".use").textContent = rank.role === "expert" ? "experts only" : `${rank.running} req · cache ${used}%${kept}`;
    tile.querySelector(".bar i").style.width = `${used}%`;
    tile.querySelector(".price").textContent = price(rank);
    tile.querySelector(".buttons").hidden = !now.chaos;
    for (const button of tile.querySelectorAll("button")) button.disabled = rank.state !== "serving";
  }
}

function newTile(id) {
  return element("article", { id: `rank-${id}`, "aria-label": `Rank ${id}` },
    element("header", {}, element("b", {}, `rank ${id}`), element("span", { class: "state" })),
    element("div", { class: "place quiet" }),
    element("div", { class: "pid quiet" }),
    element("div", { class: "use quiet" }),
    element("div", { class: "bar" }, element("i")),
    element("div", { class: "price quiet" }),
    element("div", { class: "buttons" },
      killButton("Kill", id, "SIGKILL"), killButton("Hang", id, "SIGSTOP")),
  );
}

// Kills at the second press: the first one may be a slip of the thumb.
function killButton(word, rank, signal) {
  const button = element("button", { class: "kill", title: signal });
  let armed = 0;
  const show = (text, hint) => {
    button.textContent = text;
    button.classList.toggle("armed", armed !== 0);
    button.setAttribute("aria-label", `${word} rank ${rank}${hint}`);
  };
  const rest = () => {
    clearTimeout(armed);
    armed = 0;
    show(word, "");
  };
  button.addEventListener("click", () => {
    if (armed) {
      rest();
      killRank(rank, signal);
      return;
    }
    armed = setTimeout(rest, ARMED_MS);
    show("Sure?", ": press again to do it");
  });
  rest();
  return button;
}

// The forecast of the loss of this rank.
function price(rank) {
  if (!rank.loss) return "";
  if (!rank.loss.survivable) return "if lost: requests wait";
  const wait = `${rank.loss.measured ? "" : "~"}${rank.loss.stall_ms.toFixed(0)} ms`;
  const load = rank.loss.experts_to_load ? `, reload ${count(rank.loss.experts_to_load, "expert")}` : "";
  return `if lost: ${wait}${load}${rank.loss.prepared ? "" : ", not prepared"}`;
}

// -- Experts --------------------------------------------------------------------------------------------------

// Rows are MoE layers, columns the slots of each rank. The shade is the number of tokens that the expert got in the last
// seconds, divided by its replicas, relative to the busiest expert.
function experts(now) {
  const at = performance.now() / 1000;
  loads.push({ at, load: now.expert_load });
  while (loads.length > 2 && loads[0].at < at - HEAT_WINDOW_S) loads.shift();
  const before = loads[0].load;
  const recent = now.expert_load.map((row, layer) => row.map((count, expert) => count - (before[layer]?.[expert] ?? 0)));
  const counts = recent.flat().some((count) => count > 0) ? recent : now.expert_load;
  const ranks = now.ranks.filter((rank) => rank.slots.length);
  const layers = Math.min(SHOWN_LAYERS, now.expert_load.length);
  const shares = counts.slice(0, layers).map((row, layer) => {
    const replicas = new Map();
    for (const rank of ranks) for (const expert of rank.slots[layer]) replicas.set(expert, (replicas.get(expert) ?? 0) + 1);
    return row.map((count, expert) => count / (replicas.get(expert) || 1));
  });
  const top = Math.max(1, ...shares.flat());
  const cell = (layer, expert) => {
    const share = expert < 0 ? 0 : shares[layer][expert] / top;
    const mix = Math.round(6 + 84 * share); // black is legible on all of it by day, white on the darker part by night
    return element("span", {
      class: expert < 0 ? "empty" : mix > 57 ? "hot" : "",
      style: expert < 0 ? {} : { background: `color-mix(in srgb, var(--accent) ${mix}%, var(--page))` },
      title: expert < 0 ? "empty slot" : `layer ${layer}, expert ${expert}: ${counts[layer][expert]} tokens`,
    }, expert < 0 ? "·" : String(expert));
  };
  const heads = ranks.map((rank) => element("div", { class: "head" }, `rank ${rank.id}`));
  const rows = Array.from({ length: layers }, (_, layer) => [
    element("div", { class: "layer quiet" }, String(layer)),
    ...ranks.map((rank) => element("div", { class: "slots" }, ...rank.slots[layer].map((expert) => cell(layer, expert)))),
  ]);
  const box = byId("experts");
  box.style.gridTemplateColumns = `auto repeat(${ranks.length}, minmax(max-content, 1fr))`;
  box.replaceChildren(element("div", { class: "head quiet" }, "layer"), ...heads, ...rows.flat());
  const more = now.expert_load.length - layers;
  const window = counts === recent ? `tokens of the last ${HEAT_WINDOW_S} s` : "tokens since the start";
  byId("experts-note").textContent = window + (more > 0 ? `, first ${layers} of ${now.expert_load.length} layers` : "");
}

async function killRank(rank, signal) {
  const response = await call("fault_tolerance/kill", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ rank, signal }),
  });
  if (!response.ok) addTurn("error", (await response.json()).error.message);
}

// -- Token rate -----------------------------------------------------------------------------------------------

// Tokens per second over the last two seconds.
function measure(tokens) {
  const at = performance.now() / 1000;
  if (samples.length && tokens < samples.at(-1).tokens) samples = []; // another front counts from 0
  samples = [...samples, { at, tokens }].slice(-5);
  return samples.length > 1 ? (tokens - samples[0].tokens) / (at - samples[0].at) : 0;
}

// -- Events ---------------------------------------------------------------------------------------------------

// Shows events as they happen. Continues after the latest one when the connection breaks.
async function listen() {
  try {
    const response = await call(`fault_tolerance/events?after=${lastSequence}`);
    if (response.ok) {
      for await (const event of frames(response)) {
        lastSequence = event.sequence;
        addEvent(event);
      }
    }
  } catch (error) {
    if (!(error instanceof TypeError)) console.error(error);
  }
  setTimeout(listen, 2 * INTERVAL_MS);
}

function addEvent(event) {
  const time = new Date(event.time * 1000);
  const text = [event.kind.replaceAll("_", " ")];
  if (event.rank !== null) text.push(`rank ${event.rank}`);
  text.push(`epoch ${event.epoch}`);
  if (event.cause) text.push(event.cause);
  if (event.message) text.push(event.message);
  byId("events").prepend(element("li", { class: event.severity }, clock(time), text.join(" · ")));
  while (byId("events").children.length > MAX_EVENTS) byId("events").lastChild.remove();
  if (event.kind === "recovered" || event.kind === "rejoined") addRecovery(event);
  events = [event, ...events].slice(0, MAX_EVENTS);
  if (event.kind === "rank_lost") {
    addLoss(event.time);
    if (answering && Date.now() - time < 5000) lostMeanwhile.push(event.rank);
  }
}

// Shows the latest recoveries and rejoins, one bar each, on a common scale of milliseconds.
function addRecovery(event) {
  const phases = Object.entries(event.phases).filter(([name]) => name !== "total");
  if (!phases.length || recoveries.some((r) => r.event.kind === "rejoined" && r.event.epoch === event.epoch)) return;
  recoveries = [{ event, phases, total: phases.reduce((sum, [, ms]) => sum + ms, 0) }, ...recoveries].slice(0, SHOWN_RECOVERIES);
  const longest = Math.max(...recoveries.map((r) => r.total));
  byId("recoveries").replaceChildren(...recoveries.map((r) => recoveryBar(r, longest)));
  const lost = recoveries.filter((r) => r.event.kind === "recovered");
  byId("recoveries-note").textContent = lost.length ? `last one ${lost[0].total.toFixed(0)} ms` : "";
}

function recoveryBar({ event, phases, total }, longest) {
  const colour = (name) => `var(--p${PHASES.indexOf(name) < 0 ? PHASES.length : PHASES.indexOf(name)})`;
  const label = phases.map(([name, ms]) => `${name} ${ms.toFixed(1)} ms`).join(", ");
  const what = event.kind === "recovered" ? `rank ${event.rank ?? "?"} lost` : `rank ${event.rank} rejoined`;
  return element("li", {},
    element("div", { class: "what" }, clock(new Date(event.time * 1000)), element("b", {}, what),
      element("span", { class: "quiet" }, `epoch ${event.epoch} · ${total.toFixed(1)} ms`)),
    element("div", { class: "phases", role: "img", "aria-label": label, style: { width: `${Math.max(4, 100 * total / longest)}%` } },
      ...phases.map(([name, ms]) => element("i", { style: { flexGrow: ms / (total || 1), background: colour(name) } }))),
    element("div", { class: "legend" },
      ...phases.map(([name, ms]) =>
        element("span", {}, element("i", { style: { background: colour(name) } }), `${name} ${ms.toFixed(1)}`))));
}

// -- Chat -----------------------------------------------------------------------------------------------------

function addTurn(role, text) {
  const turn = element("div", { class: `turn ${role}` }, text);
  byId("turns").append(turn);
  follow(true);
  return turn;
}

// Scrolls to the end, unless the reader has scrolled up.
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

// Yields the answer to the conversation as the JSON objects of OpenAI's stream. A model without a chat template
// continues the text instead.
async function* stream(signal) {
  const chat = !server || server.model.has_chat_template;
  const question = chat ? { messages: conversation } : { prompt: conversation.map((turn) => turn.content).join("") };
  const response = await call(chat ? "v1/chat/completions" : "v1/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...question, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  yield* frames(response);
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
