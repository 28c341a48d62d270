// What an operator on call needs first: does anybody lose tokens, what is lost, what comes next.
import { byId, count, element, timeOfDay } from "./parts.js";

// Shows one sentence, and at most four lines below it. `failures` is [{at, failed}] of the last ten minutes, `events` the
// latest event first.
export function showHeadline(status, failures, events) {
  const { kind, title, lines } = headline(status, failures, events);
  showLines(kind, title, lines);
}

export function showUnreachable() {
  showLines("bad", "The server does not answer.", ["A standby front takes over within seconds; ranks, weights and caches wait for it."]);
}

function showLines(kind, title, lines) {
  byId("now").className = kind;
  if (byId("headline").textContent !== title) byId("headline").textContent = title; // a screen reader announces changes
  byId("headline-lines").replaceChildren(...lines.map((line) => element("li", {}, line)));
}

function headline(status, failures, events) {
  const wanted = status.ranks.filter((rank) => rank.state !== "out");
  const serving = wanted.filter((rank) => rank.state === "serving").length;
  const failed = failures.reduce((sum, sample) => sum + sample.failed, 0);
  const lines = [failed ? `${count(failed, "request")} failed in the last ten minutes.` : "No request failed in the last ten minutes."];
  const missing = missingRanks(wanted, events);
  if (!status.ready) {
    const waiting = `${count(status.waiting, "request")} ${status.waiting === 1 ? "waits" : "wait"}; ${serving} of ${count(wanted.length, "rank")} serve.`;
    return { kind: "bad", title: "No request can be served.", lines: [waiting, ...missing, ...lines] };
  }
  if (status.draining || status.paused) {
    const state = status.draining ? "draining" : "paused";
    return { kind: "warn", title: `The server is ${state}.`, lines: [`${count(status.running, "request")} still running.`, ...lines] };
  }
  if (failed) return { kind: "bad", title: `${count(failed, "request")} failed lately.`, lines: [...missing, ...next(status)] };
  if (status.masked.length) {
    const title = `Answers are degraded: ${count(status.masked.length, "expert")} missing.`;
    return { kind: "warn", title, lines: ["They are loaded between steps.", ...missing, ...lines] };
  }
  if (serving < wanted.length) {
    return { kind: "warn", title: `No stream is lost: ${serving} of ${wanted.length} ranks serve.`, lines: [...missing, ...lines, ...next(status)] };
  }
  return { kind: "good", title: `All streams are served by ${serving} of ${count(wanted.length, "rank")}.`, lines: [...lines, ...next(status)] };
}

// For each rank that does not serve: when and why it was lost, and what is done about it.
function missingRanks(ranks, events) {
  const done = { dead: "it is waiting for a replacement", starting: "its replacement is starting",
    joining: "its replacement is joining", draining: "its requests move to other ranks" };
  return ranks.filter((rank) => rank.state !== "serving").slice(0, 2).map((rank) => {
    const loss = events.find((event) => event.kind === "rank_lost" && event.rank === rank.id);
    const cause = loss ? ` was lost at ${timeOfDay(new Date(loss.time * 1000))} (${loss.message || loss.cause})` : "";
    return `Rank ${rank.id}${cause}${cause ? "; " : ": "}${done[rank.state] ?? rank.state}.`;
  });
}

// The forecast of the next loss.
function next(status) {
  const losses = status.ranks.filter((rank) => rank.state === "serving" && rank.loss);
  if (!losses.length) return [];
  const fatal = losses.filter((rank) => !rank.loss.survivable).map((rank) => rank.id);
  if (fatal.length) return [`The loss of rank ${fatal.slice(0, 6).join(", ")} would stop the server until it is replaced.`];
  const unprepared = losses.filter((rank) => !rank.loss.prepared).length;
  if (unprepared) return [`The next loss is being prepared for: ${losses.length - unprepared} of ${count(losses.length, "rank")} done.`];
  const worst = losses.reduce((a, b) => (a.loss.stall_ms >= b.loss.stall_ms ? a : b));
  return [`The next loss of a rank costs streams at most ${worst.loss.stall_ms.toFixed(0)} ms (rank ${worst.id}) and no token.`];
}
