// What clients make of a server:  node clients.mjs MODEL-URL KEY PARROT-URL
//
// Each gets its answers through watched(), which holds all of them against
// strict types: a field that is missing, of another type or not known fails the
// test, whatever the client makes of it.
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { generateObject, generateText, jsonSchema, stepCountIs, streamText,
         tool } from "ai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { ChatOpenAI, OpenAI as LangChainOpenAI } from "@langchain/openai";
import { tool as langChainTool } from "@langchain/core/tools";
import { HumanMessage, ToolMessage } from "@langchain/core/messages";
import { z } from "zod";
import assert from "node:assert/strict";

const [modelURL, key, parrotURL] = process.argv.slice(2);
let passed = 0, failed = 0;

async function holds(what, test) {
    try {
        await test();
        passed++;
    } catch (e) {
        if (/response_format|tool_choice/.test(e.message) && e.status === 400) {
            console.log(`skipped: ${what}: ${e.message}`);
            return;
        }
        failed++;
        console.log(`FAIL   ${what}: ${e.stack}`.slice(0, 1000));
    }
}

// ---------------------------------------------------------------------- types

const whole = z.number().int().nonnegative();
const usage = z.strictObject({
    prompt_tokens: whole, completion_tokens: whole, total_tokens: whole,
    prompt_tokens_details: z.strictObject({ cached_tokens: whole }),
    completion_tokens_details: z.strictObject({ reasoning_tokens: whole }),
});
const token = z.strictObject({ token: z.string(), id: whole,
    logprob: z.number(), bytes: z.array(whole) });
const logprobs = z.strictObject({ content: z.array(
    token.extend({ top_logprobs: z.array(token) })) }).nullish();
const columns = z.strictObject({
    tokens: z.array(z.string()), token_logprobs: z.array(z.number().nullable()),
    top_logprobs: z.array(z.record(z.string(), z.number()).nullable()),
    text_offset: z.array(whole) }).nullish();
const named = z.strictObject({ name: z.string(), arguments: z.string() });
const call = z.strictObject({ id: z.string(), type: z.literal("function"),
    function: named });
const finish = z.enum(["stop", "length", "tool_calls"]);
const about = { id: z.string(), created: whole, model: z.string() };
const chat = z.strictObject({ ...about, object: z.literal("chat.completion"),
    usage, choices: z.array(z.strictObject({
        index: whole, finish_reason: finish, logprobs,
        message: z.strictObject({
            role: z.literal("assistant"), content: z.string().nullable(),
            reasoning_content: z.string().optional(),
            tool_calls: z.array(call).optional() }) })).min(1) });
const chatChunk = z.strictObject({ ...about,
    object: z.literal("chat.completion.chunk"), usage: usage.nullish(),
    choices: z.array(z.strictObject({
        index: whole, finish_reason: finish.nullable(), logprobs,
        delta: z.strictObject({
            role: z.literal("assistant").optional(),
            content: z.string().optional(),
            reasoning_content: z.string().optional(),
            tool_calls: z.array(call.extend({ index: whole })).optional()
        }) })) });
const plainChoice = z.strictObject({ index: whole, text: z.string(),
    finish_reason: finish, logprobs: columns });
const plain = z.strictObject({ ...about, object: z.literal("text_completion"),
    usage, choices: z.array(plainChoice).min(1) });
const plainChunk = plain.extend({ usage: usage.nullish(),
    choices: z.array(plainChoice.extend({
        finish_reason: finish.nullable() })) });
const model = z.strictObject({ id: z.string(), object: z.literal("model"),
    created: whole, owned_by: z.string(), max_model_len: whole });
const models = z.strictObject({ object: z.literal("list"),
    data: z.array(model) });
const error = z.strictObject({ error: z.strictObject({
    message: z.string(), type: z.string(), param: z.string().nullable(),
    code: z.string().nullable() }) });

function typeOf(path, status, isStream) {
    return status >= 400 ? error : path.endsWith("/models") ? models :
        path.includes("/models/") ? model :
        path.endsWith("/chat/completions") ? (isStream ? chatChunk : chat) :
        isStream ? plainChunk : plain;
}

const seen = [];                // what was checked, with its type
function check(type, value) {
    type.parse(value);
    seen.push([type, value]);
}

