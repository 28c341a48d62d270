// /// script
// [tool.clients]
// name = "Vercel AI SDK"
// npm = ["ai@7.0.173", "@ai-sdk/openai-compatible@3.0.92", "@ai-sdk/openai@4.0.118", "zod@4.6.7"]
// ///
// Vercel's AI SDK over its providers for OpenAI-compatible servers and for OpenAI's Responses API.

import { MESSAGES, PROMPT, TOKENS, base, chat, checkWeather, collect, load, model, run, same } from "../trials.mjs";

const { generateText, streamText, Output, tool } = await load("ai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
const { createOpenAI } = await load("@ai-sdk/openai");
const { z } = await load("zod");
const served = createOpenAICompatible({ name: "moejax", baseURL: `${base}/v1`, supportsStructuredOutputs: true });
const openai = createOpenAI({ baseURL: `${base}/v1`, apiKey: "none" });
const limits = { maxOutputTokens: TOKENS, temperature: 0, maxRetries: 0 };
const weather = z.object({ city: z.enum(["Paris", "Rome"]), days: z.number().int().min(1).max(9) });

await run({
  "generateText and streamText, chat": async () => {
    const asked = { model: served(model), messages: MESSAGES, ...limits };
    same((await generateText(asked)).text, await chat());
    same(await collect(streamText(asked).textStream, (part) => part), await chat());
  },
  "generateText, completions": async () => {
    const asked = { model: served.completionModel(model), prompt: PROMPT, ...limits };
    const { text } = await generateText(asked);
    if (!text) throw new Error("no text");
  },
  "generateText and streamText, Responses API": async () => {
    const asked = { model: openai.responses(model), messages: MESSAGES, ...limits };
    same((await generateText(asked)).text, await chat());
    same(await collect(streamText(asked).textStream, (part) => part), await chat());
  },
  "structured output": async () => {
    const output = Output.object({ schema: weather });
    const asked = { model: served(model), messages: MESSAGES, ...limits, maxOutputTokens: 60, output };
    checkWeather((await generateText(asked)).output);
  },
  "a required tool call, whole and streamed": async () => {
    const tools = { weather: tool({ description: "The weather", inputSchema: weather }) };
    const asked = { model: served(model), messages: MESSAGES, ...limits, maxOutputTokens: 60, tools, toolChoice: "required" };
    const [made] = (await generateText(asked)).toolCalls;
    checkWeather(made.input);
    const [streamed] = await streamText(asked).toolCalls;
    same(streamed.input, made.input);
  },
});
