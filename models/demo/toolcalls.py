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
    """Return a string property, now and then with a description as real schemas have one."""
    if description and src.chance(0.3):
        return {"type": "string", "description": description}
    return {"type": "string"}


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
PLACE_KEYS = ("location", "city", "place", "town", "location", "where", "city_name", "location")
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
    """Add a wish for a temperature unit to a question."""
    word = unit.capitalize() if src.chance(0.5) else unit
    ending = src.pick(UNIT_ENDINGS).format(unit=word)
    if ending.endswith("."):
        return question + ending
    mark = question[-1] if question[-1] in "?." else ""
    return question.rstrip("?.") + ending + mark


def weather(src: Source) -> Task:
    """Return a question about the weather somewhere."""
    city = src.city()
    if src.chance(0.04):
        city += ", " + src.pick(tuple(facts.CAPITALS))
    elif src.chance(0.05):
        city = city.lower()
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
    canonical = src.chance(0.3)
    name = "get_weather" if canonical else src.split(WEATHER_NAMES)
    tool = define(name, src.split(WEATHER_DESCRIPTIONS), properties, [key])
    degrees = src.number(-15, 40) if src.chance(0.8) else src.number(30, 99)
    condition = src.split(facts.CONDITIONS)
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
    key = src.pick(("city", "city", "timezone", "location", "place", "town"))
    value = place
    if key == "timezone":
        place = src.pick(tuple(facts.TIMEZONES))
        value = facts.TIMEZONES[place]
        if src.chance(0.25):
            place = value
        description = text_type(src, "IANA time zone, e.g. Europe/Paris")
    else:
        if src.chance(0.05):
            place = value = place.lower()
        description = text_type(src, "Name of the city")
    name = "get_time" if src.chance(0.3) else src.split(TIME_NAMES)
    tool = define(name, src.split(TIME_DESCRIPTIONS), {key: description}, [key])
    moment = f"{src.number(0, 23):02d}:{src.number(0, 59):02d}"
    fields: dict[str, Any] = {src.pick(("time", "time", "current_time", "local_time")): moment}
    if src.chance(0.35):
        fields[key] = value
    if src.chance(0.15):
        fields["day"] = src.pick(facts.WEEKDAYS)
    result = moment if src.chance(0.15) else result_json(src, fields)
    question = src.ask(TIME_QUESTIONS, city=place)
    return Task(question, tool, {key: value}, result, f"It is {moment} in {place}.")


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
    text = str(src.number(10 ** (digits - 1), 10**digits - 1))
    return f"{text}.{src.number(1, 9)}" if src.chance(0.1) else text


def expression(src: Source) -> str:
    """Return an arithmetic expression."""
    gap = "" if src.chance(0.25) else " "
    text = operand(src)
    for _ in range(src.pick((1, 1, 1, 1, 2))):
        text += gap + src.pick("+-**/") + gap + operand(src)
    if src.chance(0.06):
        text = f"({text}){gap}{src.pick('*/')}{gap}{operand(src)}"
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
    key = src.pick(("expression", "expression", "formula", "input", "expr", "query"))
    name = "calculator" if src.chance(0.3) else src.split(CALCULATOR_NAMES)
    kind = text_type(src, "The expression to evaluate")
    tool = define(name, src.split(CALCULATOR_DESCRIPTIONS), {key: kind}, [key])
    value = operand(src)
    if src.chance(0.5):
        value = str(src.number(0, 99999))
    result = value if src.chance(0.3) else f'{{"{src.pick(("result", "value"))}": {value}}}'
    question = src.ask(CALCULATOR_QUESTIONS, sum=asked)
    return Task(question, tool, {key: written}, result, f"{written} = {value}")


# --- other tools, which mostly stand beside the three above --------------------------------------


def timer(src: Source) -> Task:
    """Return a wish for a timer."""
    minutes = src.number(1, 90)
    key = src.pick(("minutes", "duration", "minutes"))
    tool = define(
        src.pick(("set_timer", "timer", "start_timer", "countdown")),
        src.pick(("Set a timer", "Start a countdown timer", "Sets a timer for some minutes")),
        {key: {"type": "integer"}},
        [key],
    )
    question = src.ask(
        (
            "Set a timer for {n} minutes.",
            "Start a {n} minute timer.",
            "Wake me in {n} minutes.",
            "Please set a timer for {n} minutes.",
            "Timer for {n} minutes, please.",
            "Can you set a {n} minute timer?",
            "I need a timer for {n} minutes.",
        ),
        n=minutes,
    )
    answer = f"Your timer for {minutes} minutes is set."
    return Task(question, tool, {key: minutes}, result_json(src, {"status": "ok"}), answer)


