"use strict";
const $ = (id) => document.getElementById(id);
let messages = []; // the conversation so far, as the API takes it
const KEY = "tokenwire-api-key"; // in sessionStorage: it ends with the tab
let model = null;
let running = null; // the AbortController of the answer that is under way

const headers = () => {
  const key = sessionStorage.getItem(KEY);
  return key ? { authorization: `Bearer ${key}` } : {};
};

function element(name, className, text) {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text; // text, never HTML
  return made;
}

function fail(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

/** Whether the view is at its end, so that it may follow what is added. */
const isAtEnd = () => $("view").scrollHeight - $("view").scrollTop - $("view").clientHeight < 48;
const toEnd = () => { $("view").scrollTop = $("view").scrollHeight; };

function addEntry(role, text) {
  const item = document.createElement("li");
  const body = element("p", "text", text);
  item.className = role;
  item.append(element("h2", "", role === "user" ? "You" : model || "Model"), body);
  $("log").append(item);
  $("greeting").hidden = true;
  toEnd();
  return { item, body };
}

class Refused extends Error {
  constructor(status, text) { super(text); this.status = status; }
}

/** The server's own words about an error, if the body has some. */
function reason(body) {
  try {
    const { error } = JSON.parse(body);
    return typeof error === "string" ? error : error.message || "";
  } catch {
    return "";
  }
}

async function refusal(reply) {
  const said = reason(await reply.text());
  const after = reply.headers.get("retry-after");
  const words = {
    401: sessionStorage.getItem(KEY) ? "The server does not accept this API key." : "The server asks for an API key.",
    413: "The conversation is too long for the server. Start a new chat.",
    422: `The server refused the request: ${said}`,
    424: `The answer failed: ${said}`,
    429: `The server is full.${after ? ` Try again in ${after} s.` : " Try again soon."}`,
    503: "The server is not ready. It may be starting or stopping; try again soon.",
  }[reply.status];
  return new Refused(reply.status, words || `The server answered with status ${reply.status}. ${said}`);
}

async function call(path, options) {
  let reply;
  try {
    reply = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server cannot be reached. Is it still running?");
  }
  if (!reply.ok) throw await refusal(reply);
  return reply;
}

/** The data of server-sent events; their lines end with \n. */
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused(0, "The connection broke before the answer was complete.");
    }
    if (part.done) return;
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}

function request() {
  const system = $("system").value.trim();
  const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
  return {
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    max_tokens: number("max-tokens"),
    temperature: number("temperature"),
    stream: true,
    stream_options: { include_usage: true },
  };
}

/** What has come of an answer, and how fast. */
class Answer {
  constructor() {
    const { item, body } = addEntry("assistant", "");
    this.item = item;
    this.text = body.appendChild(document.createTextNode(""));
    this.thought = null;
    this.tokens = 0;
    this.begun = performance.now();
    this.finish = null;
    item.setAttribute("aria-busy", "true"); // read out when it is complete, not token by token
  }

  add(event) {
    if (event.error) throw new Refused(424, `The answer failed: ${reason(JSON.stringify(event))}`);
    const follows = isAtEnd();
    for (const { delta, finish_reason: finish } of event.choices || []) {
      this.tokens += 1;
      if (delta.reasoning_content) this.think(delta.reasoning_content);
      if (delta.content) this.text.appendData(delta.content);
      if (delta.tool_calls) this.text.appendData(JSON.stringify(delta.tool_calls));
      this.finish = finish || this.finish;
    }
    if (event.usage) this.tokens = event.usage.completion_tokens;
    this.tell();
    if (follows) toEnd();
  }

  think(text) {
    if (!this.thought) {
      const details = document.createElement("details");
      const body = element("p", "text", "");
      this.thought = body.appendChild(document.createTextNode(""));
      details.append(element("summary", "", "Reasoning"), body);
      this.text.parentNode.before(details);
    }
    this.thought.appendData(text);
  }

  /** The rate counts from the question: a browser hands fast tokens over in bursts. */
  tell() {
    const seconds = (performance.now() - this.begun) / 1000;
    const count = `${this.tokens} ${this.tokens === 1 ? "token" : "tokens"}`;
    $("rate").textContent = `${count} · ${(this.tokens / seconds).toFixed(1)} tokens/s`;
  }

  end(note) {
    this.item.removeAttribute("aria-busy");
    const words = { length: "The answer ends here because it may have no more tokens.", stopped: "Stopped." }[note];
    if (words) this.item.append(element("p", "note", words));
  }
}

async function stream(answer) {
  const reply = await call("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json", ...headers() },
    body: JSON.stringify(request()),
    signal: running.signal,
  });
  for await (const data of events(reply)) if (data !== "[DONE]") answer.add(JSON.parse(data));
  if (!answer.finish) throw new Refused(0, "The connection broke before the answer was complete.");
}

/** Keeps what was said; an answer without a word takes its question back into the box. */
function keep(conversation, answer, question, mine) {
  if (answer.text.data) {
    conversation.push({ role: "assistant", content: answer.text.data });
    return;
  }
  conversation.pop();
  answer.item.remove();
  mine.item.remove();
  if (!$("prompt").value) $("prompt").value = question;
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
}

async function ask(question) {
  fail("");
  running = new AbortController();
  busy(true);
  const conversation = messages; // a new one may begin meanwhile
  conversation.push({ role: "user", content: question });
  const mine = addEntry("user", question);
  const answer = new Answer();
  try {
    await stream(answer);
    answer.end(answer.finish);
    conversation.push({ role: "assistant", content: answer.text.data });
  } catch (error) {
    answer.end(error.name === "AbortError" ? "stopped" : "");
    keep(conversation, answer, question, mine);
    if (error.name !== "AbortError") report(error);
  } finally {
    running = null;
    busy(false);
    if ($("key-form").hidden) $("prompt").focus();
  }
}

function report(error) {
  fail(error.message);
  if (error.status !== 401) return;
  sessionStorage.removeItem(KEY);
  $("key-form").hidden = false;
  $("key").focus();
}

async function introduce() {
  try {
    const info = await (await call("/info", { headers: headers() })).json();
    model = info.model_id;
    $("model").textContent = model;
    document.title = `${model} – Tokenwire`;
    $("max-tokens").value ||= Math.min(1024, Math.floor(info.max_total_tokens / 2));
    $("key-form").hidden = true;
    fail("");
    $("prompt").focus();
  } catch (error) {
    report(error);
  }
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("prompt").value.trim();
  if (running || !question) return;
  $("prompt").value = "";
  ask(question);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("form").requestSubmit();
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value.trim());
  $("key").value = "";
  introduce();
});
$("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
$("new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  $("log").replaceChildren();
  $("greeting").hidden = false;
  $("rate").textContent = "";
  fail("");
  $("prompt").focus();
});
introduce();
