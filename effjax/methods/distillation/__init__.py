"""Methods that train another model to do in a few calls what one does in many."""
