"""What can be set: options, their types, the command line, and the names that other trainers use."""
