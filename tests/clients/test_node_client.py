"""@grpc/grpc-js calls a server with the descriptors alone."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from service.bundled import DESCRIPTORS
from tests.clients.conftest import Served
from tests.protos.node_modules import needs_node, run_node
from tests.service.api.harness import PROMPT, TEXT

SCRIPT = """
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");
const [address, descriptors, prompt] = process.argv.slice(1);
const options = {keepCase: true, enums: String, defaults: true};
const loaded = loader.loadFileDescriptorSetFromBuffer(
  require("fs").readFileSync(descriptors), options);
const {tokenwire} = grpc.loadPackageDefinition(loaded);
const client = new tokenwire.v1.TextGenerationService(address, grpc.credentials.createInsecure());
client.Generate({inputs: prompt, parameters: {details: true}}, (error, reply) => {
  const refused = {inputs: "", parameters: {}};
  client.Generate(refused, (failure) => {
    const texts = [];
    const request = {prompt: [prompt], stream: true, max_tokens: 100};
    const call = client.Completions(request);
    call.on("data", (message) => texts.push(message.completion.choices[0]));
    call.on("end", () => console.log(JSON.stringify({
      text: reply.generated_text, reason: reply.details.finish_reason,
      code: failure.code, said: failure.details, last: texts.at(-1).reason,
    })));
  });
});
"""


@needs_node("@grpc/grpc-js", "@grpc/proto-loader")
async def test_grpc_js_generates_streams_and_gets_errors(served: Served, tmp_path: Path) -> None:
    arguments = (served.address, str(DESCRIPTORS), PROMPT)
    shown = await asyncio.to_thread(run_node, SCRIPT, *arguments, cwd=tmp_path)
    assert json.loads(shown) == {
        "text": TEXT,
        "reason": "FINISH_REASON_EOS_TOKEN",
        "code": 3,
        "said": "Input validation error: `inputs` cannot be empty",
        "last": "FINISH_REASON_EOS_TOKEN",
    }
