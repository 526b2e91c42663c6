// Vercel's `ai` over @ai-sdk/openai-compatible: text, stream, a tool with its answer, an object.
// Prints one JSON document.
const { generateText, generateObject, streamText, stepCountIs, tool } = require("ai");
const { createOpenAICompatible } = require("@ai-sdk/openai-compatible");
const { z } = require("zod");
const [url, question, weatherQuestion] = process.argv.slice(2);
const provider = createOpenAICompatible({
  name: "tokenwire",
  baseURL: `${url}/v1`,
  supportsStructuredOutputs: true,
});
const common = { model: provider("tgi"), temperature: 0, maxOutputTokens: 100, maxRetries: 0 };
const asked = [];
const tools = {
  get_weather: tool({
    description: "Get the current weather in a location",
    inputSchema: z.object({ location: z.string() }),
    execute: async ({ location }) => {
      asked.push(location);
      return { temperature: 20, unit: "C" };
    },
  }),
};
const withTools = { ...common, prompt: weatherQuestion, tools, stopWhen: stepCountIs(2) };

async function main() {
  const found = { asked };
  found.text = (await generateText({ ...common, prompt: question })).text;
  found.stream = await streamText({ ...common, prompt: question }).text;
  found.answer = (await generateText(withTools)).text;
  found.streamedAnswer = await streamText(withTools).text;
  const schema = z.object({ city: z.string() });
  found.object = (await generateObject({ ...common, prompt: weatherQuestion, schema })).object;
  console.log(JSON.stringify(found));
}

main();
