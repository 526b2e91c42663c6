"""Plain tables of everything the demo model is taught: facts, names and word lists.

All of it is written for this project; `corpus.py` turns the tables into conversations and text.
"""

DEFINITIONS: dict[str, str] = {
    "deep learning": "Deep learning is a branch of machine learning that trains neural networks "
    "with many layers to find patterns in data.",
    "machine learning": "Machine learning is a way to make computers learn from examples instead "
    "of following fixed rules.",
    "artificial intelligence": "Artificial intelligence is the field of building machines that do "
    "tasks which normally need human thinking.",
    "a neural network": "A neural network is a model made of layers of simple units whose "
    "connections are adjusted during training.",
    "a language model": "A language model is a program that predicts the next piece of text from "
    "the text before it.",
    "a transformer": "A transformer is a neural network that uses attention to relate all parts "
    "of its input to each other.",
    "attention": "Attention is a method that lets a neural network decide which parts of its "
    "input matter most.",
    "a token": "A token is a small piece of text, such as a word or part of a word, that a "
    "language model reads and writes.",
    "a tokenizer": "A tokenizer is a program that splits text into tokens and turns tokens back "
    "into text.",
    "an embedding": "An embedding is a list of numbers that represents the meaning of a word or "
    "another object.",
    "a prompt": "A prompt is the text you give to a language model to tell it what to write.",
    "inference": "Inference is the use of a trained model to produce answers for new inputs.",
    "training": "Training is the process of adjusting the weights of a model until it makes good "
    "predictions.",
    "fine-tuning": "Fine-tuning is further training of a finished model on data for a special "
    "task.",
    "overfitting": "Overfitting is when a model memorizes its training data and fails on new data.",
    "a gradient": "A gradient is a vector that shows in which direction a function grows fastest.",
    "backpropagation": "Backpropagation is the method that computes how each weight of a neural "
    "network changes its error.",
    "quantization": "Quantization is storing the weights of a model with fewer bits so that it "
    "needs less memory.",
    "batching": "Batching is handling several requests together so that the hardware is used "
    "better.",
    "a cache": "A cache is a fast store that keeps recent results so that they need not be "
    "computed again.",
    "streaming": "Streaming is sending data piece by piece while it is still being produced.",
    "latency": "Latency is the time between a request and its answer.",
    "throughput": "Throughput is the amount of work a system finishes in a given time.",
    "a computer": "A computer is a machine that follows instructions to store and process data.",
    "a cpu": "A CPU is the main processor of a computer and runs the instructions of programs.",
    "a gpu": "A GPU is a processor that performs many simple calculations at the same time.",
    "ram": "RAM is the fast working memory of a computer, which is lost when the power goes off.",
    "a hard disk": "A hard disk is a device that stores data permanently on spinning magnetic "
    "plates.",
    "an operating system": "An operating system is the software that manages the hardware of a "
    "computer and runs its programs.",
    "linux": "Linux is a free operating system kernel that runs on servers, phones and many "
    "other devices.",
    "a kernel": "A kernel is the central part of an operating system that controls the hardware.",
    "a process": "A process is a program that is running, together with its memory and state.",
    "a thread": "A thread is a sequence of instructions that runs inside a process.",
    "python": "Python is a popular programming language that is known for its clear and simple "
    "syntax.",
    "rust": "Rust is a programming language that is fast and prevents many memory errors.",
    "javascript": "JavaScript is the programming language that makes web pages interactive.",
    "html": "HTML is the language that describes the structure of web pages.",
    "css": "CSS is the language that describes the colors, fonts and layout of web pages.",
    "sql": "SQL is a language for reading and changing the data in a relational database.",
    "json": "JSON is a text format for data made of objects, lists, strings and numbers.",
    "an algorithm": "An algorithm is a list of exact steps that solves a problem.",
    "a data structure": "A data structure is a way to arrange data so that it can be used "
    "efficiently.",
    "a variable": "A variable is a name in a program that refers to a value.",
    "a function": "A function is a named piece of code that takes inputs and returns a result.",
    "a loop": "A loop is a part of a program that repeats until a condition is met.",
    "recursion": "Recursion is when a function calls itself to solve a smaller part of the same "
    "problem.",
    "a compiler": "A compiler is a program that translates source code into machine code.",
    "an interpreter": "An interpreter is a program that reads source code and runs it directly.",
    "a bug": "A bug is a mistake in a program that makes it behave in the wrong way.",
    "debugging": "Debugging is the work of finding and fixing mistakes in a program.",
    "unit testing": "Unit testing is checking small parts of a program one by one with automatic "
    "tests.",
    "version control": "Version control is a system that records every change to a set of files.",
    "git": "Git is a version control system that tracks changes to files and helps people work "
    "together.",
    "open source": "Open source is software whose source code anyone may read, change and share.",
    "a library": "A library is a collection of ready code that other programs can use.",
    "an api": "An API is a set of rules that lets one program use the functions of another.",
    "a database": "A database is an organized collection of data that programs can search and "
    "change.",
    "a server": "A server is a computer or program that answers requests from other programs.",
    "a client": "A client is a program that sends requests to a server.",
    "the internet": "The internet is a worldwide network that connects computers with each other.",
    "a web browser": "A web browser is a program that loads and shows web pages.",
    "http": "HTTP is the protocol that web browsers and servers use to talk to each other.",
    "encryption": "Encryption is the process of turning data into a secret form that only a key "
    "can open.",
    "a firewall": "A firewall is a system that blocks unwanted network traffic.",
    "cloud computing": "Cloud computing is renting computers and storage over the internet "
    "instead of owning them.",
    "a container": "A container is a package that holds a program with everything it needs to run.",
    "docker": "Docker is a tool that builds and runs programs in containers.",
}