def search(src: Source) -> Task:
    """Return a wish to search for something."""
    topic = src.split(facts.TOPICS)
    key = src.pick(("query", "query", "q", "keywords"))
    tool = define(
        src.pick(("search", "web_search", "search_web", "find_pages")),
        src.pick(("Search the web", "Search the internet for pages", "Find web pages")),
        {key: text_type(src)},
        [key],
    )
    question = src.ask(
        (
            "Search for {topic}.",
            "Search the web for {topic}.",
            "Find pages about {topic}.",
            "Look up {topic} on the web.",
            "Please search for {topic}.",
            "Can you search for {topic}?",
            "I want to read about {topic}.",
        ),
        topic=topic,
    )
    found = f"{src.number(2, 90)} pages about {topic}"
    result = found if src.chance(0.5) else result_json(src, {"results": found})
    return Task(question, tool, {key: topic}, result, f"I found {found}.")


def translate(src: Source) -> Task:
    """Return a wish for a translation."""
    text, language = src.split(facts.SHORT_TEXTS), src.split(facts.LANGUAGES)
    key = src.pick(("language", "target", "to"))
    tool = define(
        src.pick(("translate", "translate_text", "translator")),
        src.pick(("Translate text", "Translate a text to another language")),
        {"text": text_type(src), key: text_type(src)},
        ["text", key],
    )
    question = src.ask(
        (
            'Translate "{text}" to {language}.',
            'Translate "{text}" into {language}.',
            'How do you say "{text}" in {language}?',
            'What is "{text}" in {language}?',
            'Please translate "{text}" to {language}.',
            'Say "{text}" in {language}.',
        ),
        text=text,
        language=language,
    )
    words = " ".join(src.invented(2).lower() for _ in range(src.number(1, 3)))
    result = result_json(src, {"translation": words})
    return Task(question, tool, {"text": text, key: language}, result, f"It means: {words}")


def currency(src: Source) -> Task:
    """Return a wish to convert money."""
    amount, value = src.number(1, 900), src.number(1, 9000)
    origin, target = src.rng.sample(facts.CURRENCIES, 2)
    tool = define(
        src.pick(("convert_currency", "currency", "exchange")),
        src.pick(("Convert money", "Convert an amount from one currency to another")),
        {"amount": {"type": "number"}, "from": text_type(src), "to": text_type(src)},
        ["amount", "from", "to"],
    )
    question = src.ask(
        (
            "Convert {n} {a} to {b}.",
            "How much is {n} {a} in {b}?",
            "What is {n} {a} in {b}?",
            "Change {n} {a} into {b}.",
            "How many {b} are {n} {a}?",
            "Please convert {n} {a} to {b}.",
        ),
        n=amount,
        a=origin,
        b=target,
    )
    arguments = {"amount": amount, "from": origin, "to": target}
    result = result_json(src, {"result": value})
    return Task(question, tool, arguments, result, f"{amount} {origin} is {value} {target}.")


def message(src: Source) -> Task:
    """Return a wish to send a message to someone."""
    name, text = src.name(), src.split(facts.SHORT_TEXTS)
    who = src.pick(("recipient", "to", "name"))
    what = src.pick(("text", "message"))
    tool = define(
        src.pick(("send_message", "send_text", "message")),
        src.pick(("Send a message to someone", "Send a text message")),
        {who: text_type(src), what: text_type(src)},
        [who, what],
    )
    question = src.ask(
        (
            'Send a message to {name}: "{text}"',
            'Tell {name} "{text}"',
            'Write to {name}: "{text}"',
            'Text {name} "{text}"',
            'Please send {name} the message "{text}"',
            'Message {name}: "{text}"',
        ),
        name=name,
        text=text,
    )
    result = result_json(src, {"status": "sent"})
    return Task(question, tool, {who: name, what: text}, result, f"I sent your message to {name}.")


def reminder(src: Source) -> Task:
    """Return a wish to be reminded of something."""
    chore = src.split(facts.CHORES)
    key = src.pick(("text", "task", "title"))
    tool = define(
        src.pick(("add_reminder", "remind", "create_reminder", "add_todo")),
        src.pick(("Add a reminder", "Remember something to do", "Create a reminder")),
        {key: text_type(src)},
        [key],
    )
    question = src.ask(
        (
            "Remind me to {chore}.",
            "I must not forget to {chore}.",
            "Please remind me to {chore}.",
            "Add a reminder to {chore}.",
            "Don't let me forget to {chore}.",
            "Can you remind me to {chore}?",
        ),
        chore=chore,
    )
    result = result_json(src, {"status": "ok"})
    return Task(question, tool, {key: chore}, result, f"I will remind you to {chore}.")


