"""Where a run happens: strategies, the Accelerator, collectives, and the differences between backends."""
