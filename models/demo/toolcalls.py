"""Tool-calling tasks: tool definitions in many wordings, calls and answers from their results."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import facts
from source import Document, Message, Source, Tool

Arguments = dict[str, Any]

NO_TOOL = "I am sorry, none of my tools can do that."


@dataclass(frozen=True)
class Task:
    """A question, the tool that answers it, the arguments, the tool's result and the answer."""

    question: str
    tool: Tool
    arguments: Arguments
    result: str
    answer: str


Maker = Callable[[Source], Task]


def envelope(name: str, arguments: Arguments) -> str:
    """Return the text the assistant writes to call a tool."""
    ordered = {key: arguments[key] for key in sorted(arguments)}
    return json.dumps({"function": {"_name": name, **ordered}}, ensure_ascii=False)


def define(name: str, description: str, properties: dict[str, Any], required: list[str]) -> Tool:
    """Return a tool definition in the shape of the OpenAI API."""
    schema = {"type": "object", "properties": properties, "required": required}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": schema},
    }


def text_type(src: Source, description: str = "") -> dict[str, Any]:
    """Return a string property, sometimes with a description, as in real schemas."""
    if description and src.chance(0.3):
        return {"type": "string", "description": description}
    return {"type": "string"}


TOOL_VERBS = (
    "get", "fetch", "check", "find", "read", "show", "ask", "lookup", "query", "do", "run", "give",
)  # fmt: skip
TOOL_ADJECTIVES = ("", "", "current_", "local_", "live_", "quick_", "simple_", "new_", "my_")


def tool_name(src: Source, usual: str, known: tuple[str, ...], nouns: tuple[str, ...]) -> str:
    """Return a name as people give it to a tool.

    In training, many names are made up, so that the model has to read them from the definition.
    """
    style = src.rng.random()
    if style < 0.35:
        return usual
    if style < 0.75 or src.held_out:
        return src.pick(known)
    return f"{src.pick(TOOL_VERBS)}_{src.pick(TOOL_ADJECTIVES)}{src.pick(nouns)}"


