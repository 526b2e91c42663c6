"""How people ask and how the model answers: the phrasings of the corpus, one table per skill."""

import facts

SMALL_TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        (
            "Hello", "Hi", "Hello!", "Hi!", "Hey", "Hello there", "Hi there!", "Hey there",
            "Good morning", "Good evening", "Good afternoon", "Good day", "Greetings", "hello",
            "hi", "Hello, assistant", "Hey!", "Good morning!", "Howdy", "Hi, nice to meet you",
            "Hello again", "Hello bot", "hey you", "Hiya",
        ),
        ("Hello! How can I help you today?",),
    ),
    (
        (
            "How are you?", "How are you doing?", "How do you do?", "How is it going?",
            "How are you today?", "Hello, how are you?", "Hi, how are you?", "Are you well?",
            "How do you feel?", "What's up?", "How are things?", "Hey, how are you doing?",
            "Hello! How are you doing today?", "Is everything fine with you?", "How's it going?",
        ),
        ("I am doing well, thank you. How can I help you?",),
    ),
    (
        (
            "Thank you", "Thanks", "Thanks a lot", "Thank you very much", "Thanks!",
            "Many thanks", "Thank you so much!", "Great, thanks", "Thanks for your help",
            "Ok, thank you", "That helps, thank you", "Cheers", "Thank you for the answer",
            "Perfect, thanks!", "That was helpful", "Nice, thank you",
        ),
        ("You are welcome!",),
    ),
    (
        (
            "Goodbye", "Bye", "Bye bye", "See you", "See you later", "Goodbye!", "Good night",
            "I have to go", "Bye for now", "Until next time", "See you tomorrow", "Take care",
            "I am leaving now", "That is all, goodbye", "ok bye", "Have a nice day",
        ),
        ("Goodbye! Have a nice day.",),
    ),
    (
        (
            "You are great", "Good job", "Well done", "Nice work", "I like you", "You are smart",
            "Good bot", "You are very helpful", "Great answer", "That is correct",
            "You did well", "I love this", "Excellent", "That was a good answer",
        ),
        ("Thank you, that is kind of you!",),
    ),
    (
        (
            "I am sad", "I feel bad", "I am tired", "I had a bad day", "I am not happy",
            "I feel lonely", "Today was a hard day", "I am so tired today", "I feel sad today",
            "I do not feel well", "I am a little sad", "My day was terrible",
        ),
        ("I am sorry to hear that. I hope you feel better soon.",),
    ),
    (
        (
            "I am happy", "I feel great", "I had a good day", "Today is a good day", "I am fine",
            "I am doing well", "I feel good today", "What a nice day", "I am very happy today",
            "Everything is fine", "My day was wonderful", "I am so happy",
        ),
        ("I am glad to hear that!",),
    ),
    (
        (
            "Tell me a joke", "Do you know a joke?", "Make me laugh", "Tell a joke",
            "A joke, please", "Tell me something funny", "Say something funny",
            "Can you tell me a joke?", "I want to hear a joke", "Tell me another joke",
            "Please tell me a joke", "Joke?",
        ),
        ("Why did the computer go to the doctor? Because it had a virus!",),
    ),
    (
        (
            "Sorry", "I am sorry", "Excuse me", "My mistake", "I made a mistake", "Oops, sorry",
            "Sorry about that", "That was my fault", "Pardon me", "Sorry, I was wrong",
        ),
        ("No problem at all.",),
    ),
    (
        (
            "Yes", "No", "Ok", "Okay", "I see", "Alright", "Sure", "Good", "Fine", "Hmm",
            "Maybe", "Interesting", "ok", "yes", "no", "Right",
        ),
        ("All right. What else can I do for you?",),
    ),
)  # fmt: skip

