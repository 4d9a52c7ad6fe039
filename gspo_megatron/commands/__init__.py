"""The subcommands of `gspo`: one module each, with `add_arguments` and `run`. None imports torch when it is loaded."""
