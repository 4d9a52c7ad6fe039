"""An agent with one tool. Its client is OpenAI's own: it knows nothing of training."""

import functools
import json
import operator
import re

from openai import AsyncOpenAI

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculate",
        "description": "Add, subtract or multiply two whole numbers.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def calculate(expression):
    """The value of `3 + 4` as text; `error` for anything else that a model may write."""
    found = re.fullmatch(r"\s*(\d{1,18})\s*([-+*])\s*(\d{1,18})\s*", str(expression), re.ASCII)
    return str(OPERATORS[found[2]](int(found[1]), int(found[3]))) if found else "error"


@functools.cache
def connect(base_url):
    """One client for all episodes of a process: making it takes longer than an episode."""
    return AsyncOpenAI(base_url=base_url, api_key="of each episode")


async def run(problem, client):
    """Ask the question, answer calls until there is none. The recipe's reward scores the last turn."""
    openai = connect(client.base_url).with_options(api_key=client.api_key)
    messages = [{"role": "user", "content": problem["question"]}]
    while True:
        completion = await openai.chat.completions.create(model=client.model, messages=messages, tools=[CALCULATOR])
        message = completion.choices[0].message
        if not message.tool_calls:
            return None
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls:
            result = calculate(json.loads(call.function.arguments).get("expression", ""))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
