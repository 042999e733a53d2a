"""Methods that change attention: windows, sharing over steps and guidance halves."""