def lights(src: Source) -> Task:
    """Return a wish to switch a light."""
    room, state = src.split(facts.ROOMS), src.pick(("on", "off"))
    tool = define(
        src.pick(("set_light", "light", "switch_light")),
        src.pick(("Switch a light on or off", "Control the lights of a room")),
        {"room": text_type(src), "state": {"type": "string", "enum": ["on", "off"]}},
        ["room", "state"],
    )
    question = src.ask(
        (
            "Turn {state} the light in the {room}.",
            "Switch the {room} light {state}.",
            "Turn the light in the {room} {state}.",
            "Please turn {state} the {room} light.",
            "Light {state} in the {room}.",
            "Can you turn the {room} light {state}?",
        ),
        state=state,
        room=room,
    )
    arguments = {"room": room, "state": state}
    result = result_json(src, {"status": "ok"})
    return Task(question, tool, arguments, result, f"The light in the {room} is now {state}.")


MAIN_TASKS: tuple[Maker, ...] = (weather, clock_time, calculation)
OTHER_TASKS: tuple[Maker, ...] = (
    timer, search, translate, currency, message, reminder, lights,
)  # fmt: skip

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


def toolbox(src: Source, makers: list[Maker], tools: list[Tool]) -> list[Tool]:
    """Return the given tools, in any order, among others that the given makers did not make."""
    others = [maker for maker in MAIN_TASKS if maker not in makers and src.chance(0.65)]
    if src.chance(0.35):
        extra = src.rng.sample(OTHER_TASKS, src.number(1, 2))
        others += [maker for maker in extra if maker not in makers]
    if not tools and not others:
        others = [calculation]
    # Two tools of one name could not be told apart; the given ones come last and so prevail.
    by_name = {tool["function"]["name"]: tool for tool in [m(src).tool for m in others] + tools}
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


def choose_task(src: Source) -> tuple[Maker, Task]:
    """Return a random task, mostly weather, time or calculator, and its maker."""
    maker = src.pick(MAIN_TASKS) if src.chance(0.8) else src.pick(OTHER_TASKS)
    return maker, maker(src)


def call_document(src: Source, before: list[Message]) -> Document:
    """Return a conversation that ends with the right tool call."""
    maker, task = choose_task(src)
    messages = [*before, {"role": "user", "content": task.question}, call_message(src, task)]
    accepted = envelope(task.tool["function"]["name"], task.arguments)
    tools = toolbox(src, [maker], [task.tool])
    return Document("tool_call", tuple(messages), tuple(tools), accepted=(accepted,))


def answer_document(src: Source, before: list[Message]) -> Document:
    """Return a conversation that ends with an answer from a tool's result, or with a later call."""
    maker, task = choose_task(src)
    makers, given = [maker], [task.tool]
    messages = [*before, *result_turns(src, task, 0)]
    answer = task.answer
    if src.chance(0.05):
        reason = src.pick(("not found", "timeout", "unknown city", "no connection", "bad input"))
        messages[-1]["content"] = f'{{"error": "{reason}"}}'
        answer = f"I am sorry, the tool reported an error: {reason}."
    elif src.chance(0.4):
        # A second question after the first answer: the model must not repeat the old call.
        other, second = choose_task(src)
        if other is maker or src.chance(0.5):
            second = again(src, maker, task.tool)
        else:
            makers.append(other)
            given.append(second.tool)
        messages.append({"role": "assistant", "content": answer})
        messages += result_turns(src, second, 1)
        answer = second.answer
        if src.chance(0.5):
            accepted = envelope(second.tool["function"]["name"], second.arguments)
            tools = toolbox(src, makers, given)
            return Document("tool_call", tuple(messages[:-1]), tuple(tools), accepted=(accepted,))
    messages.append({"role": "assistant", "content": answer})
    tools = toolbox(src, makers, given)
    return Document("tool_answer", tuple(messages), tuple(tools), accepted=(answer,))


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
        question = src.ask(questions)
        tools = toolbox(src, [maker], [maker(src).tool])
    else:
        maker = src.pick(OTHER_TASKS) if src.chance(0.5) else src.pick((weather, clock_time))
        question, answer = maker(src).question, NO_TOOL
        tools = toolbox(src, [maker], [])
    messages = [
        *before,
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return Document("tool_none", tuple(messages), tuple(tools), accepted=(answer,))
