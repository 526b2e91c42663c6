-- Makes a header of how a request begins, for the router to hash: requests that share a beginning
-- then go to the server that has it in its prefix cache.
--
-- `PRECEDING`, the headers that win over the beginning, stands before this text. Nothing here is
-- longer than `LENGTH` bytes or `MAX_FIELDS` steps, since Envoy serves nobody else meanwhile; only
-- the search for a name goes over a whole body.

local HEADER = "x-tokenwire-beginning"
local LENGTH = 1024  -- bytes of a beginning
local MAX_FIELDS = 64

-- What a prompt is made of, in the order in which prompts have it.
local NAMES = {"instructions", "messages", "inputs", "prompt", "input", "input_ids", "prompt_ids"}

-- The same in messages: by RPC, the numbers of fields and what they are.
local PROMPT, CONVERSATION = {[1] = "text"}, {[2] = "message"}
local FIELDS = {
  Generate = PROMPT, GenerateStream = PROMPT, CompatGenerate = PROMPT,
  Chat = CONVERSATION, ChatUnary = CONVERSATION,
  Completions = {[2] = "text"}, CompletionsUnary = {[2] = "text"},
  Invocations = {[1] = "text", [3] = "message", [4] = "text"},
  Responses = {[2] = "value", [3] = "text"},
}

-- A number of 48 bits, as text: what the caller wrote stays out of headers.
local function digest(text)
  local hash = 0
  for at = 1, #text do
    hash = (hash * 31 + text:byte(at)) % 281474976710597  -- a prime; exact in doubles
  end
  return string.format("%.0f", hash)
end

-- The JSON value that `text` starts with, or as much of it as there is.
local function json_value(text)
  local depth, quoted, at = 0, false, 1
  while at <= #text do
    local byte = text:sub(at, at)
    if quoted and byte == "\\" then
      at = at + 1
    elseif byte == '"' then
      quoted = not quoted
      if not quoted and depth == 0 then return text:sub(1, at) end
    elseif not quoted and (byte == "[" or byte == "{") then
      depth = depth + 1
    elseif not quoted and (byte == "]" or byte == "}") then
      depth = depth - 1
      if depth <= 0 then return text:sub(1, at) end
    elseif not quoted and byte == "," and depth == 0 then
      return text:sub(1, at - 1)
    end
    at = at + 1
  end
  return text
end

-- A conversation up to its first answer: later turns begin like the first one.
local function opening(value)
  local answer = value:find('"role"%s*:%s*"assistant"')
  if answer then
    value = value:sub(1, answer - 1):gsub("{[^{}]*$", "")
  end
  return (value:gsub("[%s,%]]+$", ""))
end

local function of_json(body)
  local parts = {}
  for _, name in ipairs(NAMES) do
    local _, stop = body:find('"' .. name .. '"%s*:%s*')
    if stop then
      parts[#parts + 1] = opening(json_value(body:sub(stop + 1, stop + LENGTH)))
    end
  end
  return table.concat(parts)
end

local function varint(bytes, at)
  local value, factor = 0, 1
  for next = at, at + 9 do
    local byte = bytes:byte(next)
    if not byte then return nil end
    value = value + byte % 128 * factor
    if byte < 128 then return value, next + 1 end
    factor = factor * 128
  end
end

-- The fields of a message that have a length: pairs of number and content.
local function fields(bytes, at)
  local found = {}
  for _ = 1, MAX_FIELDS do
    local tag, size
    tag, at = varint(bytes, at)
    if not tag then break end
    local kind = tag % 8
    if kind == 0 or kind == 2 then size, at = varint(bytes, at) end
    if kind ~= 2 then size = ({[0] = size and 0, [1] = 8, [5] = 4})[kind] end
    if not size then break end
    if kind == 2 then
      local content = bytes:sub(at, at + math.min(size, 2 * LENGTH) - 1)
      found[#found + 1] = {(tag - kind) / 8, content}
    end
    at = at + size
  end
  return found
end

-- A google.protobuf.Value without the lengths in front of it, which differ.
local function value(bytes)
  local only = fields(bytes, 1)[1]
  return only and only[2] or ""
end

-- A turn of a conversation; nil for an answer.
local function message(bytes)
  local parts = {}
  for _, field in ipairs(fields(bytes, 1)) do
    if field[1] == 1 and field[2] == "assistant" then return nil end
    parts[#parts + 1] = field[1] == 2 and value(field[2]) or field[2]
  end
  return table.concat(parts, "\0")
end

local READERS = {text = function(bytes) return bytes end, value = value, message = message}

-- Of a frame of gRPC: a byte that says whether it is compressed, four of its length, the message.
local function of_frame(rpc, frame)
  local parts, numbers = {}, FIELDS[rpc]
  if not numbers or frame:byte(1) ~= 0 then return "" end
  for _, field in ipairs(fields(frame, 6)) do
    local kind = numbers[field[1]]
    if kind then
      local part = READERS[kind](field[2])
      if not part then break end
      parts[#parts + 1] = part
    end
  end
  return table.concat(parts, "\0")
end

function envoy_on_request(handle)
  local headers = handle:headers()
  headers:remove(HEADER)
  for _, name in ipairs(PRECEDING) do
    if headers:get(name) then return end
  end
  local of_grpc = (headers:get("content-type") or ""):find("^application/grpc")
  local rpc = headers:get(":path"):match("[^/]*$")
  local body = handle:body()
  if not body then return end
  local bytes = body:getBytes(0, body:length())
  local beginning = of_grpc and of_frame(rpc, bytes) or not of_grpc and of_json(bytes)
  if beginning and beginning ~= "" then
    handle:headers():replace(HEADER, digest(beginning:sub(1, LENGTH)))
  end
end