// A fetch() that looks at what comes.
async function watched(url, options) {
    const answer = await fetch(url, options);
    const path = new URL(url instanceof Request ? url.url : url).pathname;
    const isStream =
        answer.headers.get("content-type") === "text/event-stream";
    const type = typeOf(path, answer.status, isStream);
    if (!isStream) {
        check(type, await answer.clone().json());
        return answer;
    }
    let rest = "";
    const decoder = new TextDecoder("utf-8", { fatal: true });
    const body = answer.body.pipeThrough(new TransformStream({
        transform(bytes, to) {
            const events = (rest + decoder.decode(bytes, { stream: true }))
                .split("\n\n");
            rest = events.pop();
            for (const event of events)
                if (event.startsWith("data: ") && event !== "data: [DONE]")
                    check(type, JSON.parse(event.slice(6)));
            to.enqueue(bytes);
        },
    }));
    return new Response(body, answer);
}

// All values like this one, but for one thing that is of another type, missing
// or there.
function* spoiled(value) {
    if (value === null)
        yield true;
    else if (Array.isArray(value)) {
        yield {};
        if (value.length > 0)
            for (const one of spoiled(value[0]))
                yield [one, ...value.slice(1)];
    } else if (typeof value === "object") {
        yield [];
        for (const name of Object.keys(value))
            for (const one of spoiled(value[name]))
                yield { ...value, [name]: one };
    } else
        yield typeof value === "string" ? 7 : String(value);
}

// --------------------------------------------------------------------- OpenAI

const question = "What is a short convolution?";
const messages = [{ role: "user", content: question }];
const hello = [{ role: "user", content: "What is the weather in Oslo?" }];
const weather = { type: "function", function: {
    name: "weather", description: "Weather of the next days", parameters: {
        type: "object", properties: { city: { type: "string" },
                                      days: { type: "integer" } },
        required: ["city", "days"], additionalProperties: false } } };
const client = new OpenAI({ apiKey: key, baseURL: modelURL + "/v1",
                            fetch: watched, maxRetries: 0 });
const parrot = new OpenAI({ apiKey: "none", baseURL: parrotURL + "/v1",
                            fetch: watched, maxRetries: 0 });
const asked = { model: "any", messages, temperature: 0, max_tokens: 40 };
let said;

async function idles() {
    for (let i = 0; i < 200; i++) {
        const text = await (await fetch(modelURL + "/metrics", {
            headers: { authorization: "Bearer " + key } })).text();
        if (/^lfm2_slots_busy 0$/m.test(text))
            return;
        await new Promise((done) => setTimeout(done, 50));
    }
    assert.fail("an answer goes on");
}

await holds("openai: models", async () => {
    const list = [];
    for await (const one of client.models.list())
        list.push(one.id);
    assert.equal(list.length, 1);
    assert.equal((await client.models.retrieve(list[0])).id, list[0]);
    await assert.rejects(client.models.retrieve("gpt-4"), OpenAI.NotFoundError);
});
await holds("openai: a chat", async () => {
    const answer = await client.chat.completions.create(asked);
    said = answer.choices[0].message.content;
    assert.ok(said.length > 20);
    assert.ok(answer._request_id);
});
await holds("openai: log probabilities, several choices", async () => {
    const answer = await client.chat.completions.create({
        ...asked, logprobs: true, top_logprobs: 3, n: 2, max_tokens: 4 });
    assert.equal(answer.choices.length, 2);
    assert.equal(answer.choices[1].logprobs.content[0].top_logprobs.length, 3);
});
await holds("openai: a stream", async () => {
    let text = "", last;
    for await (const chunk of await client.chat.completions.create({
        ...asked, stream: true, stream_options: { include_usage: true } })) {
        text += chunk.choices[0]?.delta?.content ?? "";
        last = chunk;
    }
    assert.equal(text, said);
    assert.ok(last.usage.completion_tokens > 0);
});
await holds("openai: its helper for streams", async () => {
    const stream = client.chat.completions.stream({
        ...asked, logprobs: true, stream_options: { include_usage: true } });
    let text = "";
    stream.on("content", (part) => { text += part; });
    assert.equal(await stream.finalContent(), said);
    assert.equal(text, said);
    assert.ok((await stream.totalUsage()).total_tokens > 0);
});
await holds("openai: completions", async () => {
    const ask = { model: "any", prompt: "Once upon a time", temperature: 0,
                  max_tokens: 20 };
    const answer = await client.completions.create({ ...ask, logprobs: 2,
                                                     echo: true });
    assert.ok(answer.choices[0].text.startsWith("Once upon a time"));
    let text = "";
    for await (const chunk of await client.completions.create({
        ...ask, stream: true, logprobs: 1 }))
        text += chunk.choices[0].text;
    assert.equal("Once upon a time" + text, answer.choices[0].text);
});
await holds("openai: tools", async () => {
    const answer = await parrot.chat.completions.create({
        model: "any", messages: hello, tools: [weather] });
    const [made] = answer.choices[0].message.tool_calls;
    assert.equal(answer.choices[0].finish_reason, "tool_calls");
    assert.deepEqual(JSON.parse(made.function.arguments),
                     { city: "Oslo", days: 3 });
    const next = await parrot.chat.completions.create({
        model: "any", tools: [weather], messages: [
            ...hello, answer.choices[0].message,
            { role: "tool", tool_call_id: made.id, content: "AB" }] });
    assert.equal(next.choices[0].message.content, "Take a coat.");
});
await holds("openai: tools that are run", async () => {
    let asked;
    for (const stream of [false, true]) {
        const runner = parrot.chat.completions.runTools({
            model: "any", messages: hello, stream, tools: [{
                ...weather, function: {
                    ...weather.function, parse: JSON.parse,
                    function(given) { asked = given; return "AB"; } } }] });
        assert.equal(await runner.finalContent(), "Take a coat.");
        assert.deepEqual(asked, { city: "Oslo", days: 3 });
    }
});
const Answer = z.object({ name: z.string().max(20),
                          sizes: z.array(z.number().int()).max(3) });
