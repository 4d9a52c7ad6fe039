"""A rendering of prompts in its own file: a worked example before every question, written by the chat template.

gspo train RECIPE tokenizer.rendering=recipes/renderings/one_example.py:render
"""

EXAMPLE = (
    {"role": "user", "content": "Calculate 12 + 30."},
    {"role": "assistant", "content": "12 + 30 = 42"},
)


def render(line, chat):
    """Return messages; a text or a list of token ids would do as well. `line` is the whole line of the problem."""
    system = [message for message in chat.messages if message["role"] == "system"]
    turns = [message for message in chat.messages if message["role"] != "system"]
    return [*system, *EXAMPLE, *turns]
