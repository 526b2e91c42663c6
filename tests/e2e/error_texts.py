"""Texts of errors in the words of TGI, which the server must use exactly."""

from __future__ import annotations

# The limits of the bundled model with default settings; a test compares them with /info.
MAX_INPUT, MAX_TOTAL = 2047, 2048

# What an error starts with: the body is no JSON, is no request, or has a value out of bounds.
JSON = "Failed to parse the request body as JSON: "
SHAPE = "Failed to deserialize the JSON body into the target type: "
VALIDATION = "Input validation error: "
TEMPERATURE = "`temperature` must be strictly positive"
REPETITION = "`repetition_penalty` must be strictly positive"
FREQUENCY = "`frequency_penalty` must be >= -2.0 and <= 2.0"
TOP_P = "`top_p` must be > 0.0 and < 1.0"
TYPICAL_P = "`typical_p` must be > 0.0 and < 1.0"
TOP_K = "`top_k` must be strictly positive"
MAX_NEW = "`max_new_tokens` must be strictly positive"
SAMPLING = "you must use sampling when `best_of` is > 1"
SEED = "`seed` must not be set when `best_of` > 1"
EMPTY = "`inputs` cannot be empty"
SUFFIX = "Suffix is not supported and can be achieved by preprocessing the prompt."


def best_of(given: int) -> str:
    return f"`best_of` must be > 0 and <= 2. Given: {given}"


def n(given: int) -> str:
    return f"`n` must be > 0 and <= 16. Given: {given}"


def stop(given: int) -> str:
    return f"`stop` supports up to 4 stop sequences. Given: {given}"


def top_n(given: int) -> str:
    return f"`top_n_tokens` must be >= 0 and <= 5. Given: {given}"


def truncate(given: int) -> str:
    return f"`truncate` must be strictly positive and less than {MAX_INPUT}. Given: {given}"


def total(num_input: int, max_new: int, maximum: int = MAX_TOTAL) -> str:
    return (
        f"`inputs` tokens + `max_new_tokens` must be <= {maximum}. "
        f"Given: {num_input} `inputs` tokens and {max_new} `max_new_tokens`"
    )


# For streams, checked before all other rules.
NO_BEST_OF = "`best_of` != 1 is not supported when streaming tokens"
NO_PREFILL = "`decoder_input_details` == true is not supported when streaming tokens"
NO_PROMPT = "prompt: Empty array detected. Do not use an empty array for the prompt."
UNTAGGED = "data did not match any variant of untagged enum MessageContent"
IMAGE = VALIDATION + "the model takes text only; `image_url` is not supported"
BATCH_SIZE = "Number of prompts exceeds the maximum allowed batch size of 4"
