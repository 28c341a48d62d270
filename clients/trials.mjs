// Trials of a tool that runs in Node: as clients/trials.py, for programs of the npm registry.

export const PROMPT = "ROMEO:";
export const TOKENS = 12;
export const MESSAGES = [{ role: "user", content: "Good morrow, cousin." }];
export const WEATHER = {
  type: "object",
  properties: { city: { enum: ["Paris", "Rome"] }, days: { type: "integer", minimum: 1, maximum: 9 } },
  required: ["city", "days"],
  additionalProperties: false,
};
export const base = process.env.CLIENTS_URL;
export const model = process.env.CLIENTS_MODEL;

// The module of a package in the environment of the tool.
export async function load(name) {
  const { createRequire } = await import("node:module");
  const require = createRequire(`${process.env.CLIENTS_ENVIRONMENT}/`);
  return require(name);
}

async function call(path, body) {
  const headers = { "Content-Type": "application/json" };
  const answer = await fetch(base + path, { method: "POST", headers, body: JSON.stringify(body) });
  return answer.json();
}

// The right continuation of PROMPT.
export async function completion() {
  const body = { model, prompt: PROMPT, max_tokens: TOKENS, temperature: 0 };
  return (await call("/v1/completions", body)).choices[0].text;
}

// The right answer to MESSAGES.
export async function chat() {
  const body = { model, messages: MESSAGES, max_tokens: TOKENS, temperature: 0 };
  return (await call("/v1/chat/completions", body)).choices[0].message.content;
}

export function same(found, right) {
  const [one, other] = [JSON.stringify(found), JSON.stringify(right)];
  if (one !== other) throw new Error(`the answer is ${one}; right is ${other}`);
}

export function checkWeather(value) {
  const good = ["Paris", "Rome"].includes(value?.city) && value.days >= 1 && value.days <= 9;
  if (!good || Object.keys(value).length !== 2) throw new Error(`${JSON.stringify(value)} has another form`);
}

export async function collect(stream, read) {
  let text = "";
  for await (const part of stream) text += read(part) ?? "";
  return text;
}

// Runs the trials, an object of functions by what they try, and prints one line of JSON for each.
export async function run(trials) {
  for (const [trial, attempt] of Object.entries(trials)) {
    let [result, remark] = ["works", null];
    try {
      remark = (await attempt()) ?? null;
    } catch (error) {
      [result, remark] = ["fails", `${error.name}: ${error.message}`];
      console.error(error);
    }
    console.log(`{"trial": ${JSON.stringify(trial)}, "result": "${result}", "remark": ${JSON.stringify(remark)}}`);
  }
  process.exit(0);
}
