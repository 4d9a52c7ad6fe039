"""The controller process: prompts in; scored, stored, versioned groups of responses out."""