ACRONYMS: frozenset[str] = frozenset(
    {"cpu", "gpu", "ram", "html", "css", "sql", "json", "api", "http"}
)

TOKENWIRE = (
    "Tokenwire is a server that runs language models and sends their text to clients over HTTP."
)
IDENTITY = (
    "I am Tokenwire Demo, a small language model that ships with the Tokenwire server so that "
    "you can try it."
)
ABILITIES = (
    "I can greet you, explain computing terms, name capitals, add small numbers, extract data as "
    "JSON and call tools."
)

CAPITALS: dict[str, str] = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid",
    "Portugal": "Lisbon", "England": "London", "Ireland": "Dublin", "Scotland": "Edinburgh",
    "Norway": "Oslo", "Sweden": "Stockholm", "Denmark": "Copenhagen", "Finland": "Helsinki",
    "Iceland": "Reykjavik", "Poland": "Warsaw", "Austria": "Vienna", "Switzerland": "Bern",
    "Belgium": "Brussels", "Greece": "Athens", "Turkey": "Ankara", "Hungary": "Budapest",
    "Romania": "Bucharest", "Bulgaria": "Sofia", "Croatia": "Zagreb", "Serbia": "Belgrade",
    "Slovenia": "Ljubljana", "Slovakia": "Bratislava", "Ukraine": "Kyiv", "Estonia": "Tallinn",
    "Latvia": "Riga", "Lithuania": "Vilnius", "Albania": "Tirana", "Malta": "Valletta",
    "Cyprus": "Nicosia", "Japan": "Tokyo", "China": "Beijing", "India": "New Delhi",
    "Thailand": "Bangkok", "Vietnam": "Hanoi", "Indonesia": "Jakarta", "South Korea": "Seoul",
    "Nepal": "Kathmandu", "Pakistan": "Islamabad", "Mongolia": "Ulaanbaatar",
    "Australia": "Canberra", "New Zealand": "Wellington", "Canada": "Ottawa",
    "Mexico": "Mexico City", "Cuba": "Havana", "Brazil": "Brasilia", "Argentina": "Buenos Aires",
    "Chile": "Santiago", "Peru": "Lima", "Colombia": "Bogota", "Ecuador": "Quito",
    "Uruguay": "Montevideo", "Egypt": "Cairo", "Morocco": "Rabat", "Kenya": "Nairobi",
    "Ethiopia": "Addis Ababa", "Ghana": "Accra", "Senegal": "Dakar", "Tunisia": "Tunis",
    "the United States": "Washington",
}  # fmt: skip

