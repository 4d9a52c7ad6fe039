"""An agent with one tool. Its client is OpenAI's own: it knows nothing of training."""

import json

from openai import AsyncOpenAI

from gspo_megatron.environments.calculator import calculate

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculate",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}


async def run(problem, client):
    """Ask the question, answer calls until there is none. The recipe's reward scores the last turn."""
    messages = [{"role": "user", "content": problem["question"]}]
    async with AsyncOpenAI(base_url=client.base_url, api_key=client.api_key) as openai:
        while True:
            completion = await openai.chat.completions.create(model=client.model, messages=messages, tools=[CALCULATOR])
            message = completion.choices[0].message
            if not message.tool_calls:
                return None
            messages.append(message.model_dump(exclude_none=True))
            for call in message.tool_calls:
                result = calculate(str(json.loads(call.function.arguments).get("expression", "")))
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
