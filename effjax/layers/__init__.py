"""The parts that every model is made of; each can be replaced by a patch."""
