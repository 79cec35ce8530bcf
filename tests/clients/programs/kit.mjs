// The same as kit.py, for programs that Node runs. node_modules is beside them when they run.

import { readFileSync } from "node:fs";

export const SERVER = process.env.BASE_URL;
export const BASE = SERVER + "/v1";
export const MODEL = "smollm2";
export const KEY = "none";
export const CAPITAL = "What is the capital of France? Answer with one word.";
export const USER = [{ role: "user", content: CAPITAL }];
export const CITIES = ["Paris", "Oslo", "Lima"];

export const WEATHER = {
  type: "function",
  function: {
    name: "weather",
    description: "The weather of a city.",
    parameters: {
      type: "object",
      properties: { city: { type: "string", enum: CITIES } },
      required: ["city"],
      additionalProperties: false,
    },
  },
};
export const NAMED = { type: "function", function: { name: "weather" } };

const checks = [];

export function check(what, work) {
  checks.push([what, work]);
}

function version(name) {
  return JSON.parse(readFileSync(new URL(`./node_modules/${name}/package.json`, import.meta.url))).version;
}

export async function main(...packages) {
  const found = [];
  for (const [what, work] of checks) {
    const started = performance.now();
    let error = null;
    try {
      await work();
    } catch (raised) {
      console.error(raised);
      error = String(raised).slice(0, 500);
    }
    found.push({ what, seconds: Math.round(performance.now() - started) / 1000, error });
  }
  const versions = Object.fromEntries(packages.map((name) => [name, version(name)]));
  versions.node = process.versions.node;
  console.log(JSON.stringify({ versions, checks: found }));
  process.exit(found.some((each) => each.error !== null) ? 1 : 0);
}