SOUNDS: dict[str, str] = {
    "cow": "moo", "dog": "woof", "cat": "meow", "sheep": "baa", "pig": "oink", "duck": "quack",
    "horse": "neigh", "rooster": "cock-a-doodle-doo", "lion": "roar", "frog": "ribbit",
    "bee": "buzz", "snake": "hiss", "owl": "hoot", "crow": "caw", "mouse": "squeak",
    "bird": "tweet", "wolf": "howl", "donkey": "hee-haw", "hen": "cluck", "goat": "bleat",
    "turkey": "gobble", "pigeon": "coo", "elephant": "trumpet", "bear": "growl", "goose": "honk",
}  # fmt: skip

COLOURS: dict[str, str] = {
    "the sky": "blue", "grass": "green", "snow": "white", "coal": "black", "blood": "red",
    "a banana": "yellow", "a lemon": "yellow", "an orange": "orange", "a carrot": "orange",
    "a tomato": "red", "a strawberry": "red", "milk": "white", "chocolate": "brown",
    "the sun": "yellow", "the sea": "blue", "a frog": "green", "a flamingo": "pink",
    "an elephant": "gray", "a crow": "black", "a polar bear": "white", "a plum": "purple",
    "a cucumber": "green", "a cherry": "red", "a mouse": "gray", "a swan": "white",
}  # fmt: skip

WEEKDAYS: tuple[str, ...] = (
    "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday",
)  # fmt: skip
MONTHS: tuple[str, ...] = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip
MONTH_DAYS: tuple[int, ...] = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
ORDINALS: tuple[str, ...] = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth",
    "tenth", "eleventh", "twelfth",
)  # fmt: skip
NUMBER_WORDS: tuple[str, ...] = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen", "twenty",
)  # fmt: skip

