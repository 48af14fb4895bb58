// The official JavaScript SDKs of both vendors against a running gateway with the demo model.
//
//   CORTEX_URL=http://127.0.0.1:31313 CORTEX_MODEL=cortex/demo node --test
//
// test_js_sdks.py starts a fleet and runs this. Streams go through the SDKs' own accumulators, which throw on an event
// out of order, an index with a gap or an item that changes its identity.

import assert from "node:assert/strict";
import { test } from "node:test";

import Anthropic from "@anthropic-ai/sdk";
import Anthropic2023 from "anthropic-sdk-2023";
import OpenAI from "openai";

const url = process.env.CORTEX_URL;
const model = process.env.CORTEX_MODEL ?? "cortex/demo";
assert.ok(url, "CORTEX_URL names the gateway");

const settings = { maxRetries: 0, timeout: 120_000 };
const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", ...settings });
// API version 2026-10-21 with a bearer token, and 2023-06-01 with x-api-key.
const anthropics = {
  "api key as bearer": new Anthropic({ baseURL: url, apiKey: "none", ...settings }),
  "api key as x-api-key": new Anthropic2023({ baseURL: url, apiKey: "none", ...settings }),
};

const city = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const description = "Current weather in a city";
const oslo = "What is the weather in Oslo?";

// ---------------------------------------------------------------- OpenAI chat

const chatTool = { type: "function", function: { name: "get_weather", description, parameters: city } };

test("chat: a streamed answer accumulates to the plain one", async () => {
  const body = { model, messages: [{ role: "user", content: "Count from 1 to 12." }], max_completion_tokens: 200 };
  const plain = await openai.chat.completions.create(body);
  const stream = openai.chat.completions.stream({ ...body, stream_options: { include_usage: true } });
  let text = "";
  stream.on("content", (delta) => (text += delta));
  const final = await stream.finalChatCompletion();
  assert.equal(final.choices[0].message.content, plain.choices[0].message.content);
  assert.equal(text, plain.choices[0].message.content);
  assert.equal(final.choices[0].finish_reason, "stop");
  assert.deepEqual(final.usage.completion_tokens, plain.usage.completion_tokens);
});

test("chat: the SDK's own tool runner completes a loop", async () => {
  const asked = [];
  const runner = openai.chat.completions.runTools({
    model,
    stream: true,
    max_completion_tokens: 300,
    messages: [{ role: "user", content: oslo }],
    tools: [
      {
        type: "function",
        function: {
          ...chatTool.function,
          parse: JSON.parse,
          function: (args) => {
            asked.push(args);
            return JSON.stringify({ temperature: 14, condition: "cloudy" });
          },
        },
      },
    ],
  });
  const answer = await runner.finalContent();
  assert.deepEqual(asked, [{ city: "Oslo" }]);
  assert.match(answer, /14/);
});

test("chat: json_schema output validates", async () => {
  const schema = {
    type: "object",
    properties: { name: { type: "string" }, age: { type: "integer" } },
    required: ["name", "age"],
    additionalProperties: false,
  };
  const answer = await openai.chat.completions.create({
    model,
    max_completion_tokens: 200,
    messages: [{ role: "user", content: "Give me a JSON object with the name Ada and age 36." }],
    response_format: { type: "json_schema", json_schema: { name: "person", schema, strict: true } },
  });
  assert.deepEqual(JSON.parse(answer.choices[0].message.content), { name: "Ada", age: 36 });
});

