"""An environment of 20 lines: the model guesses a number or calls a tool, and hears more after every turn."""

from gspo_megatron.environments import Reply


class GuessNumber:
    """Each problem has a whole number as `answer`; the sooner it is guessed, the higher the reward."""

    def reset(self, line):
        return {"number": int(line["answer"]), "guesses": 0}

    def step(self, state, turn):
        state = {**state, "guesses": state["guesses"] + 1}
        if turn.calls:  # several tools: one reply each
            tools = {"is_even": state["number"] % 2 == 0, "digits": len(str(abs(state["number"])))}
            said = [str(tools.get(call.name, "no such tool")) for call in turn.calls]
            return Reply(state, [{"role": "tool", "content": text} for text in said])
        guess = turn.content.strip()
        if guess.lstrip("-").isdecimal() and int(guess) == state["number"]:
            return Reply(state, reward=1 / state["guesses"], done=True)
        hint = "higher" if guess.lstrip("-").isdecimal() and int(guess) < state["number"] else "lower"
        return Reply(state, [{"role": "user", "content": hint}], reward=0.0)
