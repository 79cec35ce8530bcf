// Vercel's AI SDK with its provider for servers that speak the OpenAI API.

import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, embedMany, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { BASE, CAPITAL, CITIES, KEY, MODEL, check, main } from "./kit.mjs";

const provider = createOpenAICompatible({
  name: "aserve",
  baseURL: BASE,
  apiKey: KEY,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const asked = { model: provider(MODEL), prompt: CAPITAL, temperature: 0, maxOutputTokens: 60, maxRetries: 0 };
const Visit = z.object({ city: z.enum(["Paris", "Oslo"]), days: z.number().int().min(1).max(9) });
const weather = tool({
  description: "The weather of a city.",
  inputSchema: z.object({ city: z.enum(CITIES) }),
  execute: async ({ city }) => `sunny in ${city}`,
});

check("generateText", async () => {
  const answer = await generateText({ ...asked, system: "Be short." });
  assert.ok(answer.text);
  assert.ok(answer.usage.outputTokens > 0);
});

check("streamText, with usage", async () => {
  const whole = await generateText(asked);
  const result = streamText(asked);
  let text = "";
  for await (const piece of result.textStream) text += piece;
  assert.equal(text, whole.text);
  assert.match(text, /Paris/);
  assert.equal((await result.usage).outputTokens, whole.usage.outputTokens);
  assert.equal(await result.finishReason, "stop");
});

check("structured output: Output.object, whole and streamed", async () => {
  const whole = await generateText({ ...asked, output: Output.object({ schema: Visit }) });
  Visit.parse(whole.output);
  const result = streamText({ ...asked, output: Output.object({ schema: Visit }) });
  let last = null;
  for await (const piece of result.partialOutputStream) last = piece;
  assert.deepEqual(last, whole.output);
});

check("structured output without a schema: Output.json", async () => {
  const answer = await generateText({ ...asked, maxOutputTokens: 300, output: Output.json() });
  assert.equal(typeof answer.output, "object");
});

check("tools: required, and a step with the result", async () => {
  const answer = await generateText({
    ...asked,
    tools: { weather },
    toolChoice: "required",
    stopWhen: stepCountIs(2),
    prepareStep: ({ stepNumber }) => (stepNumber ? { toolChoice: "none" } : {}),
  });
  assert.equal(answer.steps.length, 2);
  assert.match(answer.steps[0].toolResults[0].output, /sunny/);
});

check("tools: named and auto, streamed", async () => {
  const named = streamText({ ...asked, tools: { weather }, toolChoice: { type: "tool", toolName: "weather" } });
  const calls = await named.toolCalls;
  assert.ok(CITIES.includes(calls[0].input.city));
  const auto = streamText({ ...asked, tools: { weather } });
  let parts = 0;
  for await (const part of auto.fullStream) {
    assert.notEqual(part.type, "error");
    parts += 1;
  }
  assert.ok(parts > 3);
});

check("completions and embeddings", async () => {
  const answer = await generateText({ ...asked, model: provider.completionModel(MODEL) });
  assert.ok(answer.text);
  const found = await embedMany({ model: provider.embeddingModel(MODEL), values: ["a cat", "a dog"] });
  assert.equal(found.embeddings.length, 2);
});

check("errors reach the caller", async () => {
  await assert.rejects(generateText({ ...asked, model: provider("nobody") }), /no model/);
});

await main("ai", "@ai-sdk/openai-compatible");
