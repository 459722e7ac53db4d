"""What a model sees while it is quantised: texts, their tokens, and what each linear reads on the way."""