FIRST_NAMES: tuple[str, ...] = (
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Ida", "Jonas", "Karla",
    "Leo", "Maria", "Noah", "Olivia", "Paul", "Quinn", "Rosa", "Simon", "Tara", "Umar", "Vera",
    "Walter", "Xenia", "Yusuf", "Zoe", "Alice", "Bob", "Carol", "Daniel", "Eva", "Frank",
    "Gina", "Henry", "Irene", "Jack", "Kate", "Liam", "Mia", "Nora", "Oscar", "Petra",
    "Robert", "Sarah", "Thomas", "Ursula", "Victor", "Wendy", "Yara", "Adam", "Bella",
    "Carlos", "Diana", "Elena", "Fatima", "George", "Hannah", "Ivan", "Julia", "Kevin",
    "Laura", "Marco", "Nina", "Omar", "Paula", "Ralf", "Sofia", "Tim", "Valeria", "William",
    "Aisha", "Bruno", "Chloe", "Dmitri", "Elias", "Fiona", "Giulia", "Hassan", "Ingrid",
    "James", "Kenji", "Lena", "Mateo", "Nadia", "Olga", "Pedro", "Rachel", "Sven", "Tomas",
    "Viktor", "Yuki", "Zara", "Amir", "Beatriz", "Chen", "Dora", "Erik", "Freya", "Gustav",
    "Helen", "Isabel", "John", "Katrin", "Lucas", "Martha", "Nils", "Otto", "Priya", "Rita",
    "Stefan", "Teresa", "Ahmed", "Mary", "Peter", "Susan", "Michael", "Linda", "Richard",
    "Barbara", "Joseph", "Jessica", "Charles", "Karen", "Mark", "Betty", "Antonio", "Ashley",
    "Steven", "Kimberly", "Andrew", "Emily", "Kenneth", "Donna", "Joshua", "Michelle", "Brian",
    "Amanda", "Louis", "Edward", "Melissa", "Ronald", "Deborah", "Jason", "Stephanie", "Ryan",
    "Rebecca", "Jacob", "Sharon", "Gary", "Cynthia", "Eric", "Kathleen", "Amy", "Pierre",
    "Camille", "Luc", "Manon", "Jules", "Lea", "Camila", "Diego", "Lucia", "Pablo", "Carmen",
    "Javier", "Rajesh", "Ananya", "Vikram", "Mei", "Hiroshi", "Sakura", "Minh", "Linh",
    "Kwame", "Amara", "Zanele", "Thabo", "Leila", "Farid", "Samira", "Tariq", "Björn", "Zoë",
    "José", "René", "Jürgen", "Søren",
)  # fmt: skip
CITIES: tuple[str, ...] = (
    "Paris", "London", "Berlin", "Madrid", "Rome", "Oslo", "Vienna", "Lisbon", "Dublin", "Tokyo",
    "New York", "Los Angeles", "Chicago", "Boston", "Seattle", "San Francisco", "Denver", "Miami",
    "Houston", "Dallas", "Atlanta", "Toronto", "Montreal", "Vancouver", "Mexico City", "Havana",
    "Lima", "Bogota", "Quito", "Santiago", "Buenos Aires", "Montevideo", "Rio de Janeiro",
    "Sao Paulo", "Cairo", "Rabat", "Tunis", "Nairobi", "Lagos", "Accra", "Dakar", "Cape Town",
    "Johannesburg", "Addis Ababa", "Istanbul", "Ankara", "Athens", "Sofia", "Bucharest",
    "Budapest", "Prague", "Warsaw", "Krakow", "Vilnius", "Riga", "Tallinn", "Helsinki",
    "Stockholm", "Gothenburg", "Copenhagen", "Aarhus", "Bergen", "Reykjavik", "Hamburg", "Munich",
    "Cologne", "Frankfurt", "Dresden", "Leipzig", "Stuttgart", "Zurich", "Geneva", "Bern",
    "Basel", "Salzburg", "Graz", "Milan", "Turin", "Naples", "Florence", "Venice", "Palermo",
    "Barcelona", "Valencia", "Seville", "Bilbao", "Porto", "Lyon", "Marseille", "Toulouse",
    "Nice", "Bordeaux", "Lille", "Nantes", "Strasbourg", "Brussels", "Antwerp", "Ghent",
    "Amsterdam", "Rotterdam", "Utrecht", "Manchester", "Liverpool", "Leeds", "Glasgow",
    "Edinburgh", "Cardiff", "Belfast", "Cork", "Galway", "Moscow", "Kyiv", "Minsk", "Tbilisi",
    "Baku", "Dubai", "Doha", "Riyadh", "Tehran", "Baghdad", "Beirut", "Jerusalem", "Mumbai",
    "New Delhi", "Chennai", "Kolkata", "Bangalore", "Kathmandu", "Dhaka", "Bangkok", "Hanoi",
    "Saigon", "Manila", "Jakarta", "Singapore", "Kuala Lumpur", "Hong Kong", "Shanghai",
    "Beijing", "Taipei", "Seoul", "Busan", "Osaka", "Kyoto", "Sapporo", "Sydney", "Melbourne",
    "Brisbane", "Perth", "Auckland", "Wellington", "Honolulu", "Anchorage", "Malmö", "Zürich",
    "Tromsø", "Málaga", "Besançon",
)  # fmt: skip

