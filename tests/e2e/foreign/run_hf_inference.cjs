// @huggingface/inference against a server: generation, streams, chat. Prints one JSON document.
const { InferenceClient } = require("@huggingface/inference");
const [url, question] = process.argv.slice(2);
const generate = {
  endpointUrl: url,
  inputs: question,
  parameters: { max_new_tokens: 100, temperature: 0 },
};
const chat = {
  endpointUrl: url,
  messages: [{ role: "user", content: question }],
  max_tokens: 100,
  temperature: 0,
};

async function main() {
  const client = new InferenceClient();
  const found = {};
  found.text = (await client.textGeneration(generate)).generated_text;
  let stream = "";
  for await (const event of client.textGenerationStream(generate)) {
    stream += event.choices[0].text; // it calls the path of OpenAI's completions
  }
  found.stream = stream;
  found.chat = (await client.chatCompletion(chat)).choices[0].message.content;
  let chatStream = "";
  for await (const chunk of client.chatCompletionStream(chat)) {
    chatStream += chunk.choices[0].delta.content ?? "";
  }
  found.chatStream = chatStream;
  console.log(JSON.stringify(found));
}

main();