await holds("openai: structured outputs", async () => {
    const answer = await client.chat.completions.parse({
        ...asked, max_tokens: 300,
        response_format: zodResponseFormat(Answer, "answer") });
    Answer.parse(answer.choices[0].message.parsed);
    assert.equal(answer.choices[0].finish_reason, "stop");
});
await holds("openai: JSON objects", async () => {
    const answer = await client.chat.completions.create({
        ...asked, max_tokens: 300, response_format: { type: "json_object" } });
    if (answer.choices[0].finish_reason === "stop")
        JSON.parse(answer.choices[0].message.content);
});
await holds("openai: a call that has to be", async () => {
    const answer = await client.chat.completions.create({
        ...asked, max_tokens: 300, tools: [weather], tool_choice: "required" });
    if (answer.choices[0].finish_reason === "tool_calls") {
        const { arguments: given } =
            answer.choices[0].message.tool_calls[0].function;
        assert.equal(typeof JSON.parse(given).city, "string");
    }
});
await holds("openai: abort", async () => {
    const endless = { ...asked, max_tokens: 3000,
        logit_bias: { 2: -100, 7: -100 } };
    const stream = await client.chat.completions.create(
        { ...endless, stream: true });
    for await (const chunk of stream)
        if (chunk.choices[0].delta.content)
            stream.controller.abort();
    await idles();
    const stop = new AbortController();
    const answer = client.chat.completions.create(
        endless, { signal: stop.signal });
    setTimeout(() => stop.abort(), 20);
    await assert.rejects(answer, OpenAI.APIUserAbortError);
    await idles();
});
await holds("openai: errors", async () => {
    await assert.rejects(
        client.chat.completions.create({ ...asked, temperature: -1 }),
        (e) => e instanceof OpenAI.BadRequestError &&
               e.param === "temperature" && e.type === "invalid_request_error");
    await assert.rejects(
        client.chat.completions.create({ ...asked, messages: [{
            role: "user", content: "a b c ".repeat(4000) }] }),
        (e) => e.code === "context_length_exceeded");
    const stranger = new OpenAI({ apiKey: "wrong", baseURL: modelURL + "/v1",
                                  fetch: watched, maxRetries: 0 });
    await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);
});

// --------------------------------------------------------------------- AI SDK

const settings = { name: "lfm2", apiKey: key, fetch: watched,
                   includeUsage: true, supportsStructuredOutputs: true };
const vercel = createOpenAICompatible({ ...settings,
                                        baseURL: modelURL + "/v1" });
const vercelParrot = createOpenAICompatible({ ...settings,
                                              baseURL: parrotURL + "/v1" });
const ask = { model: vercel("any"), prompt: question, temperature: 0,
              maxOutputTokens: 40, maxRetries: 0 };

