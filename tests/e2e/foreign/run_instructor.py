"""instructor against a server: a pydantic model by tool and by schema. Prints one JSON document."""

import json
import sys

import instructor
from openai import OpenAI
from pydantic import BaseModel

URL, QUESTION, WEATHER_QUESTION = sys.argv[1:]


class Place(BaseModel):
    """A place on earth."""

    city: str


found = {}
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(OpenAI(base_url=f"{URL}/v1", api_key="-"), mode=mode)
    place = client.chat.completions.create(
        model="tgi",
        messages=[{"role": "user", "content": WEATHER_QUESTION}],
        response_model=Place,
        max_retries=0,
        max_tokens=100,
        temperature=0.0,
    )
    found[mode.value] = place.model_dump()
print(json.dumps(found))
