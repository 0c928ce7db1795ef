"""All that surrounds a training loop, here and in transfer: building what a recipe asks for, schedules, continuing
a run, metrics and their log, diagnosis, signals, and the watchdog that ends all ranks when one is lost. It imports
nothing of transfer, so that both kinds of loop can use it."""