await holds("ai: a text", async () => {
    const answer = await generateText(ask);
    assert.equal(answer.text, said);
    assert.ok(answer.usage.inputTokens > 0 && answer.usage.outputTokens > 0);
    assert.equal(answer.finishReason, "stop");
});
await holds("ai: a stream", async () => {
    const stream = streamText(ask);
    let text = "";
    for await (const part of stream.textStream)
        text += part;
    assert.equal(text, said);
    assert.ok((await stream.usage).outputTokens > 0);
});
await holds("ai: a completion", async () => {
    const answer = await generateText({
        ...ask, model: vercel.completionModel("any") });
    assert.ok(answer.text.length > 0);
});
await holds("ai: tools, and thoughts", async () => {
    for (const streams of [false, true]) {
        let given;
        const answer = (streams ? streamText : generateText)({
            model: vercelParrot("any"), messages: hello, maxRetries: 0,
            stopWhen: stepCountIs(3), tools: { weather: tool({
                description: "Weather",
                inputSchema: jsonSchema(weather.function.parameters),
                execute: async (x) => { given = x; return "AB"; } }) } });
        const done = await answer;
        if (streams)
            await done.consumeStream();
        assert.equal(await done.text, "Take a coat.");
        assert.equal(await done.reasoningText, "Cold.");
        assert.deepEqual(given, { city: "Oslo", days: 3 });
    }
});
await holds("ai: an object", async () => {
    const answer = await generateObject({ ...ask, schema: Answer,
                                          maxOutputTokens: 300 });
    Answer.parse(answer.object);
});
await holds("ai: abort", async () => {
    const stop = new AbortController();
    const stream = streamText({ ...ask, maxOutputTokens: 3000, temperature: 2,
                                abortSignal: stop.signal, onError() {} });
    for await (const part of stream.fullStream)
        if (part.type === "text-delta")
            stop.abort();
    await idles();
});
await holds("ai: an error", async () => {
    await assert.rejects(generateText({ ...ask, temperature: -1 }),
                         /temperature/);
});

// ------------------------------------------------------------------ LangChain

const chain = new ChatOpenAI({
    model: "any", apiKey: key, temperature: 0, maxTokens: 40, maxRetries: 0,
    configuration: { baseURL: modelURL + "/v1", fetch: watched } });
const chainParrot = new ChatOpenAI({
    model: "any", apiKey: "none", maxRetries: 0,
    configuration: { baseURL: parrotURL + "/v1", fetch: watched } });

await holds("langchain: a chat", async () => {
    const answer = await chain.invoke(question);
    assert.equal(answer.content, said);
    assert.ok(answer.usage_metadata.output_tokens > 0);
});
await holds("langchain: a stream", async () => {
    let text = "";
    for await (const chunk of await chain.stream(question))
        text += chunk.content;
    assert.equal(text, said);
});
await holds("langchain: several at once", async () => {
    const answers = await chain.batch([question, question, question]);
    assert.deepEqual(answers.map((x) => x.content), [said, said, said]);
});
await holds("langchain: tools", async () => {
    const bound = chainParrot.bindTools([langChainTool(async () => "AB", {
        name: "weather", description: "Weather",
        schema: z.object({ city: z.string(), days: z.number() }) })]);
    const first = await bound.invoke(hello);
    assert.deepEqual(first.tool_calls[0].args, { city: "Oslo", days: 3 });
    const next = await bound.invoke([
        new HumanMessage("What is the weather in Oslo?"), first,
        new ToolMessage({ content: "AB",
                          tool_call_id: first.tool_calls[0].id })]);
    assert.equal(next.content, "Take a coat.");
    let all;
    for await (const chunk of await bound.stream(hello))
        all = all ? all.concat(chunk) : chunk;
    assert.deepEqual(all.tool_calls[0].args, { city: "Oslo", days: 3 });
});
await holds("langchain: an object", async () => {
    const longer = new ChatOpenAI({
        model: "any", apiKey: key, temperature: 0, maxTokens: 300,
        maxRetries: 0,
        configuration: { baseURL: modelURL + "/v1", fetch: watched } });
    Answer.parse(await longer.withStructuredOutput(Answer, {
        method: "jsonSchema" }).invoke(question));
});
await holds("langchain: completions", async () => {
    const plainModel = new LangChainOpenAI({
        model: "any", apiKey: key, temperature: 0, maxTokens: 20,
        maxRetries: 0,
        configuration: { baseURL: modelURL + "/v1", fetch: watched } });
    const text = await plainModel.invoke("Once upon a time");
    assert.ok(text.length > 0);
    let streamed = "";
    for await (const part of await plainModel.stream("Once upon a time"))
        streamed += part;
    assert.equal(streamed, text);
});

// A field of the wrong type does not go unseen.
await holds("answers were looked at", () => {
    for (const type of [chat, chatChunk, plain, plainChunk, model, models,
                        error])
        assert.ok(seen.some(([one]) => one === type));
});
await holds("a wrong type is seen", () => {
    let n = 0;
    for (const [type, value] of seen.slice(0, 400))
        for (const bad of spoiled(value)) {
            n++;
            assert.equal(type.safeParse(bad).success, false,
                         JSON.stringify(bad));
        }
    assert.ok(n > 1000);
});

console.log(`${passed} passed, ${failed} failed`);
process.exit(failed > 0);
