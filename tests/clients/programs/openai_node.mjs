// The openai package for JavaScript.

import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { BASE, CAPITAL, CITIES, KEY, MODEL, NAMED, USER, WEATHER, check, main } from "./kit.mjs";

const client = new OpenAI({ baseURL: BASE, apiKey: KEY, maxRetries: 0, timeout: 120_000 });
const asked = { model: MODEL, messages: USER, temperature: 0, max_tokens: 60 };
const Visit = z.object({ city: z.enum(["Paris", "Oslo"]), days: z.number().int().min(1).max(9) });

check("models", async () => {
  const found = [];
  for await (const model of await client.models.list()) found.push(model.id);
  assert.deepEqual(found, [MODEL]);
});

check("chat, whole and streamed with usage", async () => {
  const whole = await client.chat.completions.create(asked);
  assert.match(whole.choices[0].message.content, /Paris/);
  const stream = await client.chat.completions.create({
    ...asked,
    stream: true,
    stream_options: { include_usage: true },
  });
  let text = "";
  let usage = null;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, whole.choices[0].message.content);
  assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
});

check("the stream helper", async () => {
  const runner = client.chat.completions.stream(asked);
  let text = "";
  runner.on("content", (piece) => (text += piece));
  const answer = await runner.finalChatCompletion();
  assert.equal(text, answer.choices[0].message.content);
});

check("a stream that is aborted", async () => {
  const stream = await client.chat.completions.create({ ...asked, max_tokens: 2000, stream: true });
  for await (const chunk of stream) {
    assert.ok(chunk.id);
    stream.controller.abort();
    break;
  }
});

check("chat.completions.parse with zod", async () => {
  const answer = await client.chat.completions.parse({
    ...asked,
    response_format: zodResponseFormat(Visit, "visit"),
  });
  Visit.parse(answer.choices[0].message.parsed);
});

check("tools: named, streamed, required, auto", async () => {
  const named = await client.chat.completions.create({ ...asked, tools: [WEATHER], tool_choice: NAMED });
  const call = named.choices[0].message.tool_calls[0];
  assert.ok(CITIES.includes(JSON.parse(call.function.arguments).city));
  const runner = client.chat.completions.stream({ ...asked, tools: [WEATHER], tool_choice: NAMED });
  const streamed = await runner.finalMessage();
  assert.equal(streamed.tool_calls[0].function.arguments, call.function.arguments);
  const required = await client.chat.completions.create({
    ...asked,
    tools: [WEATHER],
    tool_choice: "required",
    parallel_tool_calls: false,
  });
  assert.equal(required.choices[0].finish_reason, "tool_calls");
  const result = { role: "tool", tool_call_id: call.id, content: "Sunny." };
  const after = await client.chat.completions.create({
    ...asked,
    messages: [...USER, named.choices[0].message, result],
    tools: [WEATHER],
    max_tokens: 12,
  });
  assert.ok(after.choices[0].message);
});

check("completions and embeddings", async () => {
  const answer = await client.completions.create({ model: MODEL, prompt: "One, two,", max_tokens: 4 });
  assert.ok(answer.choices[0].text);
  const found = await client.embeddings.create({ model: MODEL, input: ["a cat", "a dog"] });
  assert.equal(found.data.length, 2);
  assert.ok(Math.abs(Math.hypot(...found.data[0].embedding) - 1) < 1e-3);
});

check("responses, whole and streamed", async () => {
  const body = { model: MODEL, input: CAPITAL, temperature: 0, max_output_tokens: 40 };
  const whole = await client.responses.create(body);
  assert.match(whole.output_text, /Paris/);
  let last = null;
  for await (const event of await client.responses.create({ ...body, stream: true })) last = event;
  assert.equal(last.type, "response.completed");
});

check("errors as the client's classes", async () => {
  await assert.rejects(client.chat.completions.create({ ...asked, model: "nobody" }), OpenAI.NotFoundError);
  await assert.rejects(client.chat.completions.create({ ...asked, top_p: 3 }), OpenAI.BadRequestError);
});

await main("openai");
