// The Anthropic package for JavaScript.

import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";
import { CITIES, KEY, MODEL, SERVER, USER, WEATHER, check, main } from "./kit.mjs";

const client = new Anthropic({ baseURL: SERVER, apiKey: KEY, maxRetries: 0, timeout: 120_000 });
const asked = { model: MODEL, max_tokens: 60, temperature: 0, messages: USER };
const weather = { name: "weather", input_schema: WEATHER.function.parameters };

check("messages, whole and streamed", async () => {
  const whole = await client.messages.create(asked);
  assert.match(whole.content[0].text, /Paris/);
  const streamed = await client.messages.stream(asked).finalMessage();
  assert.equal(streamed.content[0].text, whole.content[0].text);
  assert.equal(streamed.stop_reason, whole.stop_reason);
});

check("tools, whole and streamed", async () => {
  const body = { ...asked, tools: [weather], tool_choice: { type: "tool", name: "weather" } };
  const whole = await client.messages.create(body);
  const use = whole.content.find((block) => block.type === "tool_use");
  assert.ok(CITIES.includes(use.input.city));
  const streamed = await client.messages.stream(body).finalMessage();
  assert.deepEqual(streamed.content.find((block) => block.type === "tool_use").input, use.input);
});

check("count_tokens", async () => {
  const { input_tokens: count } = await client.messages.countTokens({ model: MODEL, messages: USER });
  assert.ok(count > 10);
});

check("errors as the client's classes", async () => {
  await assert.rejects(client.messages.create({ ...asked, model: "nobody" }), Anthropic.NotFoundError);
});

await main("@anthropic-ai/sdk");