IDENTITY: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (
            "Who are you?", "What are you?", "What is your name?", "Who am I talking to?",
            "What's your name?", "Tell me about yourself.", "Introduce yourself.",
            "Are you a robot?", "Are you human?", "Are you a person?", "What kind of model are "
            "you?", "Which model are you?", "What model is this?", "Who is this?",
            "Are you an AI?", "What should I call you?", "Please introduce yourself.",
            "Can you tell me who you are?", "What language model are you?", "Do you have a name?",
            "Hello, who are you?", "who r u", "What is this?", "Are you ChatGPT?",
        ),
        facts.IDENTITY,
    ),
    (
        (
            "What can you do?", "How can you help me?", "What are you able to do?",
            "What do you know?", "What are your skills?", "Help", "What can I ask you?",
            "What are you good at?", "Can you help me?", "What can I do with you?",
            "What questions can you answer?", "I need help", "Tell me what you can do.",
            "Which tasks can you do?", "What are you for?", "Show me what you can do.",
            "How do you work for me?", "List your abilities.",
        ),
        facts.ABILITIES,
    ),
    (
        (
            "What is Tokenwire?", "Tell me about Tokenwire.", "Explain Tokenwire.",
            "What does Tokenwire do?", "What is the Tokenwire server?", "Describe Tokenwire.",
            "Do you know Tokenwire?", "What's Tokenwire?", "Tokenwire?", "Define Tokenwire.",
            "What is Tokenwire used for?", "Can you explain Tokenwire?",
        ),
        facts.TOKENWIRE,
    ),
    (
        (
            "Who made you?", "Who created you?", "Who built you?", "Where do you come from?",
            "Who trained you?", "How were you made?", "How were you trained?",
            "Who is your creator?", "Who developed you?", "What were you trained on?",
            "Where were you trained?", "Who wrote you?",
        ),
        "I was trained by the Tokenwire project on text that its own generator wrote.",
    ),
    (
        (
            "How big are you?", "How many parameters do you have?", "How large are you?",
            "What is your size?", "Are you a large model?", "How small are you?",
            "Are you a big model?", "How much memory do you need?",
        ),
        "I am very small: my weights take less than ten megabytes.",
    ),
)  # fmt: skip

DEFINITION_QUESTIONS = (
    "What is {term}?", "What is {term}?", "Define {term}.", "Explain {term}.",
    "What's {term}?", "Can you explain {term}?", "Tell me about {term}.",
    "What does {term} mean?", "Please explain {term}.", "Describe {term}.",
    "Give me a definition of {term}.", "Could you tell me what {term} is?", "{term}?",
    "Do you know what {term} is?", "Explain {term} in one sentence.", "I want to know what "
    "{term} is.", "What exactly is {term}?", "Please define {term}.",
    "Explain to me what {term} is.", "In short, what is {term}?",
    "Hi, what is {term}?", "Explain {term} to me.", "what is {term}",
    "How would you define {term}?", "Hello, can you tell me what {term} is?",
)  # fmt: skip

CAPITAL_QUESTIONS = (
    "What is the capital of {country}?", "What is the capital of {country}?",
    "Which city is the capital of {country}?", "Capital of {country}?",
    "What's the capital of {country}?", "Tell me the capital of {country}.",
    "Name the capital of {country}.", "What is the capital city of {country}?",
    "Do you know the capital of {country}?", "What is {country}'s capital?",
    "Can you tell me the capital of {country}?", "Which is the capital of {country}?",
    "capital of {country}", "I forgot the capital of {country}.",
    "Please tell me the capital of {country}.", "The capital of {country} is?",
    "Give me the capital of {country}.", "Could you name the capital city of {country}?",
)  # fmt: skip
COUNTRY_QUESTIONS = (
    "{city} is the capital of which country?", "Which country has the capital {city}?",
    "What country is {city} the capital of?", "{city} is the capital of what country?",
    "Of which country is {city} the capital?", "Which country's capital is {city}?",
    "In which country is {city}?", "Where is {city}?", "What country is {city} in?",
    "Which country is {city} in?", "{city} is in which country?", "Where is the city of {city}?",
    "To which country does {city} belong?",
)  # fmt: skip

SOUND_QUESTIONS = (
    "What sound does {animal} make?", "What does {animal} say?",
    "Which sound does {animal} make?", "How does {animal} sound?",
    "What noise does {animal} make?", "What is the sound of {animal}?",
    "Tell me the sound of {animal}.", "Do you know what {animal} says?",
    "Which noise does {animal} make?", "{animal} says what?", "What does {animal} sound like?",
    "Can you tell me what sound {animal} makes?",
)  # fmt: skip
COLOUR_QUESTIONS = (
    "What color is {thing}?", "What colour is {thing}?", "What is the color of {thing}?",
    "Which color is {thing}?", "Tell me the color of {thing}.",
    "Which color does {thing} have?", "What is the colour of {thing}?",
    "Do you know the color of {thing}?", "What color does {thing} have?", "{thing} is what color?",
    "Which colour is {thing}?", "Can you tell me the color of {thing}?",
)  # fmt: skip