test("chat: errors are typed", async () => {
  await assert.rejects(
    openai.chat.completions.create({ model: "no/such", messages: [{ role: "user", content: "hi" }] }),
    (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found" && Boolean(error.requestID),
  );
  await assert.rejects(
    openai.chat.completions.create({ model, temperature: 3, messages: [{ role: "user", content: "hi" }] }),
    (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature",
  );
});

// ---------------------------------------------------------------- OpenAI responses

const tool = { type: "function", name: "get_weather", description, parameters: city, strict: false };
const shell = { type: "custom", name: "dial", format: { type: "grammar", syntax: "regex", definition: "[0-9]{3}" } };

test("responses: a streamed answer accumulates to the plain one", async () => {
  const body = { model, input: "Count from 1 to 12.", max_output_tokens: 200 };
  const plain = await openai.responses.create(body);
  const stream = openai.responses.stream(body);
  let text = "";
  const numbers = [];
  for await (const event of stream) {
    numbers.push(event.sequence_number);
    if (event.type === "response.output_text.delta") text += event.delta;
  }
  const final = await stream.finalResponse();
  assert.equal(plain.output_text, text);
  assert.equal(final.output_text, text);
  assert.deepEqual(numbers, [...numbers.keys()]);
  assert.equal(final.status, "completed");
  assert.equal(final.usage.output_tokens, plain.usage.output_tokens);
});

test("responses: a tool loop goes on with the items of the answer", async () => {
  const input = [{ role: "user", content: oslo }];
  const first = await openai.responses.create({ model, input, tools: [tool], store: false, max_output_tokens: 300 });
  const call = first.output.find((item) => item.type === "function_call");
  assert.deepEqual(JSON.parse(call.arguments), { city: "Oslo" });
  input.push(...first.output);
  input.push({ type: "function_call_output", call_id: call.call_id, output: '{"temperature": 14}' });
  const second = await openai.responses.create({ model, input, tools: [tool], store: false, max_output_tokens: 300 });
  assert.match(second.output_text, /14/);
});

test("responses: custom tools, reasoning and namespaces survive the accumulator", async () => {
  const custom = openai.responses.stream({
    model,
    input: "Dial 123.",
    tools: [shell],
    tool_choice: { type: "custom", name: "dial" },
    max_output_tokens: 300,
  });
  const called = (await custom.finalResponse()).output.at(-1);
  assert.equal(called.type, "custom_tool_call");
  assert.match(called.input, /^[0-9]{3}$/);

  const thinking = openai.responses.stream({
    model,
    input: "What is 12+30?",
    reasoning: { effort: "low", summary: "auto" },
    include: ["reasoning.encrypted_content"],
    max_output_tokens: 300,
  });
  const thought = await thinking.finalResponse();
  assert.deepEqual(
    thought.output.map((item) => item.type),
    ["reasoning", "message"],
  );
  assert.ok(thought.output[0].summary[0].text && thought.output[0].encrypted_content);

  const spaced = await openai.responses.create({
    model,
    input: oslo,
    tools: [{ type: "namespace", name: "home", description: "", tools: [tool] }, { type: "web_search" }],
    tool_choice: { type: "function", name: "get_weather" },
    max_output_tokens: 300,
  });
  const member = spaced.output.at(-1);
  assert.deepEqual([member.type, member.namespace, member.name], ["function_call", "home", "get_weather"]);
});

test("responses: what would need a store is refused by name", async () => {
  await assert.rejects(
    openai.responses.create({ model, input: "hi", previous_response_id: "resp_1" }),
    (error) => error instanceof OpenAI.BadRequestError && error.code === "previous_response_not_found",
  );
  await assert.rejects(openai.responses.retrieve("resp_1"), OpenAI.NotFoundError);
});

test("models are listed and retrieved", async () => {
  const ids = [];
  for await (const entry of openai.models.list()) ids.push(entry.id);
  assert.ok(ids.includes(model));
  assert.equal((await openai.models.retrieve(model)).id, model);
});

// ---------------------------------------------------------------- Anthropic messages

// Every way in which either SDK can be given a credential: what it sends is a bearer token, an x-api-key, or both.
const credentials = {
  "apiKey, now": new Anthropic({ baseURL: url, apiKey: "none", ...settings }),
  "authToken, now": new Anthropic({ baseURL: url, apiKey: null, authToken: "none", ...settings }),
  "apiKey, of 2023": new Anthropic2023({ baseURL: url, apiKey: "none", ...settings }),
  "authToken, of 2023": new Anthropic2023({ baseURL: url, apiKey: null, authToken: "none", ...settings }),
};
for (const [style, anthropic] of Object.entries(credentials)) {
  test(`messages, ${style}: the credential is taken`, async () => {
    const messages = [{ role: "user", content: "What is 12+30?" }];
    const answer = await anthropic.messages.create({ model, max_tokens: 50, messages });
    assert.match(answer.content[0].text, /42/);
  });
}

const messageTool = { name: "get_weather", description, input_schema: city };

for (const [style, anthropic] of Object.entries(anthropics)) {
  test(`messages, ${style}: a streamed answer accumulates to the plain one`, async () => {
    const body = { model, max_tokens: 200, messages: [{ role: "user", content: "Count from 1 to 12." }] };
    const plain = await anthropic.messages.create(body);
    const stream = anthropic.messages.stream(body);
    let text = "";
    stream.on("text", (delta) => (text += delta));
    const final = await stream.finalMessage();
    assert.deepEqual(final.content[0].text, plain.content[0].text);
    assert.equal(text, plain.content[0].text);
    assert.equal(final.stop_reason, "end_turn");
    assert.equal(final.usage.output_tokens, plain.usage.output_tokens);
  });

  test(`messages, ${style}: a tool loop with thinking completes`, async () => {
    const messages = [{ role: "user", content: oslo }];
    const body = { model, max_tokens: 2000, tools: [messageTool], thinking: { type: "enabled", budget_tokens: 1024 } };
    const first = await anthropic.messages.stream({ ...body, messages }).finalMessage();
    assert.equal(first.stop_reason, "tool_use");
    const use = first.content.find((block) => block.type === "tool_use");
    assert.deepEqual(use.input, { city: "Oslo" });
    messages.push({ role: "assistant", content: first.content });
    const content = [{ type: "tool_result", tool_use_id: use.id, content: '{"temperature": 14}' }];
    messages.push({ role: "user", content });
    const second = await anthropic.messages.create({ ...body, messages });
    assert.match(second.content.at(-1).text, /14/);
  });

  test(`messages, ${style}: thinking blocks are signed, first, and come back`, async () => {
    const body = { model, max_tokens: 2000, thinking: { type: "enabled", budget_tokens: 1024 } };
    const messages = [{ role: "user", content: "What is 12+30?" }];
    const answer = await anthropic.messages.stream({ ...body, messages }).finalMessage();
    assert.deepEqual(
      answer.content.map((block) => block.type),
      ["thinking", "text"],
    );
    assert.ok(answer.content[0].signature);
    messages.push({ role: "assistant", content: answer.content }, { role: "user", content: "What is 3+4?" });
    assert.match((await anthropic.messages.create({ ...body, messages })).content.at(-1).text, /7/);
  });

  test(`messages, ${style}: counts, models and errors`, async () => {
    const messages = [{ role: "user", content: "What is 12+30?" }];
    const { input_tokens } = await anthropic.messages.countTokens({ model, messages });
    const { usage } = await anthropic.messages.create({ model, max_tokens: 20, messages });
    assert.equal(usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens, input_tokens);
    const ids = [];
    for await (const entry of anthropic.models.list()) ids.push([entry.id, entry.type]);
    assert.deepEqual(ids, [[model, "model"]]);
    assert.equal((await anthropic.models.retrieve(model)).id, model);
    const sdk = anthropic.constructor;
    await assert.rejects(
      anthropic.messages.create({ model: "no/such", max_tokens: 1, messages }),
      (error) => error instanceof sdk.NotFoundError && error.error.error.type === "not_found_error",
    );
    await assert.rejects(
      anthropic.messages.create({ model, messages }),
      (error) => error instanceof sdk.BadRequestError && /max_tokens/.test(error.message),
    );
  });
}
