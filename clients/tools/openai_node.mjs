// /// script
// [tool.clients]
// name = "openai (Node)"
// npm = ["openai@7.59.0"]
// ///
// The official OpenAI client for Node: completions, chat, tools and the Responses API.

import { MESSAGES, PROMPT, TOKENS, WEATHER, base, chat, checkWeather, collect, completion, load, model, run, same } from "../trials.mjs";

const { OpenAI } = await load("openai");
const client = new OpenAI({ baseURL: `${base}/v1`, apiKey: "none", maxRetries: 0 });
const asked = { model, messages: MESSAGES, max_tokens: TOKENS, temperature: 0 };
const tool = { type: "function", function: { name: "weather", parameters: WEATHER } };

await run({
  "completions, whole and streamed": async () => {
    const body = { model, prompt: PROMPT, max_tokens: TOKENS, temperature: 0 };
    same((await client.completions.create(body)).choices[0].text, await completion());
    const stream = await client.completions.create({ ...body, stream: true });
    same(await collect(stream, (part) => part.choices[0].text), await completion());
  },
  "chat, whole and streamed": async () => {
    same((await client.chat.completions.create(asked)).choices[0].message.content, await chat());
    const stream = await client.chat.completions.create({ ...asked, stream: true });
    same(await collect(stream, (part) => part.choices[0]?.delta.content), await chat());
  },
  "a required tool call, whole and streamed": async () => {
    const body = { ...asked, tools: [tool], tool_choice: "required", max_tokens: 60 };
    const [made] = (await client.chat.completions.create(body)).choices[0].message.tool_calls;
    checkWeather(JSON.parse(made.function.arguments));
    const last = await client.chat.completions.stream(body).finalChatCompletion();
    same(last.choices[0].message.tool_calls[0].function.arguments, made.function.arguments);
  },
  "runTools: the function is called, and its result answered": async () => {
    let called = 0;
    const weather = { ...tool, function: { ...tool.function, parse: JSON.parse, function: () => `sun ${++called}` } };
    const choice = { type: "function", function: { name: "weather" } };
    const runner = client.chat.completions.runTools({ ...asked, max_tokens: 60, tools: [weather], tool_choice: choice });
    await runner.done();
    same(called, 1);
  },
  "responses, whole and streamed": async () => {
    const body = { model, input: MESSAGES[0].content, max_output_tokens: TOKENS, temperature: 0 };
    same((await client.responses.create(body)).output_text, await chat());
    const stream = await client.responses.create({ ...body, stream: true });
    same(await collect(stream, (event) => (event.type === "response.output_text.delta" ? event.delta : "")), await chat());
  },
  "errors by their classes": async () => {
    try {
      await client.completions.create({ model, prompt: PROMPT, max_tokens: -2 });
    } catch (error) {
      if (error instanceof OpenAI.BadRequestError) return;
      throw error;
    }
    throw new Error("max_tokens -2 raised nothing");
  },
});