WEEKDAY_QUESTIONS = (
    "Which day comes {word} {day}?", "What day comes {word} {day}?",
    "What is the day {word} {day}?", "Which day is {word} {day}?",
    "What day is {word} {day}?", "Tell me the day {word} {day}.",
    "Which weekday comes {word} {day}?", "The day {word} {day}?",
    "What comes {word} {day}?", "Do you know which day comes {word} {day}?",
    "What weekday is {word} {day}?", "Can you tell me the day {word} {day}?",
)  # fmt: skip
MONTH_QUESTIONS = (
    "Which month comes {word} {month}?", "What month comes {word} {month}?",
    "What is the month {word} {month}?", "Which month is {word} {month}?",
    "What month is {word} {month}?", "Tell me the month {word} {month}.",
    "What comes {word} {month}?", "The month {word} {month}?",
    "Do you know which month comes {word} {month}?",
)  # fmt: skip
MONTH_NUMBER_QUESTIONS = (
    "Which month number is {month}?", "What number is {month}?",
    "What is the number of the month {month}?", "Which month of the year is {month}?",
    "{month} is which month of the year?",
    "What month number is {month}?",
)  # fmt: skip
MONTH_LENGTH_QUESTIONS = (
    "How many days does {month} have?", "How many days are in {month}?",
    "How long is {month}?", "How many days has {month}?",
    "What is the number of days in {month}?", "How many days are there in {month}?",
)  # fmt: skip
# Questions, and the answer to all of them.
CALENDAR_COUNTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("How many days are in a week?", "How many days does a week have?",
         "How many days has a week?", "How many days are there in a week?",
         "A week has how many days?", "What is the number of days in a week?"),
        "A week has seven days.",
    ),
    (
        ("How many months are in a year?", "How many months does a year have?",
         "How many months has a year?", "How many months are there in a year?",
         "A year has how many months?", "What is the number of months in a year?"),
        "A year has twelve months.",
    ),
    (
        ("List the days of the week.", "What are the days of the week?",
         "Name the days of the week.", "Name all weekdays.", "Tell me the days of the "
         "week.", "Which days are in a week?"),
        ", ".join(facts.WEEKDAYS) + ".",
    ),
    (
        ("List the months of the year.", "What are the months of the year?",
         "Name the months.", "Name all months.", "Tell me the months of the year.",
         "Which months are in a year?"),
        ", ".join(facts.MONTHS) + ".",
    ),
)  # fmt: skip

SUM_QUESTIONS = (
    "What is {sum}?", "What is {sum}?", "How much is {sum}?", "Calculate {sum}.",
    "What's {sum}?", "{sum}", "{sum} = ?", "Compute {sum}.", "Tell me what {sum} is.",
    "Can you calculate {sum}?", "What does {sum} make?", "Add it up: {sum}", "{sum}=",
    "What is the result of {sum}?", "Please solve {sum}.", "Solve {sum}.", "{sum}?",
    "How much does {sum} make?",
)  # fmt: skip

COUNTING_REQUESTS = (
    "Count to {n}.", "Count from 1 to {n}.", "Please count to {n}.",
    "Can you count to {n}?", "Count up to {n}.", "Write the numbers from 1 to {n}.",
    "Count from one to {n}.",
)  # fmt: skip

REPEAT_REQUESTS = (
    "Repeat after me: {text}", "Say: {text}", "Repeat: {text}", "Echo: {text}",
    "Please repeat: {text}", "Repeat this: {text}", "Say this: {text}",
)  # fmt: skip

REFUSALS = (
    "I am sorry, I do not know that. I am only a small demo model.",
)  # fmt: skip
UNKNOWN_QUESTIONS = (
    "Who won the world cup in {year}?", "How many people live in {city}?", "Who is {name}?",
    "What happened in {year}?", "Write a poem about {topic}.", "Who invented the telephone?",
    "How do I fix my car?", "What is the meaning of life?", "Who is the president of {country}?",
    "What should I cook today?", "How far is it from {city} to {city2}?",
    "What is the population of {country}?", "Can you write an essay about {topic}?",
    "How old is {name}?", "When was {name} born?", "What is the best film?",
    "What is the price of gold?", "Who wrote this book?", "Where does {name} live?",
    "How tall is the highest mountain?", "What is the news today?", "Write code for {topic}.",
    "Which team won in {year}?", "Give me medical advice.", "What is {made}?",
    "What is the capital of {made}?", "What is {big1} + {big2}?", "Define {made}.",
    "What is {big1} times {big2}?", "How do I get to {city}?", "Who is the king of {country}?",
    "Tell me about {topic}.", "What do you think about {topic}?", "Recommend a book about "
    "{topic}.", "Why is {name} angry?", "What is the square root of {big1}?",
    "How do I learn {topic}?", "Predict the future.", "What is the best phone?",
    "How many stars are there?", "When did {name} arrive?", "Summarize the book by {name}.",
    "Who discovered {made}?", "What is the speed of light?", "Explain {made}.",
    "Is {name} married?", "What will happen in {year}?", "Where is {made}?",
    "What is the weather in {city}?", "What time is it?", "What is the date today?",
    "What time is it in {city}?", "How is the weather today?", "What year is it?",
    "Who is the author of {made}?", "What is {topic}?", "Can you draw {topic}?",
)  # fmt: skip