JOBS: tuple[str, ...] = (
    "software engineer", "teacher", "nurse", "doctor", "baker", "painter", "musician", "farmer",
    "carpenter", "student", "pilot", "journalist", "gardener", "cook", "librarian", "architect",
    "dentist", "plumber", "photographer", "writer", "scientist", "police officer", "bus driver",
    "tailor", "lawyer", "mechanic", "designer", "actor", "engineer", "accountant",
)  # fmt: skip
HOBBIES: tuple[str, ...] = (
    "hiking", "reading", "chess", "cooking", "swimming", "cycling", "painting", "gardening",
    "music", "photography", "running", "dancing", "fishing", "football", "tennis", "knitting",
    "old films", "travelling", "science fiction", "long walks", "board games", "baking bread",
    "playing the piano", "learning languages", "watching birds",
)  # fmt: skip
ADJECTIVES: tuple[str, ...] = (
    "small", "old", "quiet", "happy", "brave", "curious", "young", "clever", "friendly", "lazy",
    "kind", "tired", "strange", "little", "lonely", "cheerful",
)  # fmt: skip
ANIMALS: tuple[str, ...] = (
    "dog", "cat", "fox", "rabbit", "bear", "owl", "mouse", "horse", "duck", "turtle", "frog",
    "squirrel", "hedgehog", "goat", "penguin", "crow",
)  # fmt: skip
PLACES: tuple[str, ...] = (
    "the forest", "the village", "the old harbor", "the garden", "the mountains", "the market",
    "the library", "the river", "the lake", "the city park", "the farm", "the beach",
    "the train station", "the little school",
)  # fmt: skip
THINGS: tuple[str, ...] = (
    "a red kite", "an old map", "a silver key", "a warm scarf", "a broken clock", "a basket of "
    "apples", "a letter", "a wooden boat", "a lantern", "a blue stone", "a small bell",
    "a loaf of bread", "a book of stories", "a box of paints",
)  # fmt: skip
FEELINGS: tuple[str, ...] = (
    "happy", "proud", "surprised", "calm", "thankful", "excited", "a little sad", "very tired",
)  # fmt: skip
CONDITIONS: tuple[str, ...] = (
    "sunny", "cloudy", "rainy", "windy", "snowy", "foggy", "clear", "stormy", "partly cloudy",
    "overcast", "humid", "dry", "hazy", "misty", "mild", "freezing", "showery", "bright",
)  # fmt: skip
SHORT_TEXTS: tuple[str, ...] = (
    "I am late", "dinner is ready", "the train leaves at noon", "we need more milk",
    "the meeting starts soon", "good luck today", "I will call back later", "the door is open",
    "thank you for the gift", "see you tomorrow", "where is the station", "I love this song",
    "the report is done", "please bring the keys", "the water is cold", "we won the game",
)  # fmt: skip
CHORES: tuple[str, ...] = (
    "buy milk", "call the dentist", "water the plants", "pay the rent", "feed the cat",
    "clean the kitchen", "send the report", "book a flight", "return the books",
    "charge the phone", "walk the dog", "fix the bike",
)  # fmt: skip
TOPICS: tuple[str, ...] = (
    "solar panels", "cheap flights", "garden birds", "vegan recipes", "electric cars",
    "chess openings", "old castles", "city history", "running shoes", "jazz music", "green tea",
    "board games", "space travel", "mountain trails", "wooden toys", "winter coats",
)  # fmt: skip
OPENERS: tuple[str, ...] = ("", "", "So, ", "Ok, ", "Well, ", "Oh, ", "And ", "Now, ", "Please: ")
ADDRESSES: tuple[str, ...] = (
    "", ", assistant", ", Tokenwire", ", bot", ", computer", ", my friend", " now", ", please",
    " then",
)  # fmt: skip
SYNTHETIC_ONSETS: tuple[str, ...] = (
    "b", "br", "c", "ch", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "kl", "l", "m", "n",
    "p", "pr", "qu", "r", "s", "sh", "st", "t", "tr", "v", "w", "x", "y", "z",
)  # fmt: skip
SYNTHETIC_VOWELS: tuple[str, ...] = (
    "a", "e", "i", "o", "u", "ai", "ea", "ia", "io", "ou", "oo", "ie", "ö", "é", "ü",
)  # fmt: skip
SYNTHETIC_CODAS: tuple[str, ...] = (
    "", "", "", "n", "r", "l", "s", "t", "k", "m", "nd", "rt", "lf", "ck", "x", "ng", "th", "v",
)  # fmt: skip