def call_message(src: Source, task: Task) -> Message:
    """Return the assistant message that calls the tool of a task."""
    function = {"name": task.tool["function"]["name"], "arguments": task.arguments}
    call = {"id": f"call_{src.number(0, 999)}", "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def result_json(src: Source, fields: dict[str, Any]) -> str:
    """Return a tool result as JSON with its fields in any order."""
    items = list(fields.items())
    src.rng.shuffle(items)
    if src.chance(0.15):
        return json.dumps(dict(items), ensure_ascii=False, separators=(",", ":"))
    return json.dumps(dict(items), ensure_ascii=False)


# --- weather -------------------------------------------------------------------------------------

WEATHER_NAMES = (
    "get_weather", "weather", "get_current_weather", "weather_lookup", "fetch_weather",
    "get_forecast", "current_weather", "weather_report", "check_weather", "forecast", "wx",
    "weather_now",
)  # fmt: skip
WEATHER_DESCRIPTIONS = (
    "Get the current weather in a location",
    "Get the weather",
    "Get the current weather for a city.",
    "Returns the weather at a place",
    "Look up temperature and conditions",
    "Weather forecast for a given city",
    "Tells how warm it is and whether it rains",
    "Current weather",
    "Get the current weather in a given location",
    "Find out the weather conditions somewhere.",
    "Gives temperature and sky conditions for a town",
    "Reports the weather of a city",
)
PLACE_KEYS = ("location", "location", "city", "place", "town")
WEATHER_QUESTIONS = (
    "What is the weather in {city}?",
    "What's the weather like in {city}?",
    "How is the weather in {city}?",
    "Is it raining in {city}?",
    "Tell me the weather in {city}.",
    "What is the weather like in {city} today?",
    "What's the weather in {city}?",
    "Weather in {city}?",
    "How warm is it in {city} right now?",
    "Do I need an umbrella in {city}?",
    "What is the temperature in {city}?",
    "Can you check the weather in {city}?",
    "Give me the forecast for {city}.",
    "I am in {city}, what is the weather?",
    "How cold is it in {city}?",
    "Is it sunny in {city} today?",
    "Please tell me the current weather in {city}.",
    "Could you tell me how the weather is in {city}?",
    "What will the weather be like in {city} tomorrow?",
    "I am going to {city}. How is the weather there?",
    "Will it rain in {city} today?",
    "How hot is it in {city}?",
    "Should I take a coat to {city}?",
    "What's the temperature in {city} now?",
    "Hi, what is the weather in {city}?",
    "I want to know the weather in {city}.",
    "Hello! Can you tell me the weather in {city}?",
    "{city} weather",
    "What is the current weather in {city}?",
    "weather {city}",
)
UNIT_ENDINGS = (
    " in {unit}", " Use {unit}.", " in degrees {unit}", " ({unit})", " Please answer in {unit}.",
    " I want {unit}.",
)  # fmt: skip


def with_unit(src: Source, question: str, unit: str) -> str:
    """Add a request for a temperature unit to a question."""
    word = unit.capitalize() if src.chance(0.5) else unit
    ending = src.pick(UNIT_ENDINGS).format(unit=word)
    if ending.endswith("."):
        return question + ending
    mark = question[-1] if question[-1] in "?." else ""
    return question.rstrip("?.") + ending + mark


def weather(src: Source) -> Task:
    """Return a question about the weather somewhere."""
    city = src.city()
    question = src.ask(WEATHER_QUESTIONS, city=city)
    key = src.pick(PLACE_KEYS)
    properties: dict[str, Any] = {key: text_type(src, "The city, e.g. San Francisco")}
    arguments: Arguments = {key: city}
    if src.chance(0.5):
        unit_key = src.pick(("unit", "unit", "units", "format"))
        properties[unit_key] = {"type": "string", "enum": ["celsius", "fahrenheit"]}
        if src.chance(0.4):
            unit = src.pick(("celsius", "fahrenheit"))
            question = with_unit(src, question, unit)
            arguments[unit_key] = unit
    name = tool_name(src, "get_weather", WEATHER_NAMES, ("weather", "forecast"))
    tool = define(name, src.pick(WEATHER_DESCRIPTIONS), properties, [key])
    degrees = src.number(-15, 40) if src.chance(0.8) else src.number(30, 99)
    condition = src.pick(facts.CONDITIONS)
    answer = f"It is {degrees} degrees and {condition} in {city}."
    return Task(question, tool, arguments, weather_result(src, city, degrees, condition), answer)


def weather_result(src: Source, city: str, degrees: int, condition: str) -> str:
    """Return what a weather tool may reply."""
    if src.chance(0.12):
        return src.pick((f"{degrees} degrees and {condition}", f"{condition}, {degrees} degrees"))
    fields: dict[str, Any] = {
        src.pick(("temperature", "temperature", "temp", "degrees", "temperature_c")): degrees,
        src.pick(("condition", "conditions", "description", "sky", "weather")): condition,
    }
    if src.chance(0.4):
        fields[src.pick(("location", "city"))] = city
    if src.chance(0.25):
        fields["unit"] = src.pick(("celsius", "fahrenheit", "C", "F"))
    if src.chance(0.2):
        fields[src.pick(("humidity", "wind", "wind_speed"))] = src.number(1, 95)
    return result_json(src, fields)


# --- time ----------------------------------------------------------------------------------------

TIME_NAMES = (
    "get_time", "time", "get_current_time", "current_time", "world_clock", "time_lookup", "clock",
    "local_time", "fetch_time", "time_in_city", "get_local_time", "what_time",
)  # fmt: skip
TIME_DESCRIPTIONS = (
    "Get the current time in a city",
    "Get the time",
    "Returns the local time of a place",
    "Tells what time it is in a city.",
    "Current time",
    "World clock",
    "Get the current time",
    "Look up the clock time somewhere.",
    "Gives the hour and minute in a town",
    "Get the local time for a given city",
    "Get the current local time in a given location",
    "Find the time of day",
)
TIME_QUESTIONS = (
    "What time is it in {city}?",
    "What is the time in {city}?",
    "Tell me the time in {city}.",
    "What's the time in {city}?",
    "What time is it now in {city}?",
    "Can you tell me the time in {city}?",
    "How late is it in {city}?",
    "Current time in {city}?",
    "Do you know what time it is in {city}?",
    "What is the local time in {city}?",
    "Please give me the time in {city}.",
    "What is the current time in {city}?",
    "Time in {city}?",
    "I need to call someone in {city}. What time is it there?",
    "Is it late in {city} now?",
    "What's the current time in {city}?",
    "What does the clock say in {city}?",
    "Could you check the time in {city}?",
    "I live in {city}. What time is it?",
    "Hello, what time is it in {city}?",
    "time {city}",
    "{city} time",
)


def clock_time(src: Source) -> Task:
    """Return a question about the time somewhere."""
    place = src.city()
    key = src.pick(("city", "city", "location", "place", "town"))
    description = text_type(src, "Name of the city")
    name = tool_name(src, "get_time", TIME_NAMES, ("time", "clock"))
    tool = define(name, src.pick(TIME_DESCRIPTIONS), {key: description}, [key])
    moment = f"{src.number(0, 23):02d}:{src.number(0, 59):02d}"
    fields: dict[str, Any] = {src.pick(("time", "time", "current_time", "local_time")): moment}
    if src.chance(0.35):
        fields[key] = place
    if src.chance(0.15):
        fields["day"] = src.pick(facts.WEEKDAYS)
    result = moment if src.chance(0.15) else result_json(src, fields)
    question = src.ask(TIME_QUESTIONS, city=place)
    return Task(question, tool, {key: place}, result, f"It is {moment} in {place}.")


# --- calculator ----------------------------------------------------------------------------------

CALCULATOR_NAMES = (
    "calculator", "calculate", "calc", "math", "compute", "evaluate", "do_math", "arithmetic",
    "solve", "eval_expression", "evaluate_expression", "math_tool",
)  # fmt: skip
CALCULATOR_DESCRIPTIONS = (
    "Evaluate an arithmetic expression",
    "Calculate the value of an expression",
    "A simple calculator",
    "Do arithmetic with numbers",
    "Computes sums, products and more.",
    "Evaluate a mathematical expression",
    "Calculator",
    "Works out calculations",
    "Evaluates math expressions such as 2 + 2.",
    "Solve an arithmetic problem",
    "Compute the result of a formula",
    "Perform a calculation",
)
CALCULATOR_QUESTIONS = (
    "What is {sum}?",
    "Calculate {sum}.",
    "How much is {sum}?",
    "Compute {sum}.",
    "What's {sum}?",
    "Can you calculate {sum}?",
    "Please work out {sum}.",
    "{sum}",
    "Tell me what {sum} is.",
    "{sum} = ?",
    "Solve {sum}.",
    "What is the result of {sum}?",
    "I need to know {sum}.",
    "Evaluate {sum}.",
    "What does {sum} give?",
    "What do I get for {sum}?",
    "Hello, how much is {sum}?",
    "Could you compute {sum} for me?",
)


def operand(src: Source) -> str:
    """Return a number as people write it."""
    digits = src.pick((1, 1, 2, 2, 2, 3, 4))
    return str(src.number(10 ** (digits - 1), 10**digits - 1))


def expression(src: Source) -> str:
    """Return an arithmetic expression."""
    gap = "" if src.chance(0.25) else " "
    text = operand(src)
    for _ in range(src.pick((1, 1, 1, 1, 2))):
        text += gap + src.pick("+-**/") + gap + operand(src)
    return text


def calculation(src: Source) -> Task:
    """Return a question that asks for a calculation."""
    asked = written = expression(src)
    if src.chance(0.2):
        left, right = operand(src), operand(src)
        word, sign = src.pick(
            (("plus", "+"), ("minus", "-"), ("times", "*"), ("divided by", "/"), ("x", "*"))
        )
        asked, written = f"{left} {word} {right}", f"{left} {sign} {right}"
    key = src.pick(("expression", "expression", "formula", "input"))
    name = tool_name(src, "calculator", CALCULATOR_NAMES, ("calculation", "math", "result"))
    kind = text_type(src, "The expression to evaluate")
    tool = define(name, src.pick(CALCULATOR_DESCRIPTIONS), {key: kind}, [key])
    value = operand(src)
    if src.chance(0.5):
        value = str(src.number(0, 99999))
    result = value if src.chance(0.3) else f'{{"{src.pick(("result", "value"))}": {value}}}'
    question = src.ask(CALCULATOR_QUESTIONS, sum=asked)
    return Task(question, tool, {key: written}, result, f"{written} = {value}")


TASKS: tuple[Maker, ...] = (weather, clock_time, calculation)

MISSING: tuple[tuple[Maker, tuple[str, ...], str], ...] = (
    (
        weather,
        (
            "What is the weather?", "How is the weather?", "Check the weather, please.",
            "Will it rain?", "Tell me the weather.", "What's the weather like?",
        ),
        "Which city do you mean?",
    ),
    (
        clock_time,
        (
            "What time is it?", "Tell me the time.", "What is the time?", "How late is it?",
            "Can you tell me the time?", "What's the time?",
        ),
        "Which city do you mean?",
    ),
    (
        calculation,
        (
            "Calculate something for me.", "Can you do a calculation?", "Please calculate.",
            "I need a calculation.", "Do some math.", "Can you calculate something?",
        ),
        "What should I calculate?",
    ),
)  # fmt: skip


def tool_of(src: Source, maker: Maker) -> Tool:
    """Return a tool of a maker without asking its question."""
    asked = list(src.kept_back)
    tool = maker(src).tool
    src.kept_back = asked
    return tool


def toolbox(src: Source, makers: list[Maker], tools: list[Tool]) -> list[Tool]:
    """Return the given tools in random order, together with tools of other makers."""
    others = [maker for maker in TASKS if maker not in makers and src.chance(0.6)]
    if not tools and not others:
        others = [calculation]
    # Two tools of the same name are ambiguous: the given ones come last and replace the others.
    by_name = {tool["function"]["name"]: tool for tool in [tool_of(src, m) for m in others] + tools}
    box = list(by_name.values())
    src.rng.shuffle(box)
    return box


def again(src: Source, maker: Maker, tool: Tool) -> Task:
    """Return another task of the same maker that the given tool can do."""
    known = set(tool["function"]["parameters"]["properties"])
    while True:
        task = maker(src)
        if known.issuperset(task.arguments):
            return replace(task, tool=tool)


def working_document(src: Source, before: list[Message]) -> Document:
    """Return a conversation of tool calls that ends with a call or with an answer from a result.

    Several questions share one list of tools: the list is long, and only the turns of the assistant
    are learned.
    """
    makers = src.rng.sample(TASKS, src.pick((1, 1, 1, 2, 2)))
    first = [maker(src) for maker in makers]
    tools = tuple(toolbox(src, makers, [task.tool for task in first]))
    tasks = list(first)
    while src.chance(0.55) and len(tasks) < 5:
        at = src.number(0, len(makers) - 1)
        tasks.append(again(src, makers[at], first[at].tool))
    messages = list(before)
    for number, task in enumerate(tasks):
        messages += result_turns(src, task, number)
        messages.append({"role": "assistant", "content": task.answer})
    last = tasks[-1]
    if src.chance(0.5):
        accepted = envelope(last.tool["function"]["name"], last.arguments)
        return Document("tool_call", tuple(messages[:-2]), tools, accepted=(accepted,))
    return Document("tool_answer", tuple(messages), tools, accepted=(last.answer,))


def result_turns(src: Source, task: Task, number: int) -> list[Message]:
    """Return the question of a task, the call and the tool's result."""
    return [
        {"role": "user", "content": task.question},
        call_message(src, task),
        {"role": "tool", "tool_call_id": f"call_{number}", "content": task.result},
    ]


def missing_document(src: Source, before: list[Message]) -> Document:
    """Return a question that lacks information, or one that no tool can answer."""
    if src.chance(0.5):
        maker, questions, answer = src.pick(MISSING)
        question = src.address(questions)
        tools = toolbox(src, [maker], [tool_of(src, maker)])
    else:
        maker = src.pick((weather, clock_time))
        tools = toolbox(src, [maker], [])
        question, answer = maker(src).question, NO_TOOL
    messages = [
        *before,
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return Document("tool_none", tuple(messages), tuple(tools), accepted=(answer,))