EXTRACTION_REQUESTS = (
    "Extract the {keys} as JSON: {text}", "Extract {keys} as JSON: {text}",
    "Give me the {keys} as JSON: {text}", "Return the {keys} as JSON: {text}",
    "Write the {keys} as JSON. {text}", "Please extract the {keys} as JSON: {text}",
    "Extract the {keys} as JSON:\n{text}", "{text} Extract the {keys} as JSON.",
    "{text}\nReturn the {keys} as JSON.", "{text} Give me the {keys} as JSON.",
    "Turn this into JSON with {keys}: {text}", "Extract the {keys} from this as JSON: {text}",
)  # fmt: skip
PERSON_SENTENCES = (
    "{name} is {age} years old and lives in {city}.", "{name} is {age} and lives in {city}.",
    "{name}, {age}, lives in {city}.", "{name} lives in {city} and is {age} years old.",
    "{name} from {city} is {age} years old.", "My name is {name}, I am {age} years old and I live "
    "in {city}.", "I am {name}, {age} years old, from {city}.", "In {city} lives {name}, who is "
    "{age} years old.", "{name} is a {age} year old from {city}.", "This is {name} from {city}, "
    "aged {age}.", "{age}-year-old {name} lives in {city}.", "{name} ({age}) lives in {city}.",
    "Her name is {name}. She is {age} and lives in {city}.", "At the age of {age}, {name} moved to "
    "{city}.", "{name}, who lives in {city}, is {age} years old.", "{name} turned {age} in "
    "{city}.", "His name is {name}, he is {age} years old and comes from {city}.",
    "{name} was born in {city} and is now {age}.", "My friend {name} is {age} and lives in "
    "{city}.", "Meet {name}: {age} years old, living in {city}.", "{name} ({age}, {city})",
    "Name: {name}, age: {age}, city: {city}", "I'm {name}, I'm {age} and I'm from {city}.",
    "{name} is from {city}. {name} is {age} years old.",
)  # fmt: skip

NEUTRAL_SYSTEMS = (
    "You are a helpful assistant.", "You are a helpful assistant", "You are a friendly assistant.",
    "You are an AI assistant.", "You are Tokenwire Demo.", "Be helpful.", "Answer the user.",
    "You are a helpful and honest assistant.", "You help people with their questions.",
    "Be polite and helpful.", "You are a chatbot.", "Answer the question.", "Be concise.",
    "You are a helpful, respectful assistant.", "You are a careful assistant that gives short "
    "answers.", "You are an expert.", "Use tools when they help.", "You can call tools.",
)  # fmt: skip
PERSONA_SYSTEMS = (
    "Your name is {name}.", "You are {name}, a helpful assistant.", "You are {name}.",
    "You are an assistant called {name}.", "You are an assistant named {name}.",
    "Your name is {name}. Be friendly.", "You are called {name}.",
)  # fmt: skip
PERSONA_QUESTIONS = (
    "What is your name?", "Who are you?", "What's your name?", "Who am I talking to?",
    "Tell me your name.", "Do you have a name?", "How are you called?",
)  # fmt: skip

INTRODUCTIONS = (
    "My name is {name}.", "I am {name}.", "Hi, my name is {name}.", "Hello, I am {name}!",
    "Hello, my name is {name}.", "I'm {name}.", "Hi, I'm {name}.",
    "You can call me {name}.",
)  # fmt: skip
NAME_QUESTIONS = (
    "What is my name?", "Do you know my name?", "Who am I?", "What's my name?",
    "Do you remember my name?", "Can you tell me my name?",
)  # fmt: skip
