"""Settings: the options, their types, the command line, and the option names of other trainers."""
