// openai's own client against a server: models, text, stream, tool. Prints one JSON document.
const OpenAI = require("openai");
const [url, question, weatherQuestion] = process.argv.slice(2);
const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "-", maxRetries: 0 });
const common = { model: "tgi", temperature: 0, max_tokens: 100 };
const ask = (content) => [{ role: "user", content }];
const tools = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "Get the current weather in a location",
      parameters: {
        type: "object",
        properties: { location: { type: "string" } },
        required: ["location"],
      },
    },
  },
];
const callsOf = (message) =>
  message.tool_calls.map((call) => [call.function.name, JSON.parse(call.function.arguments)]);

async function main() {
  const found = {};
  const [listed] = (await openai.models.list()).data;
  found.models = [listed.id, (await openai.models.retrieve(listed.id)).id];
  const whole = await openai.chat.completions.create({ ...common, messages: ask(question) });
  found.text = whole.choices[0].message.content;
  const stream = openai.chat.completions.stream({ ...common, messages: ask(question) });
  found.stream = await stream.finalContent();
  const called = await openai.chat.completions.create({
    ...common,
    messages: ask(weatherQuestion),
    tools,
  });
  const streamed = await openai.chat.completions
    .stream({ ...common, messages: ask(weatherQuestion), tools })
    .finalMessage();
  found.calls = [...callsOf(called.choices[0].message), ...callsOf(streamed)];
  console.log(JSON.stringify(found));
}

main();
