"""The options of each command. Whatever is heavy is imported when the command runs."""
