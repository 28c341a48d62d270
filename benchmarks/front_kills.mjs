// The streams of the official OpenAI client for Node, each client one at a time, until standard input ends. Prints a line
// of JSON for each stream, with the clock's time, in seconds, of every piece of text. See benchmarks/front_kills.py.
// Usage: node benchmarks/front_kills.mjs ENVIRONMENT ADDRESS MODEL CLIENTS MAX_TOKENS PROMPTS

import { createRequire } from "node:module";

const [environment, address, model, clients, tokens, prompts] = process.argv.slice(2);
const { OpenAI } = createRequire(`${environment}/`)("openai");
const api = new OpenAI({ baseURL: `http://${address}/v1`, apiKey: "none" });
const wanted = JSON.parse(prompts);
let going = true;
let sent = 0;
process.stdin.on("end", () => (going = false)).resume();

async function one() {
  const stream = { prompt: wanted[sent++ % wanted.length], text: "", times: [], error: null };
  try {
    const asked = { model, prompt: stream.prompt, max_tokens: Number(tokens), temperature: 0, ignore_eos: true };
    let finished = null;
    for await (const part of await api.completions.create({ ...asked, stream: true })) {
      const choice = part.choices[0];
      if (choice?.text) {
        stream.text += choice.text;
        stream.times.push(Date.now() / 1000);
      }
      finished = choice?.finish_reason ?? finished;
    }
    if (finished !== "length") stream.error = `the stream ended with finish_reason ${finished}`;
  } catch (error) {
    stream.error = `${error.name}: ${error.message}`;
    await new Promise((resolve) => setTimeout(resolve, 250));
  }
  console.log(JSON.stringify(stream));
}

await Promise.all(Array.from({ length: Number(clients) }, async () => {
  while (going) await one();
}));
